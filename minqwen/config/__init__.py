"""What config.json and generation_config.json say, checked, and what follows from it.

model_config.py has the fields and what can be computed from them; config_json.py knows the two
layouts of the file; rope_scaling.py are YaRN's parameters.
"""

from minqwen.checks import BYTES_PER_ELEMENT
from minqwen.config.generation_config import GenerationDefaults
from minqwen.config.model_config import ModelConfig
from minqwen.config.rope_scaling import RopeScaling

__all__ = ["BYTES_PER_ELEMENT", "GenerationDefaults", "ModelConfig", "RopeScaling"]
