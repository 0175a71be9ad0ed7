"""The steps of the method over stitched caches, for one request or many.

Belongs here: score, select, reorder, recompute, and the passes that they run.
Not here: rules that choose (`ifkv.selectors`) and whole questions (`ifkv.session`).
"""
