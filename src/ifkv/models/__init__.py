"""Facts about a transformers model.

Belongs here: families, structure, rotary embedding, fingerprints, hooks, upstream code and names.
Not here: anything that runs rows or holds keys and values.
"""
