"""What `make_vectors.py` is made of."""
