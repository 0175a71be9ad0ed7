"""Run a few rows up to an attention from CUDA graphs, instead of launching kernel by kernel.

A question's rows keep a card busy for less time than the processor takes to launch their forward,
some forty kernels a layer. Between one attention and the next every row is computed by itself,
whatever else is asked and whatever the cache holds. So these stretches are captured once for a
number of rows, with the model's own modules, and replayed; attention is launched as ever, between
them. Fewer rows run in the graphs of the next larger number; what the others compute is not read.

A graph holds the addresses of weights and what the modules did when it was captured. It serves only
as long as both are what they were. Modules that do more than their class says (hooks, a ``forward``
of their own, compiled or quantized layers) are called, not captured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ifkv.forward import run_attention, run_layers
from ifkv.module_tree import tree_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from ifkv.attention import AttentionPass

_log = logging.getLogger("ifkv")

# Rows that stretches are captured for. More of them keep a card busy for as long as they take to
# launch.
SIZES = (16, 32, 64, 128)
# Captures kept for one model; each holds some tens of MB of a large one.
KEPT = 8


class Graph(Protocol):
    """Launches that can be repeated; the tests have another than CUDA's."""

    def replay(self) -> None:
        """Launch them again, on the current stream."""


class Recorder(Protocol):
    """Cuts what is launched into graphs, which are replayed in the order they were made."""

    def recording(self) -> AbstractContextManager[None]:
        """Where :meth:`begin` and :meth:`end` may be called."""
        ...

    def begin(self) -> None:
        """From here on, launches are noted and not made."""

    def end(self) -> Graph:
        """The launches since :meth:`begin`."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory.

    Args:
        device: The card.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._open: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """See :meth:`Recorder.recording`; on a stream of its own, as captures have to be."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                try:
                    yield
                except BaseException:
                    if self._open is not None:
                        self._abandon()
                    raise
        finally:
            outside.wait_stream(self._stream)

    def begin(self) -> None:
        """See :meth:`Recorder.begin`."""
        self._open = torch.cuda.CUDAGraph()
        # What other threads do on the card meanwhile is no concern of this capture.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        """See :meth:`Recorder.end`."""
        graph, self._open = self._open, None
        assert graph is not None
        graph.capture_end()
        return graph

    def _abandon(self) -> None:
        with contextlib.suppress(RuntimeError):  # broken by what is being raised
            self.end()


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


class _Captured:
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
                self._forward(model, cutting, last)
        self._cuts = cutting.cuts

    def _forward(self, model: PreTrainedModel, attention_pass: _Cutting, last: int) -> None:
        rows = self._positions, self._rotation, attention_pass, last
        run_attention(model, run_layers(model, self._hidden, *rows), *rows)

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_pass: AttentionPass,
    ) -> None:
        """Replay it for some rows, under a pass of theirs; see :func:`run_attention`."""
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


class Captures:
    """The captured forwards of one model.

    Args:
        device: Where the model lies.
        make_recorder: Called for every capture.
    """

    def __init__(
        self,
        device: torch.device,
        make_recorder: Callable[[torch.device], Recorder] = CudaRecorder,
    ):
        self._device = device
        self._make_recorder = make_recorder
        self._lock = threading.Lock()
        self._held: Hashable = None
        self._captured: dict[Hashable, _Captured] = {}
        self._refused = False

    def run(
        self,
        model: PreTrainedModel,
        hidden: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_pass: AttentionPass,
        last: int,
    ) -> bool:
        """Run rows through the layers up to the attention of one, if graphs can.

        Args:
            model: A patched model.
            hidden: What the first layer is given, ``[1, rows, hidden]``.
            positions: As in :func:`run_layers`.
            rotation: As in :func:`run_layers`.
            attention_pass: The pass; what it is shown of a layer lasts until the next.
            last: The layer.

        Returns:
            Whether they have been run. If not, nothing has been done: there are too many rows, the
            modules cannot be captured, or another thread is using the graphs.
        """
        size = next((size for size in SIZES if hidden.shape[1] <= size), None)
        if size is None or hidden.device != self._device:
            return False
        if torch.is_autocast_enabled(hidden.device.type):
            return False
        held = _what_graphs_hold(model)
        if held is None:
            return False
        with self._lock:
            if held != self._held:
                self._captured.clear()
                self._held, self._refused = held, False
            captured = self._find(model, size, last, (hidden, positions, rotation))
        if captured is None or not captured.lock.acquire(blocking=False):
            return False
        try:
            captured.run(hidden, positions, rotation, attention_pass)
        finally:
            captured.lock.release()
        return True

    def _find(
        self,
        model: PreTrainedModel,
        size: int,
        last: int,
        rows: tuple[Tensor, Tensor, tuple[Tensor, Tensor]],
    ) -> _Captured | None:
        """The captured forward of this size, made if there is none; None if that has failed."""
        key = (size, last, rows[0].dtype, _stream(self._device))
        if key not in self._captured and not self._refused:
            recorder = self._make_recorder(self._device)
            try:
                captured = _Captured(model, recorder, size, last, *rows)
            except RuntimeError as error:
                self._refused = True
                _log.warning(
                    "ifkv: the layers of this %s cannot be captured in CUDA graphs, so choosing "
                    "tokens takes longer: %s",
                    type(model).__name__,
                    error,
                )
                return None
            if len(self._captured) >= KEPT:
                del self._captured[next(iter(self._captured))]
            self._captured[key] = captured
        return self._captured.get(key)


def _what_graphs_hold(model: PreTrainedModel) -> Hashable:
    """Where the layers' weights lie and what their classes compute; None if that is not all."""
    if torch_module._has_any_global_hook():
        return None
    base: Any = model.base_model
    tree = tree_of(base.layers)
    for module in tree.modules:
        own = module.__dict__  # found sooner there than by module.…, of four hundred modules
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_buffers"]  # a quantized layer's, as a rule
            or "forward" in own
            or own.get("_compiled_call_impl") is not None
        ):
            return None
    addresses = []
    for held in tree.parameters:
        for parameter in held.values():
            if type(parameter) is nn.Parameter:
                addresses.append(parameter.data_ptr())
            elif parameter is not None:
                return None
    kinds = {type(module) for module in tree.modules}
    return tuple(addresses), frozenset(kind.forward for kind in kinds)


def _stream(device: torch.device) -> Hashable:
    """What orders launches: graphs must not be replayed from two streams at once."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
