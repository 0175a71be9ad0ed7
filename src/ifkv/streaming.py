"""Text as it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def text_streamer(tokenizer: Any, stream: bool | Callable[[str], None]) -> Any:
    """A streamer for ``model.generate()``.

    Args:
        tokenizer: The tokenizer.
        stream: True to print, a function to be called with each piece of text, False for none.

    Returns:
        A transformers streamer that leaves the prompt and special tokens out, or None.
    """
    if stream is False:
        return None
    from transformers import TextStreamer

    if stream is True:
        return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    emit = stream

    class _Callback(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                emit(text)

    return _Callback(tokenizer, skip_prompt=True, skip_special_tokens=True)
