"""Privacy - differential privacy of examples or of clients: the mechanisms, what they cost, and what is spent."""
