"""Where does another engine go wrong first, and what is its mistake?

dumps.py and arrays.py read what it computed (../dump.py writes that), diff.py compares it with a
golden pack point by point, diagnosis.py looks for the mistake, page.py draws the report.
"""
