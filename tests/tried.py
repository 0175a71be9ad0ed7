"""Families that tests are run on: one of each arithmetic, or all (`pytest --families=all`).

Found by the tests because pytest puts this folder on the path (`pythonpath` in pyproject.toml).
"""

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING

from ifkv.testing import ARITHMETICS, FIXED_WIDTH, ROUTED_FAMILIES, rope_types
from ifkv.testing import FAMILIES as ALL_FAMILIES
from ifkv.testing import SLIDING_FAMILIES as ALL_SLIDING

FAMILIES: list[str] = list(ARITHMETICS)
SLIDING_FAMILIES: list[str] = [family for family in ARITHMETICS if family in ALL_SLIDING]
SMOOTH_FAMILIES: list[str] = list(ARITHMETICS)
"""Families without experts, whose error in half precision has no steps."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""RoPE types with frequencies that do not depend on the length."""


def cannot_be_made(family: str) -> bool:
    """True if this release of transformers refuses the family's config with its own defaults.

    OLMo's and OLMoE's, in 5.4: a checkpoint whose embeddings are not tied cannot be loaded there.
    """
    try:
        CONFIG_MAPPING[family]()
    except StrictDataclassFieldValidationError:
        return True
    return False


UNMADE: list[str] = [family for family in ("olmo", "olmoe") if cannot_be_made(family)]


def choose(which: str) -> None:
    """Set the families, before the tests are collected."""
    if which == "all":
        FAMILIES[:] = ALL_FAMILIES
        SLIDING_FAMILIES[:] = ALL_SLIDING
        SMOOTH_FAMILIES[:] = [family for family in ALL_FAMILIES if family not in ROUTED_FAMILIES]


def family_ropes() -> list[tuple[str, str]]:
    """List families with each of their RoPE types of fixed frequencies."""
    return [(f, rope) for f in FAMILIES for rope in rope_types(f) if rope in FIXED_ROPES]


def head_width(family: str, wanted: int) -> int | None:
    """Return a head's width to ask for; None for families that have no choice."""
    return None if family in FIXED_WIDTH else wanted
