"""The model and its processor. They know nothing of DeepSpeed, freezing, LoRA or learning rates.

Reading order: geometry.py and connectors/ (how many tokens an image takes), template.py (a document
as token ids), processor.py, encoders/, fusion/ (how visual tokens reach the language model),
attention.py (isolation inside a pack), modeling.py, assemble.py (parts or a folder to a model and
its processor), ridge.py (a closed-form start).
"""
