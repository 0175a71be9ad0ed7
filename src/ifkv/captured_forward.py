"""A forward of a fixed number of rows, captured in graphs that end at its attentions."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.forward import run_attention, run_layers
from ifkv.graph_recorder import Graph, Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.attention import AttentionPass


@dataclasses.dataclass(frozen=True, eq=False)
class _Cut:
    """A stretch up to an attention, and what it leaves for it."""

    graph: Graph
    layer_idx: int
    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    window: int | None


class _Cutting:
    """The attention pass of a capture: cuts at every attention, and attends to nothing.

    Attributes:
        cuts: Made so far.
        out: What every attention returns, ``[1, rows, heads, head_dim]``: the buffer that a
            replay's attention is copied to.

    Args:
        recorder: None for a trial run that records nothing.
        last: The layer whose attention is the last.
        out: None makes it.
    """

    def __init__(self, recorder: Recorder | None, last: int, out: Tensor | None = None):
        self._recorder = recorder
        self._last = last
        self.out = out
        self.cuts: list[_Cut] = []

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Nothing is kept."""
        return keys, values

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """End one graph and begin the next."""
        if self.out is None:
            self.out = torch.zeros_like(
                query.transpose(1, 2), memory_format=torch.contiguous_format
            )
        if self._recorder is not None:
            graph = self._recorder.end()
            self.cuts.append(_Cut(graph, layer_idx, query, keys, values, scaling, window))
            if layer_idx != self._last:
                self._recorder.begin()
        return self.out


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
        self.lock = threading.Lock()
        # Captured in whatever mode, replayed in any.
        with torch.inference_mode(False), torch.no_grad():
            self._hidden = hidden.new_zeros(1, size, hidden.shape[2])
            self._positions = positions.new_zeros(size)
            cos, sin = (part.new_ones(1, size, part.shape[2]) for part in rotation)
            self._rotation = cos, sin
            with recorder.recording():
                # Once without: libraries make their handles and choose their kernels.
                trial = _Cutting(None, last)
                self._forward(model, trial, last)
                assert trial.out is not None
                self._out = trial.out
                cutting = _Cutting(recorder, last, trial.out)
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
    ) -> Tensor:
        """Replay it for some rows, under a pass of theirs; see :func:`run_to_attention`."""
        rows = hidden.shape[1]
        self._hidden[:, :rows] = hidden
        self._positions[:rows] = positions
        for own, part in zip(self._rotation, rotation, strict=True):
            own[:, :rows] = part
        for cut in self._cuts:
            cut.graph.replay()
            keys, values = attention_pass.update(
                cut.keys[:, :, :rows], cut.values[:, :, :rows], cut.layer_idx
            )
            out = attention_pass.attend(
                cut.layer_idx,
                cut.query[:, :, :rows],
                keys,
                values,
                scaling=cut.scaling,
                window=cut.window,
            )
            self._out[:, :rows] = out
        # A copy: the next replay, perhaps another thread's, overwrites it.
        return self._entering[:, :rows].clone()
