"""Model and texts of `ifkv demo`.

Belongs here: the small model, the passages and the conversion that `ifkv demo` shows.
Not here: anything that the library itself needs.
"""
