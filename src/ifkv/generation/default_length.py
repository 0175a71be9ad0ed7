"""How long an answer is where nobody says, in one place that needs no torch."""

DEFAULT_MAX_NEW_TOKENS = 64
