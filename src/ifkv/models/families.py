"""Model families: facts about an architecture, read from ``patches/*.toml``.

A family file states facts and contains no code: the model types it covers, the paths of the
classes, the layout of rotary embeddings, and hashes of the upstream code it was verified against.
``patches/README.md`` explains the keys and how to add a family.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING

from ifkv.errors import UnsupportedModelError
from ifkv.models.fact_file import check_read, parse_facts, patches
from ifkv.models.refusals import Refusal, refusals

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from transformers import PreTrainedModel


# Functions of a modeling file that its attention class calls.
FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward")

# Numbers outside of the layers: the embeddings and the logits are multiplied or divided by them,
# and logits x become c * tanh(x / c).
SCALARS = (
    "embeddings_multiplied_by",
    "logits_multiplied_by",
    "logits_divided_by",
    "logits_capped_by",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Facts about one family of decoder-only models.

    Attributes:
        name: The family's name, equal to the file's stem.
        model_types: Values of ``config.model_type`` in this family; of a model with a vision tower,
            those of its ``config.text_config``.
        examples: Names on the model hub of some of its models.
        attention_class: Dotted path of the attention module's class.
        layer_class: Dotted path of the decoder layer's class.
        model_class: Dotted path of the decoder stack's class (embeddings, layers, final norm).
        causal_lm_class: Dotted path of the class that adds the head to the stack.
        rotary_class: Dotted path of the rotary module's class.
        rope_layout: ``"half-split"`` (pairs are ``x[i], x[i + rotary_dim / 2]``).
        rope_types: Values of ``rope_parameters["rope_type"]`` whose keys can be moved exactly.
        qk_norm: How queries and keys are normalised before the rotation: ``"none"``,
            ``"per-head"``, ``"all-heads"`` (over all heads of a row together) or ``"by-config"``
            (per head if ``config.use_qk_norm``).
        fused_qkv: True if one projection makes queries, keys and values.
        sliding_window: ``"none"``, ``"layer-types"`` (per layer, by ``config.layer_types``) or
            ``"all-layers"`` (``config.sliding_window`` holds for every layer).
        experts: ``"none"``; ``"routed"`` (layers send each row to some of several experts) or
            ``"routed-in-float32"`` (they choose in float32 in a model of any dtype).
        attention_norm: Name of the norm in a layer that makes the input of its attention;
            ``"none"`` if the attention reads the residual stream itself.
        scalars: Numbers that upstream's forward applies outside of the layers: for each of
            `SCALARS` that it has, the path from the causal language model to the number.
        limits: What a user should know about these models, in sentences.
        verified_transformers: Releases of transformers that the tests ran on.
        upstream_hashes: For each of `upstream_paths`, its `source_hash` in every release of
            transformers whose code was read.
    """

    name: str
    model_types: tuple[str, ...]
    examples: tuple[str, ...]
    attention_class: str
    layer_class: str
    model_class: str
    causal_lm_class: str
    rotary_class: str
    rope_layout: str
    rope_types: tuple[str, ...]
    qk_norm: str
    fused_qkv: bool
    sliding_window: str
    experts: str
    attention_norm: str
    scalars: dict[str, str]
    limits: tuple[str, ...]
    verified_transformers: tuple[str, ...]
    upstream_hashes: dict[str, tuple[str, ...]]

    def function(self, name: str) -> str:
        """Return the dotted path of a function in the module of the attention class."""
        return f"{self.attention_class.rpartition('.')[0]}.{name}"

    @property
    def upstream_paths(self) -> tuple[str, ...]:
        """Return the dotted paths of all upstream code that ifkv relies on.

        They include functions, because two attention classes with equal code may call different
        ones. The functions rotate queries and keys, and compute the attention.
        """
        return (
            self.attention_class,
            self.layer_class,
            self.model_class,
            self.causal_lm_class,
            self.rotary_class,
            *map(self.function, FUNCTIONS),
        )


_CHOICES = {
    "rope_layout": ("half-split",),
    "scalars": SCALARS,
    "qk_norm": ("none", "per-head", "all-heads", "by-config"),
    "sliding_window": ("none", "layer-types", "all-layers"),
    "experts": ("none", "routed", "routed-in-float32"),
}


def parse_family(text: str, name: str) -> Family:
    """Validate the text of one family file.

    Args:
        text: TOML.
        name: The file's stem; becomes the family's name.

    Returns:
        The family.

    Raises:
        UnsupportedModelError: The text is not TOML; or a key is unknown, missing, or has a value
            of the wrong type.
    """
    family = Family(name=name, **parse_facts(text, Family, name, _CHOICES))
    check_read(family.upstream_paths, family.upstream_hashes, name)
    return family


def _folder() -> Traversable:
    """Return the folder of family files."""
    return patches()


@cache
def families() -> dict[str, Family]:
    """Read all families, by name.

    Raises:
        UnsupportedModelError: A file is malformed, or two families claim one model type.
    """
    found: dict[str, Family] = {}
    claimed: dict[str, str] = {}
    for entry in sorted(_folder().iterdir(), key=lambda e: e.name):
        if not entry.name.endswith(".toml"):
            continue
        family = parse_family(entry.read_text(encoding="utf-8"), entry.name.removesuffix(".toml"))
        for model_type in family.model_types:
            if model_type in claimed:
                raise UnsupportedModelError(
                    f"model type {model_type!r} is claimed by patches/{claimed[model_type]}.toml "
                    f"and patches/{family.name}.toml; remove it from one of them."
                )
            claimed[model_type] = family.name
        found[family.name] = family
    return found


def reasons() -> dict[str, Refusal]:
    """Return why ifkv does not work with the model types that are refused by name."""
    return refusals(_folder())


def describe(family: Family) -> str:
    """Return lines that say which models a family covers, with their limits."""
    examples = ", ".join(family.examples) or "no release"
    lines = [
        f"{', '.join(family.model_types)}: for example {examples}",
        f"  rope types {', '.join(family.rope_types)}; window {family.sliding_window}; "
        f"experts {family.experts}; tested on transformers "
        f"{', '.join(family.verified_transformers)}",
        *(f"  {limit}" for limit in family.limits),
    ]
    return "\n".join(lines)


def resolve_family(model: PreTrainedModel) -> Family:
    """Find the family of a model.

    Args:
        model: A causal language model from transformers.

    Raises:
        UnsupportedModelError: No family covers its ``config.model_type``.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"the model is of type {type(model).__name__}, but must be a loaded one; make it with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).eval()."
        )
    return family_of(config, type(model).__name__)


def family_of(config: object, name: str) -> Family:
    """Find the family of a model from its config alone.

    Args:
        config: The model's config.
        name: Name of the model, for the message.

    Raises:
        UnsupportedModelError: No family covers its ``model_type``, or that of the decoder inside.
    """
    decoder = getattr(config, "text_config", None) or config
    model_type = getattr(decoder, "model_type", None)
    for family in families().values():
        if model_type in family.model_types:
            return family
    if refusal := reasons().get(str(model_type)):
        raise UnsupportedModelError(
            f"{name} has model_type {model_type!r}, {refusal.sentence}. Answer with this model "
            "without ifkv, or choose one that `ifkv families` lists."
        )
    known = sorted(t for family in families().values() for t in family.model_types)
    raise UnsupportedModelError(
        f"{name} has model_type {model_type!r}, which no family covers; known are "
        f"{', '.join(known)}. To add one, write patches/<name>.toml (see patches/README.md) and "
        "check it with `ifkv verify`."
    )
