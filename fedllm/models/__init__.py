"""Models - loading, structure and adapters of transformers models."""
