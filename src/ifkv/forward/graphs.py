"""Graph runner: run few rows from CUDA graphs instead of launching every kernel.

The rows of a question, of a short turn, or of one decoding step of a batch keep a GPU busy for less
time than the CPU needs to launch their forward, some forty kernels a layer. Between one attention
and the next, every row is computed independently of the cache. So these segments are captured once
for a number of rows, with the model's own modules, and then replayed. Attention is launched between
them as usual. Fewer rows run in the graphs of the next larger number; the results of the unused
rows are ignored.

A graph contains the addresses of weights, and the work of the modules at the time of the capture.
It is valid only while both are unchanged. Layers with hooks or a replaced ``forward``, and compiled
or quantized layers, are called and not captured. Nor are layers with experts: a graph would replay
the launches that the captured rows' experts needed.
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
    from ifkv.forward.picture_rows import PictureRows

_log = logging.getLogger("ifkv")

# Numbers of rows with graphs. With a model of 8 billion weights, twice as many rows as the largest
# keep an H100 busy for as long as their launch takes.
SIZES = (16, 32, 64, 128, 256, 512)
# Captures kept for one model. Each has buffers for one layer: 50 MB for 512 rows of a large model.
KEPT = 8


def run_to_attention(
    model: PreTrainedModel,
    graphs: Captures | None,
    hidden: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    attention_pass: AttentionPass,
    layer_idx: int,
    pictures: PictureRows | None = None,
) -> Tensor:
    """Run rows from the first layer up to the attention of one, in graphs if possible.

    The result is that of `run_layers` followed by `run_attention`.

    Args:
        model: A patched model.
        graphs: The graphs of the model, if it has any.
        hidden: Input of the first layer, ``[1, rows, hidden]``.
        positions: As in `run_layers`.
        rotation: As in `run_layers`.
        attention_pass: The pass.
        layer_idx: Last layer whose attention is run.
        pictures: As in `run_layers`; rows of pictures do not run in graphs.

    Returns:
        The input of that layer, ``[1, rows, hidden]``.
    """
    rows = positions, rotation, attention_pass, layer_idx
    entering = None
    if graphs is not None and pictures is None:
        entering = graphs.run(model, hidden, *rows)
    if entering is None:
        entering = run_layers(model, hidden, *rows, pictures=pictures)
        run_attention(model, entering, *rows)
    return entering


class Captures:
    """Graph runner of one model: its captured forwards, by number of rows.

    Args:
        device: Device of the model.
        make_recorder: Makes the recorder of each capture.
    """

    def __init__(
        self,
        device: torch.device,
        make_recorder: Callable[[torch.device], Recorder] = CudaRecorder,
    ):
        self._device = device
        self._make_recorder = make_recorder
        self._lock = threading.Lock()
        self._key: Hashable = None
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
        """Run rows through the layers up to the attention of one, if graphs can do so.

        Args:
            model: A patched model.
            hidden: Input of the first layer, ``[1, rows, hidden]``.
            positions: As in `run_layers`.
            rotation: As in `run_layers`.
            attention_pass: The pass. Its tensors of a layer are valid until the next layer.
            last: Last layer whose attention is run.

        Returns:
            The input of that layer, ``[1, rows, hidden]``. None if nothing was run: there are too
            many rows, the modules cannot be captured, or this thread is inside another pass.
        """
        size = next((size for size in SIZES if hidden.shape[1] <= size), None)
        if size is None or hidden.device != self._device:
            return None
        if torch.is_autocast_enabled(hidden.device.type):
            return None
        key = _validity_key(model)
        if key is None:
            return None
        rows = positions, rotation
        with self._lock:
            if key != self._key:
                self._captured.clear()
                self._key, self._refused = key, False
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
        """Return the captured forward of this size, captured if new; None if the capture failed."""
        axes = positions.shape[:-1]
        key = (size, last, hidden.dtype, axes, _stream(self._device))
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


def _validity_key(model: PreTrainedModel) -> Hashable:
    """Return the key under which graphs stay valid; None if the layers cannot be captured."""
    if torch_module._has_any_global_hook():
        return None
    tree = tree_of(DecoderView(model).stack.layers)
    for module in tree.modules:
        own = module.__dict__  # faster than attribute access, for four hundred modules
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_buffers"]  # usually a quantized layer
            or "forward" in own
            or own.get("_compiled_call_impl") is not None
        ):
            return None
    addresses = []
    for held in tree.parameters:
        for parameter in held.values():
            if parameter is not None and parameter.ndim == 3:  # experts
                return None
            if type(parameter) is nn.Parameter:
                addresses.append(parameter.data_ptr())
            elif parameter is not None:
                return None
    kinds = {type(module) for module in tree.modules}
    settings = [settings_of(module) for module in tree.modules if is_foreign(module)]
    forwards = frozenset(kind.forward for kind in kinds)
    return tuple(addresses), forwards, tuple(settings), DecoderView(model).live_settings


def _stream(device: torch.device) -> Hashable:
    """Return the current stream: two streams must not replay the same graph at once."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
