"""Checks of arguments that several operations share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_positive(value: Any, what: str) -> None:
    """Raise if a value is not a whole number of at least 1.

    Args:
        value: The value.
        what: Its name, for the message.

    Raises:
        InvalidInputError: The value is smaller, or not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InvalidInputError(f"{what} is {value!r} but must be a whole number of at least 1.")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Prefix the message of an `InvalidInputError` with the name of what it is about.

    Args:
        what: The name, for example "document 3".
    """
    try:
        yield
    except InvalidInputError as error:
        raise type(error)(f"{what}: {error}") from error


def naming_request(index: int) -> AbstractContextManager[None]:
    """Prefix the message of an `InvalidInputError` with the request that it is about.

    Args:
        index: Index of the request, from 0.
    """
    return naming(f"request {index}")


def whole_numbers(values: Any, what: str) -> list[int]:
    """Return a sequence or tensor of whole numbers as a list of Python integers.

    Args:
        values: The sequence or tensor.
        what: Its name, for the message.

    Raises:
        InvalidInputError: It is not a sequence, or an entry is not a whole number. Truth values
            are not whole numbers.
    """
    if isinstance(values, Tensor):
        values = values.tolist()
    try:
        numbers = list(values)
    except TypeError as error:
        raise InvalidInputError(
            f"{what} is {values!r}, but must be a sequence of whole numbers."
        ) from error
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise InvalidInputError(f"{what} holds {number!r}, but must hold whole numbers.")
    return [int(number) for number in numbers]


def token_tensor(
    model: PreTrainedModel,
    ids: Sequence[int] | Tensor | str,
    what: str,
    *,
    empty: bool = False,
    pictures: bool = False,
) -> Tensor:
    """Return token ids as a tensor, checked against the model's vocabulary.

    Args:
        model: The model.
        ids: Integers: a sequence, or a tensor ``[n]`` or ``[1, n]``. A string is refused.
        what: Name of the ids, for the message.
        empty: Accept an empty sequence.
        pictures: Accept the placeholder of rows of pictures, which come with the ids.

    Returns:
        Long ``[n]``, on the CPU, sharing no memory with ``ids``.

    Raises:
        InvalidInputError: The ids are not integers, have more than one dimension, are empty, lie
            outside the vocabulary, or hold a placeholder of a picture or video.
    """
    if isinstance(ids, str):
        raise InvalidInputError(
            f"{what} is a string; token ids are wanted. Tokenise it first, or use ifkv.Session."
        )
    if isinstance(ids, Mapping):
        raise InvalidInputError(
            f"{what} is of type {type(ids).__name__}; token ids are wanted: take ['input_ids'] "
            "from what the tokenizer returned."
        )
    if isinstance(ids, bytes | bytearray | AbstractSet):
        raise InvalidInputError(
            f"{what} is of type {type(ids).__name__}; token ids in their order are wanted."
        )
    try:
        tensor = torch.as_tensor(ids).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{what} is not a sequence of token ids: {error}.") from error
    if tensor.ndim == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 1:
        raise InvalidInputError(
            f"{what} has shape {tuple(tensor.shape)}; token ids of one sequence, [n], are wanted."
        )
    if len(tensor) == 0:
        if not empty:
            raise InvalidInputError(f"{what} is empty; it needs at least one token.")
        return torch.zeros(0, dtype=torch.long)
    if tensor.dtype.is_floating_point or tensor.dtype == torch.bool or tensor.dtype.is_complex:
        raise InvalidInputError(f"{what} holds {tensor.dtype}; token ids are integers.")
    low, high = int(tensor.min()), int(tensor.max())
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise InvalidInputError(
            f"{what} holds token id {bad}, but this model's ids run from 0 to {vocabulary - 1}. "
            "Was it tokenised for another model?"
        )
    _check_placeholders(model, tensor, what, pictures)
    return tensor.to(torch.long).clone()


def _check_placeholders(model: Any, ids: Tensor, what: str, pictures: bool) -> None:
    """Refuse ids that stand for rows of pictures or videos, which would run as blind embeddings.

    A text that contains the literal placeholder is tokenised to one.
    """
    for name in ("image_token_id", "image_token_index", "video_token_id", "audio_token_id"):
        placeholder = getattr(getattr(model, "config", None), name, None)
        if not isinstance(placeholder, int) or (pictures and name.startswith("image")):
            continue
        if bool((ids == placeholder).any()):
            kind = name.partition("_")[0]
            raise InvalidInputError(
                f"{what} holds the token id {placeholder}, which stands for a row of "
                f"{'an' if kind[0] in 'ai' else 'a'} {kind} and means nothing without it. Give "
                "pictures in documents as ifkv.ImageDocument, and take the placeholder out of "
                "texts."
            )
