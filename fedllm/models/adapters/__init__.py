"""Adapters - small trainable parts over a frozen base model, one per client in a single pass."""
