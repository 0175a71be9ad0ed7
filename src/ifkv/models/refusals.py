"""Model types that no family covers and why, read from ``patches/refused/reasons.toml``."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Reason why ifkv does not work with a model type.

    Attributes:
        kind: ``"never"`` if the method does not fit it, ``"not yet"`` if something is missing.
        reason: The reason; what is missing, of one that is not supported yet.
    """

    kind: str
    reason: str

    @property
    def sentence(self) -> str:
        """Return the reason as the rest of a sentence that begins with the model type."""
        if self.kind == "never":
            return f"which ifkv cannot work with: {self.reason}"
        return f"which is not supported yet: it needs {self.reason}"


def refusals(folder: Traversable) -> dict[str, Refusal]:
    """Read the reasons, by model type.

    Args:
        folder: The folder of the family files.
    """
    file = folder / "refused" / "reasons.toml"
    if not file.is_file():
        return {}
    return {
        model_type: Refusal(entry["kind"], entry["reason"])
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["refused"]
        for model_type in entry["model_types"]
    }
