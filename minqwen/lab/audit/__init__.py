"""Is an engine that can only be asked right? It is judged by its log probabilities or its texts.

records.py reads what was said, endpoint.py and client.py ask for it, forced.py computes the same
tokens here, stats.py and evidence.py weigh the error, explain.py tries the catalogue's mistakes,
and audit.py makes the verdict of it all.
"""
