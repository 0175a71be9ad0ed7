"""The cache of one request: documents stitched side by side.

Belongs here: layout, layers, stitching, extending, loading rows, rolling back.
Not here: anything that runs the model; see `ifkv.steps`.
"""
