"""The version of ifkv, where everything may read it."""

__version__ = "0.1.0"
