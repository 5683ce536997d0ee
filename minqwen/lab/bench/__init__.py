"""How fast engines are, in turns in one run, and what share of the machine's limit they reach.

jobs.py says what is timed, contestants.py who takes part. Each contestant is a process of its own
(worker.py) that runs ours.py, or one of the peers of peers.py and llama_cpp.py; turns.py starts
them and gives them their turns. roofs.py measures the machine, figures.py makes figures of times,
page.py shows them. `tools/bench.py` is the command line; `tools/doctor.py` uses the roofs and the
times too.
"""
