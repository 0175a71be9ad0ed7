"""A tokenizer that knows words: where its files are missing, transformers makes an empty one."""

from __future__ import annotations

from typing import Any

from ifkv.errors import InvalidInputError


def check_vocabulary(tokenizer: Any) -> None:
    """Raise if every text is the same to the tokenizer.

    transformers makes a tokenizer of some classes (Llama's and Qwen's, for example) without any
    vocabulary if ``tokenizer.json`` is missing. All text becomes nothing then, or the unknown
    token.

    Raises:
        InvalidInputError: It has no vocabulary.
    """
    if (
        tokenizer("a", add_special_tokens=False)["input_ids"]
        == (tokenizer("b c", add_special_tokens=False)["input_ids"])
    ):
        raise InvalidInputError(
            f"the {type(tokenizer).__name__} has no vocabulary: it makes all texts alike. Its "
            "tokenizer.json is missing, probably; give the model's own, whole."
        )
