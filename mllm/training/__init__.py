"""From a recipe to a trained model.

Reading order: build.py (recipe → model and plan), groups.py, layers.py, lora.py and quantised.py
(what learns), muon.py, eight_bit.py and schedule.py (how fast), step.py (what DeepSpeed wraps),
engine.py and masters.py (DeepSpeed), loop.py (the loop), checkpoint.py and checkpoint_index.py,
export.py, stage.py (one rank's way through a stage), worker.py and processes.py (what each rank
runs, whoever started it), launch.py and ranks.py (what the user's command does).
"""
