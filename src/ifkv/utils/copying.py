"""Objects that cannot be copied: they hold models, stores or running threads."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from ifkv.errors import InvalidInputError


class Uncopied:
    """Base class of objects that refuse to be copied or pickled, and say what to do instead.

    A subclass that defines ``__copy__`` still supports ``copy.copy``.
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
