"""How requests run: who is in the next step, on which blocks of the cache, and what comes back."""
