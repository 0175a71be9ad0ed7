"""What is known of a transformers model, without any cache.

Belongs here: family files, structure, rotary geometry, fingerprints, hooks, upstream names.
Not here: anything that runs rows or holds keys and values.
"""
