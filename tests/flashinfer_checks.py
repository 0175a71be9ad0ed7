"""What ifkv's backend must do with FlashInfer, as checks on an engine.

The tests run all of them on every engine, and the mutation tests on stand-ins with a broken rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from threading import Thread

import torch
from torch import Tensor

from flashinfer_engine import Engine, causal, dense
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.backends.flashinfer.pages import PagedBuffers
from ifkv.backends.plans import UNSCALED, KVScales
from ifkv.backends.spec import AttentionSpec

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
            query, keys, values, *before, plan, AttentionSpec(SCALING, window)
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
    mask: str = "positions",
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
        out = backend.attend_buffer(query, keys, values, plan, AttentionSpec(SCALING, window))
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
    out = backend.attend_pages(query, buffers, plan, AttentionSpec(SCALING))
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
    plan = backend.plan_queries([asked], [at])
    spec = AttentionSpec(SCALING, window)
    for _ in range(2):
        out, lse = backend.attend_queries(
            query, *own, context[:1], context[1:], plan, spec, scales=[scales]
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
        scaled = spec.scaled(scales.keys)
        got = backend.attention_norm(
            query, context[0], lse, plan.parts[0], scaled, reduction=reduction
        )
        engine.equal(got, norm, f"attention norm {reduction}")
        weighed = backend.attention_norm(
            query,
            context[0],
            lse,
            plan.parts[0],
            scaled,
            reduction=reduction,
            values=context[1],
        )
        sizes = meant[1][0].cpu().double().abs().sum(-1).mean(0)
        engine.equal(weighed * scales.values, norm * sizes, f"{reduction} norm times values")


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
            query,
            *own,
            *given,
            plan,
            AttentionSpec(SCALING, window),
            scales=[scales] * requests,
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
    plan = backend.plan_requests([torch.tensor(slots)], [length], engine.device)
    for window in (None, 7, None, 7):
        out = backend.attend_buffer(query, keys, values, plan, AttentionSpec(SCALING, window))
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
    for mask in ("split", "positions"):
        eight_bit(engine, mask)
    check_query(engine, rounded=True)
    check_query(engine, rounded=True, window=9)


def eight_bit(engine: Engine, mask: str) -> None:
    backend, dim = engine.backend(mask), engine.head_dim
    slots = [3, 4, 9, 40, 50]
    query = engine.random(1, 4, len(slots), dim, seed=1)
    wide = [engine.random(1, 2, 64, dim, seed=s) for s in (2, 3)]
    small, meant, scales = eight_bits(wide)
    plan = backend.plan_requests([torch.tensor(slots)], [64], engine.device)
    out = backend.attend_buffer(query, *small, plan, AttentionSpec(SCALING), scales=scales)
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


def check_many_rows(engine: Engine) -> None:
    """Enough of them, and of documents, for fa3; the rows read most keys without a mask."""
    slots = [*range(1, 800, 2), *range(810, 1000), *range(1003, 1100, 3)]
    for mask in ("split", "positions"):
        check_rows(engine, [slots], [1100], (32, 8), capacity=1152, mask=mask)
    check_documents(engine, [200, 128, 300], 5, (32, 8))
    check_query(engine, 700, 300, (32, 8), capacity=320)


def check_scattered_rows(engine: Engine) -> None:
    check_rows(engine)
    check_rows(engine, window=6)
    check_rows(engine, mask="split")


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
    "many_rows": check_many_rows,
}
