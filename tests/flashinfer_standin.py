"""A stand-in for FlashInfer on any machine: plain torch behind FlashInfer's own call rules.

It is injected (`FlashInferBackend(module=FlashInferStandIn())`) and never put into `sys.modules`.
Names, arguments and refusals are those of flashinfer-python 0.6.18 where ifkv uses them; each rule
that ifkv relies on can be broken by name, so that the tests can be tested: see `RULES`.

Two things are stricter than the original. A mask of the wrong length is refused (FlashInfer reads
past it), and index arrays must be int32 on the CPU (FlashInfer would synchronise, or misread them).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

RULES: dict[str, str] = {
    "causal is right-aligned": "row i of q_len sees keys up to kv_len - q_len + i",
    "logsumexp is base 2": "log2 of the sum of exponentials",
    "merge_state is base 2": "states are weighted by powers of two",
    "last_page_len counts": "slots behind it on the last page are not read",
    "page indices count": "a request's pages may lie anywhere, in any order",
    "page indptr counts": "each request reads its own stretch of the page indices",
    "pages are HND": "[pages, kv_heads, page_size, head_dim]",
    "pages of keys and values lie alike": "with the same strides in every dimension",
    "masks are concatenated": "each request's mask starts where the one before it ends",
    "masks are row-major": "kv_len entries for a row, then the next row",
    "true means visible": "False hides",
    "masks hide": "a custom mask is applied",
    "masks replace causal": "causal is ignored when there is a mask",
    "window_left leaves self out": "window_left = 0 still sees the row's own key",
    "windows are right-aligned": "distances are counted from the end, as for causal",
    "heads are grouped in order": "query head h reads key head h // group",
    "sm_scale counts": "logits are scaled by what plan() was given",
    "rows that see nothing weigh nothing": "output 0, log-sum-exp near -5e4",
    "rows are requests in order": "qo_indptr cuts the rows of q",
    "k_scale and v_scale count": "8-bit keys and values are rescaled",
    "one plan a wrapper": "run() uses what plan() was given last",
    "the ragged wrapper keeps a stale mask": "re-planned without one, it uses the last",
    "auto sticks": "backend='auto' is decided at the first plan",
    "fa3 refuses masks": "custom masks run on fa2 only",
    "auto takes fa2 for 8-bit keys": "fa3 wants 8-bit queries beside them",
    "float32 is refused": "kernels exist for 16 and 8 bits",
    "q_data_type defaults to float16": "whatever the tensors are",
    "dtypes are checked": "run() compares tensors with what plan() was told",
    "head_dim is checked": "64, 128, 256 or 512",
    "row counts are checked": "run() compares rows with qo_indptr",
    "the workspace is limited": "a plan that needs more is refused",
    "index arrays are int32": "anything else is refused",
    "mask lengths are checked": "stricter than FlashInfer",
}

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, *_EIGHT_BITS)
_SENTINEL = -5e4  # FlashInfer's "infinity"


class FlashInferStandIn:
    """What `import flashinfer` gives, as far as ifkv uses it.

    Args:
        relaxed: Take any floating dtype and any head_dim, so that results can be compared with an
            exact oracle; log-sum-exps are then as wide as the queries.
        broken: Names of `RULES` to break.
        hopper: Whether "auto" finds a GPU on which fa3 runs.
    """

    __version__ = "0.6.18.post1"

    def __init__(self, *, relaxed: bool = False, broken: tuple[str, ...] = (), hopper: bool = True):
        unknown = set(broken) - set(RULES)
        if unknown:
            raise ValueError(f"no such rule: {sorted(unknown)}")
        self.relaxed = relaxed
        self.hopper = hopper
        self.plans = 0
        self.wrappers: list[_Wrapper] = []
        self._broken = frozenset(broken)
        standin = self

        class Paged(_PagedWrapper):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(standin, *args, **kwargs)

        class Ragged(_RaggedWrapper):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(standin, *args, **kwargs)

        self.BatchPrefillWithPagedKVCacheWrapper = Paged
        self.BatchPrefillWithRaggedKVCacheWrapper = Ragged

    def holds(self, rule: str) -> bool:
        """Whether the rule is kept."""
        if rule not in RULES:
            raise KeyError(rule)
        return rule not in self._broken

    def merge_state(
        self, v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        for state in (v_a, s_a, v_b, s_b):
            if not state.is_contiguous():
                raise ValueError("merge_state reads contiguous states only")
        factor = math.log(2) if self.holds("merge_state is base 2") else 1.0
        merged = torch.logaddexp(s_a * factor, s_b * factor)
        weight_a = (s_a * factor - merged).exp()[..., None]
        weight_b = (s_b * factor - merged).exp()[..., None]
        return (v_a * weight_a + v_b * weight_b).to(v_a.dtype), merged / factor


class _Wrapper:
    def __init__(
        self,
        standin: FlashInferStandIn,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        *,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ):
        if kv_layout not in ("NHD", "HND"):
            raise KeyError(f"Invalid kv_layout {kv_layout}")
        if jit_args is not None and backend == "auto":
            raise ValueError("backend should not be auto when jit_args is provided")
        self.standin = standin
        self.device = float_workspace_buffer.device
        self.workspace = float_workspace_buffer.numel() * float_workspace_buffer.element_size()
        self.layout = kv_layout
        self._backend = backend
        self.jit_args = jit_args
        self.mask: Tensor | None = None
        self.state: dict[str, Any] | None = None
        standin.wrappers.append(self)

    def _plan(
        self,
        qo_indptr: Tensor,
        kv_lengths: list[int],
        custom_mask: Tensor | None,
        packed_custom_mask: Tensor | None,
        **state: Any,
    ) -> None:
        holds = self.standin.holds
        if state["q_data_type"] is None:
            fixed = holds("q_data_type defaults to float16")
            state["q_data_type"] = torch.float16 if fixed else None
        if state["kv_data_type"] is None:
            state["kv_data_type"] = state["q_data_type"]
        for dtype in (state["q_data_type"], state["kv_data_type"]):
            known = dtype in _KERNEL_DTYPES or self.standin.relaxed or dtype is None
            if not known and holds("float32 is refused"):
                raise ValueError(f"no kernel for {dtype}")
        head_dim, relaxed = state["head_dim_qk"], self.standin.relaxed
        if not relaxed and head_dim not in (64, 128, 256, 512) and holds("head_dim is checked"):
            raise ValueError(f"Unsupported head_dim: {head_dim}")
        counts = qo_indptr.diff().tolist()
        masked = custom_mask is not None or packed_custom_mask is not None
        if self._backend == "auto" or not holds("auto sticks"):
            fa3 = self.standin.hopper and not masked and self.jit_args is None
            if holds("auto takes fa2 for 8-bit keys"):
                q_dtype, kv_dtype = state["q_data_type"], state["kv_data_type"]
                fa3 = fa3 and (kv_dtype not in _EIGHT_BITS or q_dtype in _EIGHT_BITS)
            self._backend = "fa3" if fa3 else "fa2"
        if masked and self._backend == "fa3" and holds("fa3 refuses masks"):
            raise ValueError("fa3 does not support custom masks")
        needed = sum(
            rows * (kv > 4096) * state["num_qo_heads"] * (head_dim + 1) * 4
            for rows, kv in zip(counts, kv_lengths, strict=True)
        )
        if needed > self.workspace and holds("the workspace is limited"):
            raise RuntimeError(
                f"Buffer overflow when allocating memory for batch_prefill_tmp_v with size {needed}"
                f", but only {self.workspace} bytes available in AlignedAllocator. Increase the "
                "workspace buffer size."
            )
        if custom_mask is not None and self.jit_args is None:
            size = sum(rows * kv for rows, kv in zip(counts, kv_lengths, strict=True))
            if custom_mask.dtype != torch.bool or custom_mask.ndim != 1:
                raise ValueError("custom_mask is a flattened boolean tensor")
            if custom_mask.numel() != size and holds("mask lengths are checked"):
                raise ValueError(f"custom_mask has {custom_mask.numel()} elements, not {size}")
        if masked or not (self._keeps_mask and holds("the ragged wrapper keeps a stale mask")):
            self.mask = custom_mask
        self.standin.plans += 1
        new = dict(state, qo_indptr=qo_indptr, kv_lengths=kv_lengths, counts=counts)
        if self.state is None or holds("one plan a wrapper"):
            self.state = new

    _keeps_mask = False

    def _check_indptr(self, *arrays: Tensor) -> None:
        for array in arrays:
            wrong = array.dtype != torch.int32 or array.device.type != "cpu"
            if wrong and self.standin.holds("index arrays are int32"):
                raise ValueError(f"index arrays are int32 on the CPU, not {array.dtype}")

    def _check_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        assert self.state is not None, "plan info is not initialized"
        if self.standin.holds("dtypes are checked"):
            for x, key in ((q, "q_data_type"), (k, "kv_data_type"), (v, "kv_data_type")):
                if self.state[key] is not None and x.dtype != self.state[key]:
                    raise ValueError(
                        f"The dtype {x.dtype} does not match the {key} {self.state[key]} "
                        "specified in plan function."
                    )
        if q.shape[0] != int(self.state["qo_indptr"][-1]) and self.standin.holds(
            "row counts are checked"
        ):
            raise ValueError(f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1]")
        if any(x.stride(-1) != 1 for x in (q, k, v)):
            raise ValueError("the last dimension must be contiguous")

    def _attend(
        self, q: Tensor, sequences: list[tuple[Tensor, Tensor]], return_lse: bool, extra: Any
    ) -> Any:
        """Attend request by request; keys and values of each are `[kv_len, kv_heads, head_dim]`."""
        assert self.state is not None
        holds, state = self.standin.holds, self.state
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=q.dtype)
        lse = torch.zeros(q.shape[:2], dtype=wide if self.standin.relaxed else torch.float32)
        heads, kv_heads, head_dim = state["num_qo_heads"], state["num_kv_heads"], q.shape[2]
        assert q.shape[1] == heads
        head = torch.arange(heads)
        grouped = holds("heads are grouped in order")
        key_head = head // (heads // kv_heads) if grouped else head % kv_heads
        scale = state["sm_scale"] if self.jit_args is None else extra[2]
        scale = scale if holds("sm_scale counts") else None
        scale = head_dim**-0.5 if scale is None else scale
        done = 0
        for request, (keys, values) in enumerate(sequences):
            rows = slice(*state["qo_indptr"][request : request + 2].tolist())
            if not holds("rows are requests in order"):
                count = rows.stop - rows.start
                rows = slice(len(q) - rows.stop, len(q) - rows.stop + count)
            block, n = q[rows].to(wide), len(keys)
            if len(block) == 0 or n == 0:
                continue
            hidden, done = self._hidden(request, len(block), n, done, extra)
            logits = torch.einsum("rhd,nhd->hrn", block, keys[:, key_head].to(wide))
            logits = logits.masked_fill(hidden, _SENTINEL) * scale
            blind = hidden.all(-1)
            logits = logits.masked_fill(hidden & ~blind[:, None], float("-inf"))
            weights = logits.softmax(-1)
            result = torch.einsum("hrn,nhd->rhd", weights, values[:, key_head].to(wide))
            total = logits.logsumexp(-1).T
            if holds("logsumexp is base 2"):
                total = total / math.log(2)
            if holds("rows that see nothing weigh nothing"):
                result[blind] = 0
                total[blind] = _SENTINEL
            else:
                total[blind] = 0
            out[rows], lse[rows] = result.to(q.dtype), total.to(lse.dtype)
        return (out, lse) if return_lse else out

    def _hidden(self, request: int, rows: int, n: int, done: int, extra: Any) -> tuple[Tensor, int]:
        assert self.state is not None
        holds, state = self.standin.holds, self.state
        shift = n - rows if holds("causal is right-aligned") else 0
        row, key = torch.arange(rows)[:, None], torch.arange(n)
        if self.jit_args is not None:
            return self._hidden_by_variant(request, rows, n, extra), done
        visible = torch.ones(rows, n, dtype=torch.bool)
        if self.mask is not None and holds("masks hide"):
            start = done if holds("masks are concatenated") else 0
            flat = self.mask[start : start + rows * n]
            flat = torch.cat((flat, flat.new_zeros(rows * n - len(flat))))
            by_rows = holds("masks are row-major")
            visible = flat.view(rows, n) if by_rows else flat.view(n, rows).T
            if not holds("true means visible"):
                visible = ~visible
        if state["causal"] and (self.mask is None or not holds("masks replace causal")):
            visible = visible & (key <= row + shift)
        window = state["window_left"]
        if window >= 0:
            own = row + (n - rows if holds("windows are right-aligned") else 0)
            reach = window if holds("window_left leaves self out") else window - 1
            visible = visible & (key >= own - reach)
        return ~visible, done + rows * n

    def _hidden_by_variant(self, request: int, rows: int, n: int, extra: Any) -> Tensor:
        """What ifkv's own kernel hides; its arguments come as run() was given them."""
        assert self.state is not None
        row_slots, first_slots, _, window = extra
        start = int(self.state["qo_indptr"][request])
        row = row_slots[start : start + rows, None].long()
        key = int(first_slots[request]) + torch.arange(n)
        return (key > row) | ((row - key >= window) if window >= 0 else torch.tensor(False))


