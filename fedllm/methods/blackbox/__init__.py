"""Black box and transfer (2.4, 3.8)."""
