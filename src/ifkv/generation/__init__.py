"""From a repaired cache to tokens: settings, decoding, streaming.

Belongs here: `generate`, greedy decoding side by side, settings, finish reasons.
Not here: texts and tokenizers' layouts; see `ifkv.session`.
"""