class _PagedWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
        max_token_per_sequence: int | None = None,
    ) -> None:
        if max_token_per_sequence not in (None, int(qo_indptr.diff().max())):
            raise ValueError(f"max_token_per_sequence is {max_token_per_sequence}")
        self._check_indptr(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        if len(qo_indptr) != len(paged_kv_indptr):
            raise ValueError("The length of qo_indptr and paged_kv_indptr should be the same.")
        pages = paged_kv_indptr.diff()
        lengths = (pages - 1).clamp(min=0) * page_size + paged_kv_last_page_len
        if not self.standin.holds("last_page_len counts"):
            lengths = pages * page_size
            custom_mask = (
                None if custom_mask is None else _pad_mask(custom_mask, qo_indptr, lengths)
            )
        self._plan(
            qo_indptr,
            lengths.tolist(),
            custom_mask,
            packed_custom_mask,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            page_size=page_size,
            causal=causal,
            sm_scale=sm_scale,
            window_left=window_left,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            indptr=paged_kv_indptr.tolist(),
            indices=paged_kv_indices.long(),
        )

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        k, v = paged_kv_cache
        if out is not None:
            if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
                raise ValueError(f"out is {tuple(out.shape)}, {out.dtype}")
            if self.state is None or min(self.state["kv_lengths"]) == 0:
                raise ValueError("rows of requests without keys are not written to out")
            out.fill_(torch.nan)
        self._check_tensors(q, k, v)
        assert self.state is not None
        holds, state = self.standin.holds, self.state
        if k.stride() != v.stride() and holds("pages of keys and values lie alike"):
            raise ValueError(f"K and V must have the same strides: {k.stride()}, {v.stride()}")
        k, v = (x.to(q.dtype) for x in (k, v))
        if holds("k_scale and v_scale count"):
            # A kernel of one's own is told its scale by the caller, k_scale included or not.
            k = k if self.jit_args is not None else k * (k_scale or 1.0)
            v = v * (v_scale or 1.0)
        if self.layout == "HND" and holds("pages are HND"):
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if k.shape[1] != state["page_size"] or k.shape[2] != state["num_kv_heads"]:
            raise ValueError(f"pages have shape {tuple(k.shape)}")
        sequences = []
        for request, length in enumerate(state["kv_lengths"]):
            begin, end = state["indptr"][request : request + 2]
            if not holds("page indptr counts"):
                begin, end = 0, end - begin
            pages = state["indices"][begin:end]
            if not holds("page indices count"):
                pages = torch.arange(len(pages))
            sequences.append((k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]))
        found = self._attend(q, sequences, return_lse, args)
        if out is None:
            return found
        if not return_lse:
            return out.copy_(found)
        return out.copy_(found[0]), found[1]


class _RaggedWrapper(_Wrapper):
    _keeps_mask = True

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        window_left: int = -1,
        sm_scale: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        self._check_indptr(qo_indptr, kv_indptr)
        if len(kv_indptr) != len(qo_indptr):
            raise ValueError("The kv_indptr length should be equal to mask_indptr length.")
        self._plan(
            qo_indptr,
            kv_indptr.diff().tolist(),
            custom_mask,
            packed_custom_mask,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            causal=causal,
            sm_scale=sm_scale,
            window_left=window_left,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            indptr=kv_indptr.tolist(),
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, return_lse: bool = False) -> Any:
        self._check_tensors(q, k, v)
        assert self.state is not None
        ends = self.state["indptr"]
        sequences = [(k[a:b], v[a:b]) for a, b in itertools.pairwise(ends)]
        return self._attend(q, sequences, return_lse, args)


def _pad_mask(mask: Tensor, qo_indptr: Tensor, lengths: Tensor) -> Tensor:
    """Stretch a mask to longer requests; only a broken rule needs it."""
    size = int((qo_indptr.diff() * lengths).sum())
    return torch.cat((mask, mask.new_ones(max(0, size - len(mask)))))[:size]
