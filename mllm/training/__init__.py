"""From a recipe to a trained model.

Reading order: build.py (recipe → model and plan), step.py (what DeepSpeed wraps), engine.py and
masters.py (DeepSpeed), loop.py (the loop), checkpoint.py, export.py, worker.py (what each rank
runs), launch.py (what the user's command does).
"""
