"""Encrypted - sums under homomorphic encryption (CKKS): clients hold the key, and the server only adds."""
