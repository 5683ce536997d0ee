"""What researchers do with the model: compare it, estimate its memory, take its fingerprint."""
