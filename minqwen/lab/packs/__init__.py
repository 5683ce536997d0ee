"""Golden packs: what a model computes at every point, kept with its digests, and computed again.

runs.py computes, streaming.py does it for a model larger than memory, writer.py writes a pack,
pack.py reads one, and check.py says whether this machine computes the same.
"""
