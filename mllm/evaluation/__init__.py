"""What a model learned, in figures.

Reading order: heldout.py (the examples), likelihood.py (the figures, as functions of a scorer),
scoring.py (a scorer made from a model), report.py (a stage folder's figures as one page),
wording.py (how figures are written).
"""
