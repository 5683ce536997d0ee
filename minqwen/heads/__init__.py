"""More heads, the same model: head extension of checkpoints."""
