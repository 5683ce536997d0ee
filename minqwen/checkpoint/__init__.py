"""Where the numbers come from: safetensors directories in Hugging Face layout, read by slices and written whole."""

from .load import load_pretrained
from .reader import Checkpoint
from .writer import write_checkpoint

__all__ = ["Checkpoint", "load_pretrained", "write_checkpoint"]
