"""Look at a few elements of every parameter, to see whether any has been written to."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# Elements of every parameter that are looked at.
GLANCE = 4


class Glance:
    """Where to look at some parameters, as they lie and are shaped.

    It holds none of them, so that memory is free when a model is dropped or moved.

    Args:
        parameters: Of one model; what is looked at has to lie where these do.
    """

    def __init__(self, parameters: list[Tensor]):
        self._looks = [_look(parameter) for parameter in parameters]
        self._addresses = _addresses(parameters, self._looks)

    @torch.no_grad()
    def at(self, parameters: list[Tensor]) -> bytes:
        """What is there now; equal bytes mean equal elements."""
        if self._addresses is not None:
            from ifkv.models.weights_triton import peek

            return peek(self._addresses).cpu().numpy().tobytes()
        # Views, no copy of any, and one transfer.
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter, look in zip(parameters, self._looks, strict=True):
            view = parameter.reshape(-1) if look is None else parameter.as_strided(*look)
            by_kind.setdefault((view.device, view.dtype), []).append(view)
        return b"".join(
            torch.cat(views).to(torch.float64).cpu().numpy().tobytes() for views in by_kind.values()
        )


# Size, step and start of a view, or None for all of a parameter.
_Look = tuple[tuple[int], tuple[int], int] | None


def _look(parameter: Tensor) -> _Look:
    numel = parameter.numel()
    if numel < 2 * GLANCE or not parameter.is_contiguous():
        return None
    step = numel // GLANCE - 1 | 1  # odd: not all in one column
    return (GLANCE,), (step,), int(parameter.storage_offset()) + step // 2


def _addresses(parameters: list[Tensor], looks: list[_Look]) -> Tensor | None:
    """Where the bytes to look at lie, on the card; None without a card or without Triton.

    To make 300 views takes the processor two milliseconds of every request, this nothing.
    """
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or (device := devices.pop()).type != "cuda":
        return None
    with contextlib.suppress(ImportError):
        import ifkv.models.weights_triton  # noqa: F401

        found = []
        for parameter, look in zip(parameters, looks, strict=True):
            size = parameter.element_size()
            if look is None:
                if not parameter.is_contiguous():
                    return None
                starts = [parameter.data_ptr() + i * size for i in range(parameter.numel())]
            else:
                (count,), (step,), start = look
                first = parameter.data_ptr() + (start - int(parameter.storage_offset())) * size
                starts = [first + i * step * size for i in range(count)]
            found += [start + byte for start in starts for byte in range(size)]
        return torch.tensor(found, dtype=torch.long, device=device)
    return None
