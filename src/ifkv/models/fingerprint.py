"""Fingerprint of a model: two models with equal fingerprints make equal document caches.

The fingerprint covers the architecture, the rope parameters, the dtype, the weights that keys and
values depend on, the classes of the modules, and the state that modules keep beside their weights
(`ifkv.models.module_state`).

Weights are sampled: ``SAMPLES`` elements of every tensor of the embeddings and decoder layers, one
from each of as many equal strata, at places that are spread over rows and columns. They are
compared exactly. A fine-tune or a merged LoRA changes nearly every element of the matrices that it
touches, and is noticed; so is the edit of one matrix. An edit of a few single weights may be
missed. The cost does not grow with the model's width: for 8 billion weights in 291 tensors it is
300,000 elements, 2.4 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ifkv.models.decoder import DecoderView
from ifkv.models.hooks import home_of
from ifkv.models.module_state import (
    State,
    is_foreign,
    is_quantized,
    module_state,
    settings_of,
    settle,
    weight_state,
)
from ifkv.models.weights import WeightSample, tree_of
from ifkv.models.wrappers import wrapper_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 3
SAMPLES = 1024
# Keys of a config that do not affect keys and values.
_IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
}


def fingerprint(model: PreTrainedModel) -> str:
    """Compute an identity of everything that a document cache depends on, except its tokens.

    Args:
        model: A causal language model.

    Returns:
        32 hex digits.
    """
    digest = hashlib.sha256()
    facts = _facts_of(model.config.to_dict())
    digest.update(json.dumps([VERSION, facts], sort_keys=True, default=str).encode())
    view = DecoderView(model)
    digest.update(repr(view.live_settings).encode())
    rotary = view.rotary
    # The current frequencies of a longrope module depend on its last forward.
    longrope = getattr(rotary, "rope_type", "default") == "longrope"
    inv_freq = rotary.original_inv_freq if longrope else rotary.inv_freq
    digest.update(inv_freq.detach().double().cpu().numpy().tobytes())
    digest.update(repr(getattr(rotary, "attention_scaling", 1.0)).encode())
    samples: list[Tensor] = []
    places: dict[tuple[int, torch.device], Tensor] = {}
    for name, tensor in _state_of(model):
        if isinstance(tensor, str):
            digest.update(f"{name}: {tensor};".encode())
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() > SAMPLES:
            at = (flat.numel(), flat.device)
            if at not in places:
                places[at] = torch.from_numpy(_places(flat.numel())).to(flat.device)
            flat = flat[places[at]]
        samples.append(flat.to(torch.float64))  # exact for every dtype
    # One transfer per device, not one per parameter.
    for device in dict.fromkeys(sample.device for sample in samples):
        held = [sample for sample in samples if sample.device == device]
        digest.update(torch.cat(held).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _facts_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config, and of the configs in it, that keys and values depend on."""
    facts = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    for name in ("text_config", "vision_config"):
        if isinstance(facts.get(name), dict):
            facts[name] = _facts_of(facts[name])
    return facts


def _state_of(model: PreTrainedModel) -> Iterator[State]:
    """Yield all state that the decoder stack computes with, except the rotary embedding.

    The state of a vision tower beside the stack comes behind it.
    """
    plain_tensors = _plain_tensors_count(model)
    found = [pair for root in _roots(model) for pair in root.named_modules()]
    for path, module in found:
        if "rotary_emb" in path:
            continue  # hashed by `fingerprint`; its other state changes with use
        kind: Any = type(module)
        # Another library may have replaced the forward of the class.
        yield path, f"{kind.__module__}.{kind.__qualname__} {home_of(kind.forward)}"
        if path:  # the settings of the root are those of its config
            for name, state in module_state(module, plain_tensors=plain_tensors):
                yield f"{path}.{name}", state
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is not None:
                yield from weight_state(weight, f"{path}.{name}")


