"""Default length of an answer, in a module that imports no torch."""

DEFAULT_MAX_NEW_TOKENS = 64
