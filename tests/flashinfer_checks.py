"""What ifkv relies on in FlashInfer, and what its backend must do with it, as checks on an engine.

An engine is FlashInfer or its stand-in, with a device and a dtype. A check asserts something; the
tests run all of them on every engine, and the mutation tests on stand-ins with a broken rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.backends.flashinfer.pages import PagedBuffers
from ifkv.backends.plans import UNSCALED, KVScales
from ifkv.testing import assert_close

WORKSPACE = 64 * 2**20


@dataclass(frozen=True)
class Engine:
    """FlashInfer or a stand-in, and what it can compute with.

    Attributes:
        strict: The module to call wrongly, with its refusals.
        module: The module to compute with; the same one, but for a relaxed stand-in.
        device: Where.
        dtype: Of queries, keys and values.
        head_dim: Of queries, keys and values.
        tolerance: Between its result and the dense oracle's, relative to 1 + |expected|.
    """

    strict: Any
    module: Any
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    tolerance: float

    def backend(self, mask: str = "split") -> FlashInferBackend:
        return FlashInferBackend(self.module, mask=mask, workspace_bytes=WORKSPACE)

    def random(self, *shape: int, seed: int) -> Tensor:
        """Values of about one, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(self.dtype).to(self.device)

    def equal(self, actual: Tensor, expected: Tensor, what: str) -> None:
        assert_close(actual.cpu().double(), expected, what=what, tolerance=self.tolerance)


