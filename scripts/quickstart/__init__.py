"""The first command: fetch real weights and data, prepare them, train three stages, report.

Reading order: sources.py (what is fetched), fetch.py (how), captions.py (the held-out split), the
builders stamps.py, furniture.py, gimp.py, shapes.py and instruct.py, prepare.py (in which order),
__main__.py (the whole).
"""
