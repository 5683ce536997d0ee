"""Where the numbers come from: safetensors directories in Hugging Face layout, read by slices and written whole."""

from minqwen.checkpoint.load import load_pretrained
from minqwen.checkpoint.reader import Checkpoint
from minqwen.checkpoint.writer import write_checkpoint

__all__ = ["Checkpoint", "load_pretrained", "write_checkpoint"]
