"""Forward of a fixed number of rows, captured in graphs between one attention and the next."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.forward.layers import run_attention, run_layers
from ifkv.forward.passes import LayerCall
from ifkv.forward.recorder import Graph, Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.backends.spec import AttentionSpec
    from ifkv.forward.passes import AttentionPass


class _Buffers:
    """Buffers for the inputs and the output of attention, shared by all layers.

    Attributes:
        query: ``[1, heads, rows, head_dim]``, with the heads of a row adjacent in memory.
        keys: ``[1, kv_heads, rows, head_dim]``, in the same memory layout.
        values: ``[1, kv_heads, rows, head_dim]``, in the same memory layout.
        out: ``[1, rows, heads, head_dim]``.
    """

    def __init__(self, query: Tensor, keys: Tensor):
        def rows(like: Tensor) -> Tensor:
            _, heads, count, head_dim = like.shape
            return like.new_zeros(1, count, heads, head_dim)

        self.query = rows(query).transpose(1, 2)
        self.keys, self.values = (rows(keys).transpose(1, 2) for _ in range(2))
        self.out = rows(query)

    def take(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy the queries, keys and values of a layer into the buffers."""
        self.query.copy_(query)
        self.keys.copy_(keys)
        self.values.copy_(values)


@dataclasses.dataclass(frozen=True, eq=False)
class _Segment:
    """Graph that ends at an attention, with the layer and the spec of that attention."""

    graph: Graph
    layer_idx: int
    spec: AttentionSpec


class _CapturePass:
    """Attention pass of a capture: it ends a graph at every attention and computes none.

    Attributes:
        segments: The graphs so far.
        buffers: Buffers of the attentions; allocated at the first if not given.

    Args:
        recorder: The recorder; None for a trial run without graphs.
        last: Last layer whose attention is run.
        buffers: As the attribute.
    """

    def __init__(self, recorder: Recorder | None, last: int, buffers: _Buffers | None = None):
        self._recorder = recorder
        self._last = last
        self.buffers = buffers
        self.segments: list[_Segment] = []

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values; nothing is kept."""
        return keys, values

    def attend(self, call: LayerCall) -> Tensor:
        """End this graph and begin the next."""
        if self.buffers is None:
            self.buffers = _Buffers(call.query, call.keys)
        self.buffers.take(call.query, call.keys, call.values)
        if self._recorder is not None:
            graph = self._recorder.end()
            self.segments.append(_Segment(graph, call.layer_idx, call.spec))
            if call.layer_idx != self._last:
                self._recorder.begin()
        return self.buffers.out


class Captured:
    """Captured forward of a fixed number of rows, up to the attention of one layer.

    Args:
        model: A patched model.
        recorder: Captures the graphs.
        size: Number of rows.
        last: Last layer whose attention is run.
        hidden: Hidden states of some rows; only their shape and dtype are used.
        positions: Positions of some rows; only their shape and dtype are used.
        rotation: Cosines and sines of some rows; only their shape and dtype are used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recorder: Recorder,
        size: int,
        last: int,
        hidden: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
    ):
        self._lock = threading.Lock()
        self._running: int | None = None  # id of the thread that replays
        # The buffers must be writable in every mode, whatever mode captures.
        with torch.inference_mode(False), torch.no_grad():
            self._hidden = hidden.new_zeros(1, size, hidden.shape[2])
            self._positions = positions.new_zeros(*positions.shape[:-1], size)
            cos, sin = (part.new_ones(1, size, part.shape[2]) for part in rotation)
            self._rotation = cos, sin
            with recorder.recording():
                # A trial run first: libraries make handles and choose kernels at their first call.
                trial = _CapturePass(None, last)
                self._forward(model, trial, last)
                assert trial.buffers is not None
                self._buffers = trial.buffers
                capture = _CapturePass(recorder, last, trial.buffers)
                recorder.begin()
                self._entering = self._forward(model, capture, last)
        self._segments = capture.segments

    def _forward(self, model: PreTrainedModel, attention_pass: _CapturePass, last: int) -> Tensor:
        rows = self._positions, self._rotation, attention_pass, last
        entering = run_layers(model, self._hidden, *rows)
        run_attention(model, entering, *rows)
        return entering

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_pass: AttentionPass,
    ) -> Tensor | None:
        """Replay the forward for some rows; see `Captures.run`.

        Threads wait for each other, as their work on the GPU would. So no result depends on other
        requests.

        Returns:
            The input of the last layer; None if this thread is already replaying this forward.
        """
        if self._running == threading.get_ident():
            return None
        with self._lock:
            self._running = threading.get_ident()
            try:
                return self._run(hidden, positions, rotation, attention_pass)
            finally:
                self._running = None

    def _run(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_pass: AttentionPass,
    ) -> Tensor:
        rows = hidden.shape[1]
        self._hidden[:, :rows] = hidden
        self._positions[..., :rows] = positions
        for own, part in zip(self._rotation, rotation, strict=True):
            own[:, :rows] = part
        held = self._buffers
        query, keys, values = (x[:, :, :rows] for x in (held.query, held.keys, held.values))
        for segment in self._segments:
            segment.graph.replay()
            taken = attention_pass.update(keys, values, segment.layer_idx)
            held.out[:, :rows] = attention_pass.attend(
                LayerCall(segment.layer_idx, query, *taken, segment.spec)
            )
        # A copy, because the next replay overwrites the buffer, perhaps in another thread.
        return self._entering[:, :rows].clone()
