"""Forward passes: rows run through the model's own decoder layers.

Belongs here: the loop over layers, the protocol of passes, CUDA graphs for few rows.
Not here: the passes themselves, which are in `ifkv.steps` and `ifkv.documents`.
"""