def _roots(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the modules that documents are made by: the decoder stack, then what is beside it."""
    stack: torch.nn.Module = DecoderView(model).stack
    wrapper = wrapper_of(model)
    if wrapper is None:
        return [stack]
    beside = (child for child in wrapper.inner_of(model).children() if child is not stack)
    return [stack, *beside]


def _plain_tensors_count(model: PreTrainedModel) -> bool:
    """True if tensors that are plain attributes of a layer count as its weights."""
    return getattr(model.config, "quantization_config", None) is None


def _places(numel: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return ``SAMPLES`` indices into ``numel`` elements, one in each of as many equal strata."""
    edges = np.arange(SAMPLES + 1, dtype=np.int64) * numel // SAMPLES
    # Multiples of the golden ratio, modulo 1. Even steps would all fall into one column.
    fraction = np.arange(SAMPLES, dtype=np.int64) * 2654435769 % 2**32
    places: np.ndarray[tuple[int], np.dtype[np.int64]] = edges[:-1] + (
        fraction * np.diff(edges) >> 32
    )
    return places


class FingerprintCache:
    """Fingerprint of a model, computed again only if the weights may have changed.

    torch counts in-place changes of every parameter. Those counts and the addresses show most
    changes. Merging a LoRA writes through ``parameter.data``, which torch does not count, so a few
    elements of every parameter are sampled too.
    """

    def __init__(self) -> None:
        self._counts: tuple[object, ...] | None = None
        self._sample: WeightSample | None = None
        self._seen = b""
        self._kinds: tuple[type, ...] = ()
        self._foreign: list[int] = []
        self._quantized = False
        self._value = ""

    def of(self, model: PreTrainedModel, *, sample: bool = True) -> str:
        """Return the model's fingerprint.

        Args:
            model: The model.
            sample: Whether to read those elements. Later steps of a request need not.
        """
        parameters, counts = self._look(model)
        known = counts == self._counts
        if not known and self._quantized:
            settle(model)  # otherwise the next forward would change the weights' state
            parameters, counts = self._look(model)
            known = counts == self._counts
        if known and not sample:
            return self._value
        places = self._sample if known and self._sample is not None else WeightSample(parameters)
        seen = places.read(parameters)
        if not known or seen != self._seen:
            self._value = fingerprint(model)
            self._counts, self._sample, self._seen = counts, places, seen
        return self._value

    def _look(self, model: PreTrainedModel) -> tuple[list[Tensor], tuple[object, ...]]:
        """Return all tensors that the layers compute with, and a key that changes with them."""
        roots = _roots(model)
        modules = [module for root in roots for module in tree_of(root).modules]
        kinds = tuple(map(type, modules))
        if kinds != self._kinds:
            self._kinds = kinds
            # Indices: the modules themselves would keep their weights alive.
            self._foreign = [i for i, module in enumerate(modules) if is_foreign(module)]
            self._quantized = any(is_quantized(modules[i]) for i in self._foreign)
        foreign = [modules[i] for i in self._foreign]
        parameters = [each for root in roots for each in _parameters_of(root)]
        plain = _plain_tensors_count(model)
        for module in foreign:
            state = module_state(module, plain_tensors=plain)
            parameters += [part for _, part in state if isinstance(part, Tensor)]
        return parameters, (
            DecoderView(model).live_settings,
            kinds,
            *map(settings_of, foreign),
            *(
                # torch does not count changes of parameters made under torch.inference_mode().
                (p.data_ptr(), -1 if p.is_inference() else p._version)
                for p in parameters
            ),
        )


def _parameters_of(model: torch.nn.Module) -> list[Tensor]:
    """Return all parameters and buffers, or the tensors they wrap, in a stable order."""
    tree = tree_of(model)
    rotary: Any = getattr(model, "rotary_emb", None)
    found: list[Tensor] = []
    holders: list[Any] = [*tree.parameters, *(each for each in tree.buffers if each)]
    for held in holders:
        for weight in held.values():
            if type(weight) is torch.nn.Parameter:
                found.append(weight)
            elif weight is not None and (rotary is None or held is not rotary._buffers):
                found += [part for _, part in weight_state(weight) if isinstance(part, Tensor)]
    return found
