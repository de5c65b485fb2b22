"""The model and its processor. They know nothing of DeepSpeed, freezing, LoRA or learning rates.

Reading order:

- an image: geometry.py (one square), native.py (as it is), tiles/ (cut), connectors/ (how many
  tokens a view makes), expansion.py (which of them stand where), regions.py, clips.py;
- a text: template.py (a document as token ids), turns.py, rendering.py, chat_template.py;
- both: processor.py, and for those who know transformers' processors calls.py, rows.py (padding),
  messages.py, pictures.py (what an image may be given as), image_processor.py, hub.py;
- the model: encoders/, fusion/, language.py, families.py and probe.py (what can be packed),
  attention.py and backends.py (isolation inside a pack), positions.py, images.py, modeling.py,
  generating.py;
- in and out: assemble.py (parts or a folder to a model and its processor), composites/ (other
  people's whole models, read and written), ridge.py (a closed-form start).
"""
