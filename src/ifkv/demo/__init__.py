"""Model and texts of `ifkv demo`."""
