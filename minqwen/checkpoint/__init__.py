"""Where the numbers come from: directories of safetensors files in Hugging Face's layout.

They are read by slices (reader.py), written whole (writer.py), and become a model and a directory
again (load.py, save.py). quantization.py knows how AWQ and GPTQ lie in such files, words.py lets a
model keep them so.
"""

from minqwen.checkpoint.load import load_pretrained
from minqwen.checkpoint.reader import Checkpoint
from minqwen.checkpoint.save import save_pretrained
from minqwen.checkpoint.writer import write_checkpoint

__all__ = ["Checkpoint", "load_pretrained", "save_pretrained", "write_checkpoint"]
