"""What decides a document's keys and values, condensed into one identity.

Two models with one fingerprint compute the same cache from the same tokens. It covers the
architecture and rope parameters, the dtype, and the weights that keys and values depend on.

Weights are sampled, not read whole: from every parameter of the embeddings and decoder layers,
``SAMPLES`` elements spread evenly. A fine-tune or a merged LoRA moves nearly every element of the
matrices it touches and is caught; editing single weights by hand may not be. The cost is a few
milliseconds, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
SAMPLES = 256

# What a config says beyond the computation of keys and values.
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
    """Identity of everything that a document cache depends on but its tokens.

    Args:
        model: A causal language model.

    Returns:
        32 hex digits.
    """
    digest = hashlib.sha256()
    config: dict[str, Any] = model.config.to_dict()
    facts = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    digest.update(json.dumps([VERSION, facts], sort_keys=True, default=str).encode())
    base: Any = model.base_model
    rotary = base.rotary_emb
    # A longrope module's current frequencies are those of the last forward.
    longrope = getattr(rotary, "rope_type", "default") == "longrope"
    inv_freq = rotary.original_inv_freq if longrope else rotary.inv_freq
    digest.update(inv_freq.detach().double().cpu().numpy().tobytes())
    samples: list[Tensor] = []
    for name, parameter in base.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        samples.append(flat[::step][: SAMPLES + 1].to(torch.float32))
    # One transfer for all parameters, not one each.
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


class FingerprintCache:
    """A model's fingerprint, made again only when its weights may have changed.

    torch counts in-place changes of every parameter; those counts, with the addresses, are the
    key. Changes made behind torch's back through ``parameter.data`` are not counted: after such a
    merge call :func:`ifkv.patch` anew.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int], ...] | None = None
        self._value = ""

    def of(self, model: PreTrainedModel) -> str:
        """The model's fingerprint."""
        key = tuple(
            # Parameters made under torch.inference_mode() are not counted either.
            (p.data_ptr(), -1 if p.is_inference() else p._version)
            for p in model.base_model.parameters()
        )
        if key != self._key:
            self._value = fingerprint(model)
            self._key = key
        return self._value
