"""Run a few rows from CUDA graphs, instead of launching kernel by kernel.

The rows of a question, of a short turn, or of one new token for each request of a batch keep a card
busy for less time than the processor takes to launch their forward, some forty kernels a layer.
Between one attention and the next every row is computed by itself, whatever the cache holds. So
these stretches are captured once for a number of rows, with the model's own modules, and replayed;
attention is launched as ever, between them. Fewer rows run in the graphs of the next larger number;
what the others compute is not read.

A graph holds the addresses of weights and what the modules did when it was captured. It serves only
as long as both are what they were. Modules that do more than their class says (hooks, a ``forward``
of their own, compiled or quantized layers) are called, not captured.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ifkv.forward.captured import Captured
from ifkv.forward.layers import run_attention, run_layers
from ifkv.forward.recorder import CudaRecorder, Recorder
from ifkv.models.decoder import DecoderView
from ifkv.models.module_state import is_foreign, settings_of
from ifkv.models.weights import tree_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.forward.passes import AttentionPass

_log = logging.getLogger("ifkv")

# Rows that stretches are captured for. Of a model of 8 billion weights, twice as many keep an H100
# busy for as long as they take to launch.
SIZES = (16, 32, 64, 128, 256, 512)
# Captures kept for one model; each holds what one layer's rows take, 50 MB of 512 of a large one.
KEPT = 8


def run_to_attention(
    model: PreTrainedModel,
    graphs: Captures | None,
    hidden: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    attention_pass: AttentionPass,
    layer_idx: int,
) -> Tensor:
    """Run rows from the first layer up to the attention of one, in graphs if there are any.

    What `run_layers` and then `run_attention` do.

    Args:
        model: A patched model.
        graphs: The model's, if it has any.
        hidden: What the first layer is given, ``[1, rows, hidden]``.
        positions: As in `run_layers`.
        rotation: As in `run_layers`.
        attention_pass: The pass.
        layer_idx: The layer.

    Returns:
        The hidden states that the layer was given, ``[1, rows, hidden]``.
    """
    rows = positions, rotation, attention_pass, layer_idx
    entering = None if graphs is None else graphs.run(model, hidden, *rows)
    if entering is None:
        entering = run_layers(model, hidden, *rows)
        run_attention(model, entering, *rows)
    return entering


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
        self._captured: dict[Hashable, Captured] = {}
        self._refused = False

    def run(
        self,
        model: PreTrainedModel,
        hidden: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_pass: AttentionPass,
        last: int,
    ) -> Tensor | None:
        """Run rows through the layers up to the attention of one, if graphs can.

        Args:
            model: A patched model.
            hidden: What the first layer is given, ``[1, rows, hidden]``.
            positions: As in `run_layers`.
            rotation: As in `run_layers`.
            attention_pass: The pass; what it is shown of a layer lasts until the next.
            last: The layer.

        Returns:
            What that layer was given, ``[1, rows, hidden]``. If None, nothing has been done: the
            rows are too many, the modules cannot be captured, or the pass has been begun from
            within another one of this thread.
        """
        size = next((size for size in SIZES if hidden.shape[1] <= size), None)
        if size is None or hidden.device != self._device:
            return None
        if torch.is_autocast_enabled(hidden.device.type):
            return None
        held = _what_graphs_hold(model)
        if held is None:
            return None
        rows = positions, rotation
        with self._lock:
            if held != self._held:
                self._captured.clear()
                self._held, self._refused = held, False
            captured = self._find(model, size, last, hidden, *rows)
        return None if captured is None else captured.run(hidden, *rows, attention_pass)

    def _find(
        self,
        model: PreTrainedModel,
        size: int,
        last: int,
        hidden: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> Captured | None:
        """The captured forward of this size, made if there is none; None if that has failed."""
        key = (size, last, hidden.dtype, _stream(self._device))
        if key not in self._captured and not self._refused:
            recorder = self._make_recorder(self._device)
            try:
                captured = Captured(model, recorder, size, last, hidden, positions, rotation)
            except RuntimeError as error:
                self._refused = True
                _log.warning(
                    "ifkv: the layers of this %s cannot be captured in CUDA graphs, so few rows "
                    "take longer than they could: %s",
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
    tree = tree_of(DecoderView(model).stack.layers)
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
    settings = [settings_of(module) for module in tree.modules if is_foreign(module)]
    forwards = frozenset(kind.forward for kind in kinds)
    return tuple(addresses), forwards, tuple(settings), DecoderView(model).live_settings


def _stream(device: torch.device) -> Hashable:
    """What orders launches: graphs must not be replayed from two streams at once."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
