"""A forward of a fixed number of rows, captured in graphs that end at its attentions."""

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


class _Room:
    """What attentions take and return, in the same memory in all layers.

    Attributes:
        query: ``[1, heads, rows, head_dim]``, a row's heads beside each other.
        keys: ``[1, kv_heads, rows, head_dim]``, laid out as the query.
        values: As the keys.
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
        """Copy a layer's in."""
        self.query.copy_(query)
        self.keys.copy_(keys)
        self.values.copy_(values)


@dataclasses.dataclass(frozen=True, eq=False)
class _Cut:
    """A stretch up to an attention, and how that is to be run."""

    graph: Graph
    layer_idx: int
    spec: AttentionSpec


class _Cutting:
    """The attention pass of a capture: cuts at every attention, and attends to nothing.

    Attributes:
        cuts: Made so far.
        room: Where stretches leave what their attention takes; made at the first.

    Args:
        recorder: None for a trial run that records nothing.
        last: The layer whose attention is the last.
        room: None makes it.
    """

    def __init__(self, recorder: Recorder | None, last: int, room: _Room | None = None):
        self._recorder = recorder
        self._last = last
        self.room = room
        self.cuts: list[_Cut] = []

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Nothing is kept."""
        return keys, values

    def attend(self, call: LayerCall) -> Tensor:
        """End one graph and begin the next."""
        if self.room is None:
            self.room = _Room(call.query, call.keys)
        self.room.take(call.query, call.keys, call.values)
        if self._recorder is not None:
            graph = self._recorder.end()
            self.cuts.append(_Cut(graph, call.layer_idx, call.spec))
            if call.layer_idx != self._last:
                self._recorder.begin()
        return self.room.out


class Captured:
    """A forward of some number of rows, up to an attention, cut at its attentions.

    Args:
        model: A patched model.
        recorder: Captures it.
        size: The number of rows.
        last: The layer whose attention is the last.
        hidden: Of some rows, whose shape and dtype are taken.
        positions: As hidden.
        rotation: As hidden.
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
        self._running: int | None = None  # the thread that is
        # Captured in whatever mode, replayed in any.
        with torch.inference_mode(False), torch.no_grad():
            self._hidden = hidden.new_zeros(1, size, hidden.shape[2])
            self._positions = positions.new_zeros(*positions.shape[:-1], size)
            cos, sin = (part.new_ones(1, size, part.shape[2]) for part in rotation)
            self._rotation = cos, sin
            with recorder.recording():
                # Once without: libraries make their handles and choose their kernels.
                trial = _Cutting(None, last)
                self._forward(model, trial, last)
                assert trial.room is not None
                self._room = trial.room
                cutting = _Cutting(recorder, last, trial.room)
                recorder.begin()
                self._entering = self._forward(model, cutting, last)
        self._cuts = cutting.cuts

    def _forward(self, model: PreTrainedModel, attention_pass: _Cutting, last: int) -> Tensor:
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
        """Replay it for some rows, under a pass of theirs; see `Captures.run`.

        Threads wait for each other, as their work would on the card: so nobody's numbers depend on
        who else asks. None if this thread is replaying it already.
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
        room = self._room
        query, keys, values = (x[:, :, :rows] for x in (room.query, room.keys, room.values))
        for cut in self._cuts:
            cut.graph.replay()
            taken = attention_pass.update(keys, values, cut.layer_idx)
            room.out[:, :rows] = attention_pass.attend(
                LayerCall(cut.layer_idx, query, *taken, cut.spec)
            )
        # A copy: the next replay, perhaps another thread's, overwrites it.
        return self._entering[:, :rows].clone()
