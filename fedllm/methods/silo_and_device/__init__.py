"""Cross-silo and cross-device methods (survey 2.4)."""