def dense(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention from its formula, in float64 on the CPU.

    Args:
        query: `[heads, rows, D]`.
        keys: `[kv_heads, n, D]`.
        values: `[kv_heads, n, D]`.
        visible: Bool `[rows, n]`.
        scaling: Factor on the logits.

    Returns:
        `[rows, heads, D]` and natural log-sum-exp `[rows, heads]`.
    """
    group = query.shape[0] // keys.shape[0]
    q, k, v, visible = (x.cpu() for x in (query, keys, values, visible))
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    logits = (q.double() @ k.mT * scaling).masked_fill(~visible, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(0, 1), logits.logsumexp(-1).T


def causal(slots: Sequence[int], length: int, window: int | None = None) -> Tensor:
    """Rows at slots see slots up to their own, `window` of them."""
    rows, keys = torch.as_tensor(slots)[:, None], torch.arange(length)
    visible = keys <= rows
    return visible if window is None else visible & (keys > rows - window)


# --- the module's own rules -----------------------------------------------------------------


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def paged(
    engine: Engine, *, backend: str = "fa2", module: Any = None, workspace: int = WORKSPACE
) -> Any:
    module = module or engine.module
    buffer = torch.empty(workspace, dtype=torch.uint8, device=engine.device)
    return module.BatchPrefillWithPagedKVCacheWrapper(buffer, kv_layout="HND", backend=backend)


def ragged(engine: Engine, *, backend: str = "fa2") -> Any:
    buffer = torch.empty(WORKSPACE, dtype=torch.uint8, device=engine.device)
    module = engine.module
    return module.BatchPrefillWithRaggedKVCacheWrapper(buffer, kv_layout="NHD", backend=backend)


def plan_paged(engine: Engine, wrapper: Any, **changes: Any) -> None:
    """Plan one request of 3 rows over 11 slots on pages of 4; see :func:`setting`."""
    arguments: dict[str, Any] = {
        "qo_indptr": ints([0, 3]),
        "paged_kv_indptr": ints([0, 3]),
        "paged_kv_indices": ints([4, 0, 2]),
        "paged_kv_last_page_len": ints([3]),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": engine.head_dim,
        "page_size": 4,
        "sm_scale": 0.2,
        "q_data_type": engine.dtype,
        "kv_data_type": engine.dtype,
    }
    wrapper.plan(**(arguments | changes))


def setting(engine: Engine) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, pages of keys and values, and the keys and values that pages 4, 0, 2 hold."""
    query = engine.random(3, 4, engine.head_dim, seed=1)
    keys = engine.random(5, 2, 4, engine.head_dim, seed=2)
    values = engine.random(5, 2, 4, engine.head_dim, seed=3)
    rows = [x[[4, 0, 2]].transpose(0, 1).flatten(1, 2)[:, :11] for x in (keys, values)]
    return query, keys, values, rows[0], rows[1]


def rule_causal_and_lse(engine: Engine) -> None:
    query, keys, values, rows_k, rows_v = setting(engine)
    wrapper = paged(engine)
    plan_paged(engine, wrapper, causal=True)
    out, lse = wrapper.run(query, (keys, values), return_lse=True)
    want, want_lse = dense(query.transpose(0, 1), rows_k, rows_v, causal([8, 9, 10], 11), 0.2)
    engine.equal(out, want, "right-aligned causal")
    engine.equal(lse, want_lse / math.log(2), "log-sum-exp of base 2")


def rule_window(engine: Engine) -> None:
    query, keys, values, rows_k, rows_v = setting(engine)
    wrapper = paged(engine)
    plan_paged(engine, wrapper, causal=True, window_left=2)
    out = wrapper.run(query, (keys, values))
    visible = causal([8, 9, 10], 11, window=3)
    want, _ = dense(query.transpose(0, 1), rows_k, rows_v, visible, 0.2)
    engine.equal(out, want, "window of three, self included")


def rule_mask_replaces_causal(engine: Engine) -> None:
    query, keys, values, rows_k, rows_v = setting(engine)
    visible = torch.rand(3, 11, generator=torch.Generator().manual_seed(4)) < 0.6
    visible[:, 10] = True
    wrapper = paged(engine)
    plan_paged(engine, wrapper, custom_mask=visible.flatten().to(engine.device), causal=True)
    out = wrapper.run(query, (keys, values))
    want, _ = dense(query.transpose(0, 1), rows_k, rows_v, visible, 0.2)
    engine.equal(out, want, "mask instead of causal")


def rule_two_masked_requests(engine: Engine) -> None:
    query, keys, values, rows_k, rows_v = setting(engine)
    first = torch.tensor([[True, False, True, True, False]])
    second = torch.tensor([[True, False, True], [False, True, True]])
    wrapper = paged(engine)
    plan_paged(
        engine,
        wrapper,
        qo_indptr=ints([0, 1, 3]),
        paged_kv_indptr=ints([0, 2, 3]),
        paged_kv_last_page_len=ints([1, 3]),
        custom_mask=torch.cat((first.flatten(), second.flatten())).to(engine.device),
    )
    out = wrapper.run(query, (keys, values))
    q = query.transpose(0, 1)
    want, _ = dense(q[:, :1], rows_k[:, :5], rows_v[:, :5], first, 0.2)
    engine.equal(out[:1], want, "first request")
    last = [x[2].cpu()[:, :3] for x in (keys, values)]
    want, _ = dense(q[:, 1:], *last, second, 0.2)
    engine.equal(out[1:], want, "second request")


def rule_blind_rows(engine: Engine) -> None:
    query, keys, values, _, _ = setting(engine)
    wrapper = paged(engine)
    visible = torch.ones(3, 11, dtype=torch.bool)
    visible[1] = False
    plan_paged(engine, wrapper, custom_mask=visible.flatten().to(engine.device))
    blind = wrapper.run(query, (keys, values), return_lse=True)
    assert bool((blind[1][1] < -1e3).all()), "a row that sees nothing has next to no weight"
    plan_paged(engine, wrapper)
    seeing = wrapper.run(query, (keys, values), return_lse=True)
    merged, _ = engine.module.merge_state(*blind, *seeing)
    engine.equal(merged[1], seeing[0][1].cpu().double(), "merged with a row that sees all")


def rule_merge_state(engine: Engine) -> None:
    query, keys, values, _, _ = setting(engine)
    wrapper = paged(engine)
    plan_paged(engine, wrapper)
    whole, whole_lse = wrapper.run(query, (keys, values), return_lse=True)
    states = []
    for pages, last in (([4, 0], 4), ([2], 3)):
        plan_paged(
            engine,
            wrapper,
            paged_kv_indices=ints(pages),
            paged_kv_indptr=ints([0, len(pages)]),
            paged_kv_last_page_len=ints([last]),
        )
        states += wrapper.run(query, (keys, values), return_lse=True)
    merged, lse = engine.module.merge_state(*states)
    engine.equal(merged, whole.cpu().double(), "merged output")
    engine.equal(lse, whole_lse.cpu().double(), "merged log-sum-exp")


def rule_ragged_keeps_a_stale_mask(engine: Engine) -> None:
    """The trap because of which no ragged wrapper of ifkv ever takes a mask."""
    arguments: dict[str, Any] = {
        "qo_indptr": ints([0, 3]),
        "kv_indptr": ints([0, 3]),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": engine.head_dim,
        "q_data_type": engine.dtype,
        "kv_data_type": engine.dtype,
    }
    query = engine.random(3, 4, engine.head_dim, seed=1)
    keys, values = (engine.random(3, 2, engine.head_dim, seed=seed) for seed in (2, 3))
    wrapper = ragged(engine)
    only_first = torch.tensor([True, False, False]).repeat(3)
    wrapper.plan(**arguments, custom_mask=only_first.to(engine.device))
    masked = wrapper.run(query, keys, values)
    wrapper.plan(**arguments)
    engine.equal(wrapper.run(query, keys, values), masked.cpu().double(), "the mask is still there")


def rule_auto_sticks(engine: Engine) -> None:
    """Where "auto" means fa3, a wrapper that has been planned once takes no mask any more."""
    real = engine.device.type == "cuda"
    if real and torch.cuda.get_device_capability(engine.device) != (9, 0):
        pytest.skip("only a Hopper card has fa3")
    mask = torch.ones(33, dtype=torch.bool, device=engine.device)
    wrapper = paged(engine, backend="auto", module=engine.strict)
    strict = {"head_dim_qk": 64, "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    plan_paged(engine, wrapper, **strict)
    assert wrapper._backend == "fa3"
    query = torch.zeros(3, 4, 64, dtype=torch.bfloat16, device=engine.device)
    pages = torch.zeros(5, 2, 4, 64, dtype=torch.bfloat16, device=engine.device)

    def plan_and_run() -> None:
        plan_paged(engine, wrapper, custom_mask=mask, **strict)
        wrapper.run(query, (pages, pages))

    must_fail(plan_and_run)


def rule_auto_takes_fa2_for_eight_bit_keys(engine: Engine) -> None:
    """fa3 wants queries of 8 bits beside such keys; "auto" knows, and takes the other kernels."""
    wrapper = paged(engine, backend="auto", module=engine.strict)
    kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.float8_e4m3fn}
    plan_paged(engine, wrapper, head_dim_qk=64, **kinds)
    assert wrapper._backend == "fa2"


def must_fail(call: Callable[[], None]) -> None:
    """Whatever the module raises, at plan or at run."""
    with pytest.raises((ValueError, RuntimeError, AssertionError, KeyError, TypeError)):
        call()


def refused(engine: Engine, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """A plan and run that must fail; `dtype` is that of the tensors."""
    known = {"head_dim_qk": 64, "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    changes = known | changes
    head_dim = changes["head_dim_qk"]
    query = torch.zeros(3, 4, head_dim, dtype=dtype, device=engine.device)
    pages = torch.zeros(5, 2, 4, head_dim, dtype=dtype, device=engine.device)

    def plan_and_run() -> None:
        wrapper = paged(engine, module=engine.strict)
        plan_paged(engine, wrapper, **changes)
        wrapper.run(query, (pages, pages))

    must_fail(plan_and_run)


def rule_float32_is_refused(engine: Engine) -> None:
    refused(engine, dtype=torch.float32, q_data_type=torch.float32, kv_data_type=torch.float32)


def rule_dtype_must_match_the_plan(engine: Engine) -> None:
    refused(engine, q_data_type=torch.float16)


def rule_q_data_type_defaults_to_float16(engine: Engine) -> None:
    wrapper = paged(engine, module=engine.strict)
    query = torch.zeros(3, 4, 64, dtype=torch.bfloat16, device=engine.device)
    pages = torch.zeros(5, 2, 4, 64, dtype=torch.bfloat16, device=engine.device)
    wrapper.plan(
        ints([0, 3]), ints([0, 3]), ints([4, 0, 2]), ints([3]), 4, 2, page_size=4,
        head_dim_qk=64,
    )  # fmt: skip
    wrapper.run(query.half(), (pages.half(), pages.half()))
    with pytest.raises(ValueError, match="float16"):
        wrapper.run(query, (pages, pages))


def rule_head_dim_96_is_refused(engine: Engine) -> None:
    refused(engine, head_dim_qk=96)


def rule_row_count_must_match_the_plan(engine: Engine) -> None:
    refused(engine, qo_indptr=ints([0, 2]))


def rule_workspace_is_limited(engine: Engine) -> None:
    """Long requests of few rows are split along their keys, which takes scratch memory."""
    pages = ints(range(4096))
    wrapper = paged(engine, module=engine.strict, workspace=1024)
    with pytest.raises(Exception, match="workspace"):
        plan_paged(
            engine,
            wrapper,
            paged_kv_indices=pages,
            paged_kv_indptr=ints([0, len(pages)]),
            head_dim_qk=64,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )


# FlashInfer has these rules too but does not check them; only the stand-in can be asked.
def standin_int32(engine: Engine) -> None:
    refused(engine, qo_indptr=torch.tensor([0, 3]))


def standin_pages_alike(engine: Engine) -> None:
    """fa3 refuses keys and values with other strides; from 0.7 on, fa2 does too."""
    wrapper = paged(engine)
    plan_paged(engine, wrapper)
    query, pages, _, _, _ = setting(engine)
    wrapper.run(query, (pages, pages.clone()))
    other = pages.transpose(1, 2).contiguous().transpose(1, 2)
    must_fail(lambda: wrapper.run(query, (pages, other)))


def standin_mask_length(engine: Engine) -> None:
    refused(engine, custom_mask=torch.ones(32, dtype=torch.bool, device=engine.device))


# --- the backend on top of them ---------------------------------------------------------------

SCALING = 0.31  # unlike head_dim ** -0.5, which is what a forgotten sm_scale would be


def check_documents(
    engine: Engine,
    lengths: Sequence[int] = (5, 1, 9),
    prefix: int = 3,
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
    backend: FlashInferBackend | None = None,
) -> None:
    backend = backend or engine.backend()
    rows, dim = sum(lengths), engine.head_dim
    query = engine.random(1, heads[0], rows, dim, seed=1)
    keys, values = (engine.random(1, heads[1], rows, dim, seed=s) for s in (2, 3))
    before = [engine.random(1, heads[1], prefix, dim, seed=s) for s in (4, 5)]
    plan = backend.plan_documents(tuple(lengths), prefix, engine.device)
    for _ in range(2):  # two layers, one plan
        out = backend.attend_documents(
            query, keys, values, *before, plan, scaling=SCALING, window=window
        )
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        start += length
        seen = [
            torch.cat((b[0], x[0, :, own]), 1) for b, x in zip(before, (keys, values), strict=True)
        ]
        visible = causal(range(prefix, prefix + length), prefix + length, window)
        want, _ = dense(query[0, :, own], *seen, visible, SCALING)
        engine.equal(out[0, own], want, f"document of {length} rows")


def check_rows(
    engine: Engine,
    slots: Sequence[Sequence[int]] = ((3, 4, 9, 40, 41, 77), (0, 2)),
    lengths: Sequence[int] = (80, 5),
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
    capacity: int = 128,
    mask: str = "split",
    backend: FlashInferBackend | None = None,
) -> None:
    """Rows of several requests in one buffer, poisoned behind the rows' reach."""
    backend = backend or engine.backend(mask)
    dim, batch = engine.head_dim, len(slots)
    rows = sum(map(len, slots))
    query = engine.random(1, heads[0], rows, dim, seed=1)
    keys, values = (engine.random(batch, heads[1], capacity, dim, seed=s) for s in (2, 3))
    for request, own in enumerate(slots):
        behind = own[-1] + 1 if own else 0
        for x in (keys, values):
            x[request, :, behind:] = 1e4
    plan = backend.plan_requests([torch.tensor(s).long() for s in slots], lengths, engine.device)
    for _ in range(2):
        out = backend.attend_rows(query, keys, values, plan, scaling=SCALING, window=window)
    compare_rows(engine, out, query, keys, values, slots, window)


def compare_rows(
    engine: Engine,
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Sequence[Sequence[int]],
    window: int | None,
) -> None:
    start = 0
    for request, own in enumerate(slots):
        rows = slice(start, start + len(own))
        start += len(own)
        if not own:
            continue
        visible = causal(own, keys.shape[2], window)
        q = query[0, :, rows]
        want, _ = dense(q, keys[request], values[request], visible, SCALING)
        engine.equal(out[0, rows], want, f"rows of request {request}")


def check_pages(
    engine: Engine,
    slots: Sequence[Sequence[int]] = ((0, 5, 6, 17), (2, 9), (11,)),
    lengths: Sequence[int] = (18, 10, 13),
    page_size: int = 4,
    heads: tuple[int, int] = (4, 2),
    seed: int = 0,
) -> None:
    """Several requests on shuffled pages of a common pool."""
    backend, dim = engine.backend(), engine.head_dim
    counts = [-(-length // page_size) for length in lengths]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(sum(counts) + 3, generator=generator).to(torch.int32)
    tables = [table for table in shuffled[: sum(counts)].split(counts)]
    pool = [engine.random(len(shuffled), heads[1], page_size, dim, seed=s) for s in (2, 3)]
    query = engine.random(1, heads[0], sum(map(len, slots)), dim, seed=1)
    plan = backend.plan_requests(
        [torch.tensor(s) for s in slots], lengths, engine.device, tables=tables
    )
    buffers = PagedBuffers(pool[0], pool[1], ())
    out = backend.attend_pages(query, buffers, plan, scaling=SCALING, window=None)
    start = 0
    for own, table, length in zip(slots, tables, lengths, strict=True):
        rows = slice(start, start + len(own))
        start += len(own)
        mine = [x[table.long()].transpose(0, 1).flatten(1, 2)[:, :length] for x in pool]
        want, _ = dense(query[0, :, rows], *mine, causal(own, length), SCALING)
        engine.equal(out[0, rows], want, "rows on shuffled pages")


def check_query(
    engine: Engine,
    rows: int = 4,
    length: int = 21,
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
    capacity: int = 64,
    gap: int = 0,
    rounded: bool = False,
) -> None:
    """Query tokens over a context (perhaps in 8 bits) and themselves; attention norms too."""
    backend, dim = engine.backend(), engine.head_dim
    query = engine.random(1, heads[0], rows, dim, seed=1)
    own = [engine.random(1, heads[1], rows, dim, seed=s) for s in (2, 3)]
    own[1] = own[1].transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves them
    buffer = [engine.random(1, heads[1], capacity, dim, seed=s) for s in (4, 5)]
    context = [x[:, :, :length] for x in buffer]
    meant, scales = context, UNSCALED
    if rounded:
        context, meant, scales = eight_bits(context)
    at = torch.arange(length, device=engine.device)
    asked = torch.arange(length + gap, length + gap + rows, device=engine.device)
    plan = backend.plan_query(asked, at)
    for _ in range(2):
        out, lse = backend.attend_query(
            query, *own, *context, plan, scaling=SCALING, window=window, scales=scales
        )
    positions = torch.cat((at, asked)).cpu()
    slot = torch.arange(length + rows)
    visible = slot[None] <= slot[length:, None]
    if window is not None:
        visible &= positions[None] > asked.cpu()[:, None] - window
    every = [torch.cat((c[0], o[0]), 1) for c, o in zip(meant, own, strict=True)]
    want, want_lse = dense(query[0], *every, visible, SCALING)
    engine.equal(out[0], want, "query rows")
    engine.equal(lse[0].T, want_lse, "natural log-sum-exp")
    group = heads[0] // heads[1]
    k = every[0].cpu().double().repeat_interleave(group, 0)
    logits = (query[0].cpu().double() @ k.mT * SCALING).masked_fill(~visible, float("-inf"))
    attention = logits.softmax(-1)[..., :length].mean(0)
    for reduction, norm in (("l2", attention.norm(dim=0)), ("sum", attention.sum(0))):
        scaling = SCALING * scales.keys
        got = backend.attention_norm(
            query, context[0], lse, plan, scaling=scaling, reduction=reduction, window=window
        )
        engine.equal(got, norm, f"attention norm {reduction}")


def check_queries(
    engine: Engine,
    counts: Sequence[int] = (3, 1, 4),
    lengths: Sequence[int] = (21, 64, 7),
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
    capacity: int = 64,
    gap: int = 0,
    order: Sequence[int] = (2, 0, 1),
    rounded: bool = False,
    together: bool = True,
) -> None:
    """Query tokens of several requests, whose contexts lie in one allocation, in two calls."""
    backend, dim = engine.backend(), engine.head_dim
    total, requests = sum(counts), len(counts)
    query = engine.random(1, heads[0], total, dim, seed=1)
    own = [engine.random(1, heads[1], total, dim, seed=s) for s in (2, 3)]
    own[1] = own[1].transpose(1, 2).contiguous().transpose(1, 2)
    buffers = [engine.random(1, heads[1], requests * capacity, dim, seed=s) for s in (4, 5)]
    meant, scales = buffers, UNSCALED
    if rounded:
        buffers, meant, scales = eight_bits(buffers)

    def contexts(buffer: Tensor) -> list[Tensor]:
        """Request i lies at the place that `order` gives it."""
        starts = [order[i] * capacity for i in range(requests)]
        return [buffer[:, :, start : start + n] for start, n in zip(starts, lengths, strict=True)]

    at = [torch.arange(n, device=engine.device) for n in lengths]
    asked = [
        torch.arange(n + gap, n + gap + count, device=engine.device)
        for n, count in zip(lengths, counts, strict=True)
    ]
    plan = backend.plan_queries(asked, at)
    given = [contexts(x) if together else [y.clone() for y in contexts(x)] for x in buffers]
    before = getattr(engine.module, "plans", None)
    for _ in range(2):  # as two layers
        out, lse = backend.attend_queries(
            query, *own, *given, plan, scaling=SCALING, window=window, scales=[scales] * requests
        )
    if before is not None:
        assert engine.module.plans - before == (2 if together or requests == 1 else 2 * requests)
    for index, rows in enumerate(torch.arange(total).split(list(counts))):
        positions = torch.cat((at[index], asked[index])).cpu()
        slot = torch.arange(len(positions))
        visible = slot[None] <= slot[lengths[index] :, None]
        if window is not None:
            visible &= positions[None] > asked[index].cpu()[:, None] - window
        every = [
            torch.cat((contexts(c)[index][0], o[0][:, rows]), 1)
            for c, o in zip(meant, own, strict=True)
        ]
        want, want_lse = dense(query[0][:, rows], *every, visible, SCALING)
        engine.equal(out[0, rows], want, f"query rows of request {index}")
        engine.equal(lse[0][:, rows].T, want_lse, f"natural log-sum-exp of request {index}")


def check_windowed_layers_alternate(engine: Engine) -> None:
    """One plan serves layers with and without a window: two wrappers, neither overwritten."""
    backend = engine.backend()
    slots, length = [1, 2, 3, 9, 30, 31, 59], 60
    query = engine.random(1, 4, len(slots), engine.head_dim, seed=1)
    keys, values = (engine.random(1, 2, 64, engine.head_dim, seed=s) for s in (2, 3))
    plan = backend.plan_rows(torch.tensor(slots), length, engine.device)
    for window in (None, 7, None, 7):
        out = backend.attend_rows(query, keys, values, plan, scaling=SCALING, window=window)
        compare_rows(engine, out, query, keys, values, [slots], window)


def check_wrappers_are_reused(engine: Engine) -> None:
    """Forward after forward through the same few wrappers, each planned anew."""
    backend = engine.backend()
    built = getattr(engine.module, "wrappers", [])  # the stand-in keeps a list
    before = len(built)
    for window in (None, 6, None):
        check_documents(engine, lengths=(4, 7), window=window, backend=backend)
        for slots in ([3, 9, 70], [1, 2, 64, 71, 72], [0, 79]):
            check_rows(engine, [slots], [80], window=window, backend=backend)
    # Documents, and at most the three calls that one forward makes side by side.
    assert len(built) - before <= 4, f"{len(built) - before} wrappers were built"


def check_threads(engine: Engine) -> None:
    """Threads share a backend, but neither a wrapper nor a plan."""
    backend, errors = engine.backend(), []

    def work(slots: list[int]) -> None:
        try:
            for _ in range(5):
                check_rows(engine, [slots], [80], backend=backend)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=work, args=([n, 20 + n, 50 + 2 * n],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def check_eight_bit_values(engine: Engine) -> None:
    """Keys and values in e4m3 with a scale each; the oracle is given what they stand for."""
    for mask in ("split", "tiles"):
        eight_bit(engine, mask)
    check_query(engine, rounded=True)
    check_query(engine, rounded=True, window=9)


def eight_bit(engine: Engine, mask: str) -> None:
    backend, dim = engine.backend(mask), engine.head_dim
    slots = [3, 4, 9, 40, 50]
    query = engine.random(1, 4, len(slots), dim, seed=1)
    wide = [engine.random(1, 2, 64, dim, seed=s) for s in (2, 3)]
    small, meant, scales = eight_bits(wide)
    plan = backend.plan_rows(torch.tensor(slots), 64, engine.device)
    out = backend.attend_rows(query, *small, plan, scaling=SCALING, window=None, scales=scales)
    compare_rows(engine, out, query, meant[0], meant[1], [slots], None)


def eight_bits(wide: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], KVScales]:
    """Keys and values in e4m3, what they stand for in float64, and their scales."""
    scales = KVScales(*(2.0 ** math.ceil(math.log2(float(x.abs().max()) / 448)) for x in wide))
    small = [(x / s).to(torch.float8_e4m3fn) for x, s in zip(wide, scales, strict=True)]
    return small, [x.double() * s for x, s in zip(small, scales, strict=True)], scales


def check_joined_documents(engine: Engine) -> None:
    check_documents(engine)
    check_documents(engine, prefix=0)
    check_documents(engine, window=4)


def check_scattered_rows(engine: Engine) -> None:
    check_rows(engine)
    check_rows(engine, window=6)
    check_rows(engine, mask="tiles")


def check_query_rows(engine: Engine) -> None:
    check_query(engine)
    check_query(engine, window=9)
    check_query(engine, window=3, gap=5)  # no context slot is in reach of any row


def check_several_queries(engine: Engine) -> None:
    check_queries(engine)
    check_queries(engine, window=9)
    check_queries(engine, window=3, gap=5)
    check_queries(engine, rounded=True)
    check_queries(engine, together=False)


RULE_CHECKS: dict[str, Callable[[Engine], None]] = {
    name.removeprefix("rule_"): check for name, check in globals().items() if name[:5] == "rule_"
}
STANDIN_CHECKS: dict[str, Callable[[Engine], None]] = {
    "int32": standin_int32,
    "mask_length": standin_mask_length,
    "pages_alike": standin_pages_alike,
}
BACKEND_CHECKS: dict[str, Callable[[Engine], None]] = {
    "documents": check_joined_documents,
    "rows": check_scattered_rows,
    "pages": check_pages,
    "query": check_query_rows,
    "queries": check_several_queries,
    "alternating_windows": check_windowed_layers_alternate,
    "reuse": check_wrappers_are_reused,
    "threads": check_threads,
    "eight_bit": check_eight_bit_values,
}
