"""More heads, the same model: layouts of heads, and how tensors and checkpoints move to them."""
