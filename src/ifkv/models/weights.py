"""Have a model's modules or weights changed? Two quick checks that every request makes.

`tree_of` finds all modules without walking the model again. A model of 32 layers has some 400
modules: a walk takes a millisecond of CPU time, and a check that none was exchanged a tenth of it.

`WeightSample` reads a few elements of every parameter. That shows writes through
``parameter.data``, which torch does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor, nn

# Elements of every parameter that a sample reads.
SAMPLED = 4


@dataclasses.dataclass(frozen=True)
class ModuleTree:
    """Modules below a root module.

    Attributes:
        modules: All modules without the root, in an order that does not change.
        parameters: For the root and each module, its live dictionary of parameters.
        buffers: For the root and each module, its live dictionary of buffers.
    """

    modules: tuple[nn.Module, ...]
    parameters: tuple[dict[str, nn.Parameter | None], ...]
    buffers: tuple[dict[str, Tensor | None], ...]
    _children: tuple[tuple[dict[str, Any], tuple[nn.Module | None, ...]], ...]

    @property
    def unchanged(self) -> bool:
        """True if every module still has the children that it had."""
        # Tuples compare their elements by identity first, and modules have no other equality.
        return all(tuple(now.values()) == then for now, then in self._children)


# A tree refers to the modules below its root and not to the root, so it keeps no model alive.
_trees: weakref.WeakKeyDictionary[nn.Module, ModuleTree] = weakref.WeakKeyDictionary()


def tree_of(root: nn.Module) -> ModuleTree:
    """Return the modules below a root; walk it only if it is new or a module was exchanged."""
    tree = _trees.get(root)
    if tree is None or not tree.unchanged:
        tree = _trees[root] = _walk(root)
    return tree


def _walk(root: nn.Module) -> ModuleTree:
    found, children = [root], []
    for module in found:  # the list grows during the loop
        below = tuple(module._modules.values())
        children.append((module._modules, below))  # modules without children too: some may come
        found += [each for each in below if each is not None]
    parameters = tuple(module._parameters for module in found)
    buffers = tuple(module._buffers for module in found)
    return ModuleTree(tuple(found[1:]), parameters, buffers, tuple(children))


class WeightSample:
    """Places at which a few elements of every parameter are read.

    It holds no parameter, so memory is freed when a model is dropped or moved.

    Args:
        parameters: The parameters of one model.
    """

    def __init__(self, parameters: list[Tensor]):
        self._views = [_strided_view(parameter) for parameter in parameters]
        self._addresses = _addresses(parameters, self._views)

    @torch.no_grad()
    def read(self, parameters: list[Tensor]) -> bytes:
        """Return the sampled elements as bytes; equal bytes mean equal elements.

        Args:
            parameters: The same parameters, at the addresses and of the shapes that they had.
        """
        if self._addresses is not None:
            from ifkv.models.weights_triton import gather_bytes

            return gather_bytes(self._addresses).cpu().numpy().tobytes()
        # Views without a copy, and one transfer for each dtype.
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter, strided in zip(parameters, self._views, strict=True):
            view = parameter.reshape(-1) if strided is None else parameter.as_strided(*strided)
            by_kind.setdefault((view.device, view.dtype), []).append(view)
        return b"".join(
            torch.cat(views).to(torch.float64).cpu().numpy().tobytes() for views in by_kind.values()
        )


# Size, step and start of a view; None stands for the whole parameter.
_View = tuple[tuple[int], tuple[int], int] | None


def _strided_view(parameter: Tensor) -> _View:
    numel = parameter.numel()
    if numel < 2 * SAMPLED or not parameter.is_contiguous():
        return None
    step = numel // SAMPLED - 1 | 1  # odd, so that the elements lie in different columns
    return (SAMPLED,), (step,), int(parameter.storage_offset()) + step // 2


def _addresses(parameters: list[Tensor], views: list[_View]) -> Tensor | None:
    """Return the addresses of the sampled bytes on the GPU; None without a GPU or Triton.

    300 views take two milliseconds of CPU time in every request. Addresses take none.
    """
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or (device := devices.pop()).type != "cuda":
        return None
    with contextlib.suppress(ImportError):
        import ifkv.models.weights_triton  # noqa: F401

        found = []
        for parameter, strided in zip(parameters, views, strict=True):
            size = parameter.element_size()
            if strided is None:
                if not parameter.is_contiguous():
                    return None
                starts = [parameter.data_ptr() + i * size for i in range(parameter.numel())]
            else:
                (count,), (step,), start = strided
                first = parameter.data_ptr() + (start - int(parameter.storage_offset())) * size
                starts = [first + i * step * size for i in range(count)]
            found += [start + byte for start in starts for byte in range(size)]
        return torch.tensor(found, dtype=torch.long, device=device)
    return None
