"""One forward pass, told: every operation with its lines of code, numbers, heads and predictions.

explain.py is the story as data, sources.py finds the lines of code, contrast.py puts a mistake
beside it. The others write it down, as text and as a page.
"""
