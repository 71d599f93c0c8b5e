"""A tiny draft/target pair trained from the running Python's own standard library, without a download.

`command.py` is `tokenmill train-pair`; `training.py` orders the stages: tokenizer, target, draft, distilled draft.
The pair exercises every part of the system (serving, speculation, quantization) on real text; it is no assistant.
"""
