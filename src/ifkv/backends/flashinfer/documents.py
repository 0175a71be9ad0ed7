"""Documents behind a shared prefix, in one ragged call.

Each document is one request; its keys are those of the prefix and its own. FlashInfer's causal mask
is right-aligned and the document's rows are last, so they see all of the prefix and, causally, each
other. Its sliding window is exact too, because the rows are adjacent. The prefix's keys are copied
in front of each document's. Separate attention to the prefix, merged by log-sum-exp, would save the
copy and about 1 % of a prefill (measured, see docs/gpu.md), but cannot apply a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ifkv.backends.flashinfer.calls import kernels
from ifkv.backends.flashinfer.shapes import CallShape
from ifkv.backends.flashinfer.wrappers import WrapperKind, WrapperPool


class DocumentCall:
    """Planned ragged call.

    Args:
        pool: Pool that lends the wrapper.
        lengths: Rows of each document.
        prefix_length: Keys of the prefix.
        shape: Heads, dtypes and other sizes.
        device: The compute device.
    """

    def __init__(
        self,
        pool: WrapperPool,
        lengths: tuple[int, ...],
        prefix_length: int,
        shape: CallShape,
        device: torch.device,
    ):
        kind = WrapperKind(
            paged=False,
            backend=kernels(lengths, shape.heads),
            q_dtype=shape.q_dtype,
            kv_dtype=shape.kv_dtype,
            head_dim=shape.head_dim,
        )
        lease = pool.lease(kind, device, holder=self)
        self._wrapper = lease.wrapper
        ends = torch.tensor([0, *lengths]).cumsum(0)
        starts = ends + prefix_length * torch.arange(len(ends))
        longest = prefix_length + max(lengths)
        window = shape.window
        lease.plan(
            qo_indptr=ends.to(torch.int32),
            kv_indptr=starts.to(torch.int32),
            causal=True,
            # FlashInfer does not count the row's own key in the window, transformers does.
            window_left=-1 if window is None or window >= longest else window - 1,
            **shape.plan_arguments,
        )
        # Indices of each request's keys among those of the prefix followed by all documents.
        self._sources: Tensor | None = None
        if prefix_length:
            prefix = torch.arange(prefix_length)
            own = torch.arange(int(ends[-1])) + prefix_length
            parts = [part for rows in own.split(list(lengths)) for part in (prefix, rows)]
            self._sources = torch.cat(parts).to(device)

    def run(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
    ) -> Tensor:
        """Compute the attention of all documents; shapes as in `Backend.attend_documents`."""
        out: Tensor = self._wrapper.run(
            query[0].transpose(0, 1),
            self._join(prefix_keys, keys),
            self._join(prefix_values, values),
        )
        return out[None]

    def _join(self, prefix: Tensor, own: Tensor) -> Tensor:
        """Return the keys or values of all requests, ``[rows, kv_heads, head_dim]``."""
        if self._sources is None:
            return own[0].transpose(0, 1)
        return torch.cat((prefix[0], own[0]), dim=1).transpose(0, 1)[self._sources]
