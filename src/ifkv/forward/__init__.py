"""Running rows through a model's own decoder layers.

Belongs here: the loop over layers, the protocol of passes, CUDA graphs of few rows.
Not here: what a pass writes or attends to; see `ifkv.steps` and `ifkv.documents`.
"""
