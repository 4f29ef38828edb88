"""What is done with recorded runs: reproduced, compared, audited, reported, listed, exported.

A command with its output is a module here; what trains or selects belongs to `study`.
"""
