"""Counts of what torch does: operations, rows through linear maps, bytes made and alive."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import ifkv
from ifkv.models.hooks import Observer


def operations(run: Callable[[], Any]) -> float:
    """Operations of products and of fused attention, as torch ran them."""

    def attention(query: Any, key: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        batch, heads, rows, width = query
        whole = 4 * batch * heads * rows * key[2] * width
        # The causal form skips what it masks.
        return whole * (rows + 1) // (2 * rows) if len(args) > 2 and args[2] is True else whole

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that an operation made anew; views and results in place are none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    self.sizes.append(storage.nbytes())
        return out

    @property
    def total(self) -> int:
        return sum(self.sizes)


def allocations(run: Callable[[], Any]) -> Allocations:
    with Allocations() as seen:
        run()
    return seen


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once of what operations made anew; what an operation frees on its own
    is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        out = func(*args, **(kwargs or {}))
        self.alive = {k: one for k, one in self.alive.items() if not one[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def live_bytes(run: Callable[[], Any]) -> int:
    with LiveBytes() as seen:
        run()
    return seen.peak


@contextlib.contextmanager
def rows_counted(model: PreTrainedModel) -> Iterator[Counter[str]]:
    """Rows that each linear map was given, by its name."""
    seen: Counter[str] = Counter()

    def watch(name: str) -> Observer:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] += args[0][..., 0].numel()

        return ifkv.observer(hook)

    hooks = [
        module.register_forward_pre_hook(watch(name.removeprefix("model.")))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
