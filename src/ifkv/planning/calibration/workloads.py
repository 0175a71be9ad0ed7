"""Pieces of work that are timed, on a few random layers of a model's shape."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.backends.norms import value_sizes
from ifkv.backends.spec import AttentionSpec
from ifkv.cache.stitch import stitch
from ifkv.cost import ModelShape
from ifkv.documents.cache import DocumentCache
from ifkv.forward.layers import run_layers
from ifkv.forward.passes import LayerCall
from ifkv.models.decoder import DecoderView
from ifkv.patching.handle import handle_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ifkv.backends.base import Backend

# Bytes of layers that take turns when few rows pass through, so that weights are read from memory
# and not from a cache that a whole model would not fit into.
TURNING_BYTES = 192 * 2**20
# Bytes of a matrix that is larger than any cache, for one row.
HEAD_BYTES = 128 * 2**20
VOCABULARY = 64


def few_layers(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, shape: ModelShape
) -> PreTrainedModel:
    """Build a random model with a few layers of the same shape and a tiny vocabulary."""
    from transformers import AutoModelForCausalLM

    layer_bytes = shape.held_parameters * shape.element_size
    depth = max(1, min(shape.num_layers, math.ceil(TURNING_BYTES / layer_bytes)))
    small: Any = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = depth, VOCABULARY
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, token, None)
    if getattr(small, "layer_types", None) is not None:
        small.layer_types = small.layer_types[:depth]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation="sdpa")
    done: PreTrainedModel = model.eval().requires_grad_(False)
    return done


class Workloads:
    """Pieces of work that are timed.

    Args:
        model: A model that `few_layers` built, patched.
        shape: The whole model's shape.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape):
        self.model = model
        self.shape = shape
        self.handle = handle_of(model)
        self.backend: Backend = self.handle.backend
        self.depth = model.config.num_hidden_layers
        self.spec = AttentionSpec(shape.head_dim**-0.5)
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *size: int) -> Tensor:
        """Return normally distributed numbers on the device, in the model's dtype."""
        drawn = torch.randn(size, generator=self._generator)
        return drawn.to(self.model.device, self.model.dtype)

    def heads(self, rows: int) -> Tensor:
        """Return random queries ``[1, heads, rows, head_dim]``."""
        return self.random(1, self.shape.heads, rows, self.shape.head_dim)

    def kv(self, rows: int) -> Tensor:
        """Return random keys or values ``[1, kv_heads, rows, head_dim]``."""
        return self.random(1, self.shape.kv_heads, rows, self.shape.head_dim)

    def through_layers(self, rows: int) -> tuple[Callable[[], object], int]:
        """Return a run of rows through layers without attention, and the number of layers."""
        # Many rows reuse every weight, wherever it comes from: one layer will do.
        depth = self.depth if rows <= 16 else 1
        hidden = self.random(1, rows, self.shape.hidden_size)
        positions = torch.arange(rows, device=self.model.device)
        rotation = self.handle.rope.rotation(positions, hidden.dtype)
        run = _NoAttention(positions, self.kv(rows), self.kv(rows))
        return lambda: run_layers(self.model, hidden, positions, rotation, run, depth), depth

    def prefill_attention(self, tokens: int) -> Callable[[], object]:
        """Return a run of the attention that an unpatched model uses in a prefill."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        module = DecoderView(self.model).layers[0].self_attn
        query, keys, values = self.heads(tokens), self.kv(tokens), self.kv(tokens)
        return lambda: attend(module, query, keys, values, None, scaling=self.spec.scaling)

    def rows_attention(self, context: int, share: float) -> tuple[Callable[[], object], float]:
        """Return a run of attention for rows at random slots, and the (row, key) pairs it needs."""
        rows = max(1, round(share * context))
        slots = torch.randperm(context, generator=self._generator)[:rows].sort().values
        plan = self.backend.plan_requests([slots], [context], self.model.device)
        query, keys, values = self.heads(rows), self.kv(context), self.kv(context)

        def run() -> object:
            return self.backend.attend_requests(query, [keys], [values], plan, self.spec)

        return run, float((slots + 1).sum())

    def query_attention(
        self, context: int, query_length: int
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return a run of attention for query tokens over a context, and a run of their norms."""
        device = self.model.device
        positions = torch.arange(context + query_length, device=device)
        plan = self.backend.plan_queries([positions[context:]], [positions[:context]])
        query, own_keys, own_values = (
            self.heads(query_length),
            self.kv(query_length),
            self.kv(query_length),
        )
        keys, values = self.kv(context), self.kv(context)
        logsumexp = torch.full(
            (1, self.shape.heads, query_length), math.log(context), device=device
        )

        def attend() -> object:
            return self.backend.attend_queries(
                query, own_keys, own_values, [keys], [values], plan, self.spec
            )

        def norm() -> object:
            return self.backend.attention_norm(
                query, keys, logsumexp, plan.parts[0], self.spec, reduction="l2"
            )

        return attend, norm

    def stitching(self, documents: int, tokens: int) -> tuple[Callable[[], object], int]:
        """Return a run that stitches documents, and the bytes of their keys and values."""
        made = [self.document(tokens // documents) for _ in range(documents)]
        return lambda: stitch(self.model, made), sum(part.nbytes for part in made)

    def document(self, tokens: int) -> DocumentCache:
        """Return a random document of the model."""
        size = (self.depth, self.shape.kv_heads, tokens, self.shape.head_dim)
        nothing = torch.zeros(0, dtype=torch.long)
        ids = torch.randint(0, VOCABULARY, (tokens,), generator=self._generator)
        identity = self.handle.identity(self.model)
        return DocumentCache(ids, nothing, self.random(*size), self.random(*size), identity)

    def value_sizes(self, tokens: int) -> tuple[Callable[[], object], int]:
        """Return a run that takes the norms of a context's values, and the bytes of the values."""
        values = self.kv(tokens)
        return lambda: value_sizes(values), values.nbytes

    def head(self) -> tuple[Callable[[], object], int]:
        """Return a run that multiplies one row by a large matrix, and the bytes of the matrix."""
        columns = self.shape.hidden_size
        rows = max(1, min(self.shape.vocabulary, HEAD_BYTES // columns // self.shape.element_size))
        weight, row = self.random(rows, columns), self.random(1, 1, columns)
        return lambda: torch.nn.functional.linear(row, weight), weight.nbytes

    def to_device(self) -> tuple[Callable[[], object], int]:
        """Return a run that copies host memory to the device, and the bytes copied."""
        rows = torch.zeros(64 * 2**20, dtype=torch.uint8)
        return lambda: rows.to(self.model.device), rows.nbytes


class _NoAttention:
    """Attention of a layer that does nothing: it writes keys and values and returns the queries."""

    def __init__(self, slots: Tensor, keys: Tensor, values: Tensor):
        self._slots, self._keys, self._values = slots, keys, values

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        self._keys.index_copy_(2, self._slots, keys)
        self._values.index_copy_(2, self._slots, values)
        return keys, values

    def attend(self, call: LayerCall) -> Tensor:
        return call.query.transpose(1, 2)


def ascending(sizes: Sequence[int], limit: int) -> list[int]:
    """Return the sizes up to a limit; the limit alone if there is none."""
    return [size for size in sizes if size <= limit] or [limit]
