"""From a recipe to a trained model.

Reading order: build.py (recipe → model and plan), groups.py, layers.py, lora.py and quantised.py
(what learns), muon.py, eight_bit.py and schedule.py (how fast), step.py (what DeepSpeed wraps),
engine.py and masters.py (DeepSpeed), loop.py (the loop), checkpoint.py, export.py, worker.py (what
each rank runs), launch.py (what the user's command does).
"""
