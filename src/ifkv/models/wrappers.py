"""Wrappers: models that put a vision tower beside a decoder, read from ``patches/wrappers/*.toml``.

A family file describes the decoder. A wrapper file describes what is around it: how pictures become
rows of the first layer, and where these rows stand. A wrapper that no file names is refused,
because it may scale embeddings or let the tokens of a picture see what comes behind them.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any

from ifkv.errors import UnsupportedModelError
from ifkv.models.fact_file import check_read, parse_facts, patches

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from torch import nn
    from transformers import PreTrainedModel

# Methods of the inner class by which pictures become rows and positions.
METHODS = ("get_image_features", "get_rope_index")


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """Facts about one kind of vision-language model.

    Attributes:
        name: The wrapper's name, equal to the file's stem.
        model_types: Values of ``config.model_type``.
        decoders: Values of ``config.text_config.model_type`` that it was read with.
        outer_class: Dotted path of the class with the language-model head.
        inner_class: Dotted path of the class that joins tower and decoder.
        inner: Path of the inner module in the outer one.
        tower: Path of the vision tower in the outer module.
        inputs: Names of what its image processor returns, the pixels first.
        image_token: Name of the config's entry with the placeholder of pictures.
        rope_axes: Number of axes of a position.
        rope_sections: Which frequencies belong to which axis: ``"runs"`` (one run for each, by
            ``mrope_section``) or ``"interleaved"`` (every third, up to its section's end).
        deepstack: True if levels of the tower are added behind the decoder's first layers.
        since: First release of transformers in which its pictures can be moved.
        verified_transformers: Releases of transformers that the tests ran on.
        upstream_hashes: For each of `upstream_paths`, as in a family file.
    """

    name: str
    model_types: tuple[str, ...]
    decoders: tuple[str, ...]
    outer_class: str
    inner_class: str
    inner: str
    tower: str
    inputs: tuple[str, ...]
    image_token: str
    rope_axes: int
    rope_sections: str
    deepstack: bool
    since: str
    verified_transformers: tuple[str, ...]
    upstream_hashes: dict[str, tuple[str, ...]]

    @property
    def description(self) -> str:
        """Return what `ifkv families` says about it, in two lines."""
        return (
            f"{', '.join(self.model_types)}: a vision tower beside {', '.join(self.decoders)}\n"
            f"  pictures in the steps, not in sessions, stores or on the command line; from "
            f"transformers {self.since} on, tested on {', '.join(self.verified_transformers)}"
        )

    @property
    def upstream_paths(self) -> tuple[str, ...]:
        """Return the dotted paths of all upstream code around the decoder."""
        methods = [f"{self.inner_class}.{method}" for method in METHODS]
        return self.outer_class, self.inner_class, *methods

    def inner_of(self, model: PreTrainedModel) -> Any:
        """Return the module that joins tower and decoder."""
        return model.get_submodule(self.inner)

    def tower_of(self, model: PreTrainedModel) -> nn.Module:
        """Return the vision tower."""
        return model.get_submodule(self.tower)

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Return the token id that stands for one row of a picture."""
        found: int = getattr(model.config, self.image_token)
        return found


_CHOICES = {"rope_sections": ("runs", "interleaved")}


def parse_wrapper(text: str, name: str) -> Wrapper:
    """Validate the text of one wrapper file.

    Args:
        text: TOML.
        name: The file's stem; becomes the wrapper's name.

    Raises:
        UnsupportedModelError: As of `ifkv.models.families.parse_family`.
    """
    where = f"wrappers/{name}"
    wrapper = Wrapper(name=name, **parse_facts(text, Wrapper, where, _CHOICES))
    check_read(wrapper.upstream_paths, wrapper.upstream_hashes, where)
    return wrapper


def _folder() -> Traversable:
    return patches() / "wrappers"


@cache
def wrappers() -> dict[str, Wrapper]:
    """Read all wrappers, by name.

    Raises:
        UnsupportedModelError: A file is malformed.
    """
    found = {}
    for entry in sorted(_folder().iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            name = entry.name.removesuffix(".toml")
            found[name] = parse_wrapper(entry.read_text(encoding="utf-8"), name)
    return found


def wrapper_of(model: PreTrainedModel) -> Wrapper | None:
    """Return the wrapper of a model; None if the model is a decoder with its head alone.

    Raises:
        UnsupportedModelError: The model wraps a decoder, and no file covers how it does.
    """
    config: Any = model.config
    text = getattr(config, "text_config", None)
    if text is None:
        return None
    known = {each: wrapper for wrapper in wrappers().values() for each in wrapper.model_types}
    found = known.get(config.model_type)
    if found is None or text.model_type not in found.decoders:
        raise UnsupportedModelError(
            f"this {type(model).__name__} (model_type {config.model_type!r}) wraps a decoder of "
            f"type {text.model_type!r} in a way that no wrapper file covers; known are "
            f"{', '.join(sorted(known))}. It may scale embeddings or let the tokens of a picture "
            "see what is behind them, so documents of it could be wrong. For text alone, use a "
            "model without a vision tower."
        )
    return found
