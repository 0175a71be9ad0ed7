"""Copies of what cannot be doubled: models, stores, and threads at work."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from ifkv.errors import InvalidInputError


class Uncopied:
    """A class whose objects refuse to be copied and pickled, and say what to do.

    A subclass with a ``__copy__`` of its own lets ``copy.copy`` work.
    """

    _instead: ClassVar[str]

    def _refuse(self) -> NoReturn:
        raise InvalidInputError(
            f"a {type(self).__name__} can be neither pickled nor copied with all that it holds; "
            f"{self._instead}."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse()
