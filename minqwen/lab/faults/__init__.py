"""The one catalogue of things that people get wrong, each a small variant of a right model.

catalogue.py is the table; fault.py says what an entry is and builds the model that makes the
mistake. The other files say how each is made. What finds mistakes is tested with them, what
explains a wrong engine tries them one after another, and a teacher breaks the model with them.
"""

from minqwen.lab.faults.catalogue import FAULTS, HEAD_FAULTS, find, hypotheses
from minqwen.lab.faults.fault import Fault, Variant, Weights, build

__all__ = ["FAULTS", "HEAD_FAULTS", "Fault", "Variant", "Weights", "build", "find", "hypotheses"]
