"""Surrogate context: texts that stand in for what will precede a document in a request."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError
from ifkv.utils.checks import naming, token_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Token ids of one text, or of several.
Texts = Sequence[int] | Tensor | Sequence[Sequence[int] | Tensor]
# Those in use that were read from stores, by identity: documents hold one object, not a copy each.
_SHARED: WeakValueDictionary[str, SurrogateContext] = WeakValueDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class SurrogateContext:
    """Texts that stand in, while a document is encoded, for what will precede it in a request.

    In a document encoded alone, the first tokens take the place of everything that will stand
    before them. Behind a surrogate context they do not. Only the document's own rows are kept.
    With several texts it is encoded behind each, and keys (before the rotation) and values are
    averaged: an estimate of their expectation over what may precede.

    Attributes:
        texts: Token ids of each text, long ``[S]``, on the CPU; in ascending order, since the
            order in which they are given makes no difference.

    Raises:
        InvalidInputError: There is no text, one is empty, or they are not in ascending order, each
            once; `of` puts them in order.
    """

    texts: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        ids = [text.tolist() for text in self.texts]
        if not ids or not all(ids) or any(one >= two for one, two in itertools.pairwise(ids)):
            raise InvalidInputError(
                f"the texts of a surrogate context have {[len(text) for text in ids]} tokens, but "
                "must be one or more that have some, in ascending order and each once; "
                "SurrogateContext.of puts them in order."
            )

    @classmethod
    def of(cls, model: PreTrainedModel, given: SurrogateContext | Texts) -> SurrogateContext:
        """Return the surrogate context of token ids.

        Args:
            model: A model, for its vocabulary.
            given: Token ids of one text, or of several; or a surrogate context, which is returned.

        Raises:
            InvalidInputError: There is no text, one is empty, no token ids, there twice, or holds
                an id outside the vocabulary.
        """
        if isinstance(given, SurrogateContext):
            return given
        several: Any = given
        if isinstance(several, str):
            raise InvalidInputError(
                f"surrogate is the text {several[:40]!r}; give its token ids, as the tokenizer "
                "makes them."
            )
        if isinstance(several, Mapping | Set) or not hasattr(several, "__len__"):
            raise InvalidInputError(
                f"surrogate is {several!r}; give the token ids of a text, a list of several such "
                "texts, or None to encode documents alone."
            )
        if len(several) == 0:
            raise InvalidInputError(
                "surrogate has no token; give the ids of a text, or None to encode documents alone."
            )
        if isinstance(several, Tensor) or not hasattr(several[0], "__len__"):
            several = [several] if getattr(several, "ndim", 1) == 1 else list(several)
        with naming("surrogate"):
            texts = [token_tensor(model, text, f"text {i}") for i, text in enumerate(several)]
        ordered = sorted(texts, key=Tensor.tolist)
        for one, other in itertools.pairwise(ordered):
            if torch.equal(one, other):
                raise InvalidInputError(
                    f"surrogate has the same text of {len(one)} tokens twice; give each once."
                )
        return cls(tuple(ordered))

    @functools.cached_property
    def identity(self) -> str:
        """Return SHA-256 over the texts, 64 hex digits: equal for equal texts."""
        digest = hashlib.sha256(b"ifkv surrogate\n")
        for text in self.texts:
            ids = text.numpy().astype("<i8").tobytes()
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids)
        return digest.hexdigest()

    def shared(self) -> SurrogateContext:
        """Return the object that all who call this hold for these texts."""
        return _SHARED.setdefault(self.identity, self)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest text."""
        return max(len(text) for text in self.texts)

    def __repr__(self) -> str:
        lengths = ", ".join(str(len(text)) for text in self.texts)
        return f"SurrogateContext({lengths} tokens, {self.identity[:8]})"


def before_documents(
    prefix_ids: Sequence[int] | Tensor, surrogate: SurrogateContext | None
) -> tuple[int, str]:
    """Return the most tokens that stand before a document while it is encoded, and their name.

    Args:
        prefix_ids: The prefix, ``[P]``.
        surrogate: What stands behind the prefix, or None.
    """
    if surrogate is None:
        return len(prefix_ids), "with its prefix"
    return len(prefix_ids) + surrogate.longest, "with its prefix and surrogate context"
