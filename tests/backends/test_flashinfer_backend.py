"""The FlashInfer backend: on a stand-in everywhere, on FlashInfer itself under `pytest -m gpu`.

The same checks run on three engines: the stand-in with exact arithmetic, the stand-in in bfloat16,
and the real module on a GPU.
"""

import inspect

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flashinfer_checks import (
    BACKEND_CHECKS,
    check_documents,
    check_pages,
    check_queries,
    check_query,
    check_rows,
    eight_bit,
    eight_bits,
)
from flashinfer_engine import Engine, causal, dense
from flashinfer_rules import RULE_CHECKS, STANDIN_CHECKS
from flashinfer_standin import RULES, FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.backends.flashinfer.calls import kernels
from ifkv.backends.flashinfer.tiles import parts_of_rows
from ifkv.backends.plans import UNSCALED
from ifkv.backends.spec import AttentionSpec

HALF = 0.03  # of 1 + |value|: three of bfloat16's roundings


def exact_engine(*broken: str) -> Engine:
    relaxed = FlashInferStandIn(relaxed=True, broken=broken)
    strict = FlashInferStandIn(broken=broken)
    return Engine(strict, relaxed, torch.device("cpu"), torch.float64, 8, 1e-10)


def half_engine() -> Engine:
    module = FlashInferStandIn()
    return Engine(module, module, torch.device("cpu"), torch.bfloat16, 64, HALF)


def real_engine() -> Engine:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    flashinfer = pytest.importorskip("flashinfer")
    return Engine(flashinfer, flashinfer, torch.device("cuda"), torch.bfloat16, 128, HALF)


@pytest.fixture(
    scope="module", params=["exact", "bfloat16", pytest.param("real", marks=pytest.mark.gpu)]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    return {"exact": exact_engine, "bfloat16": half_engine, "real": real_engine}[request.param]()


@pytest.mark.parametrize("check", RULE_CHECKS.values(), ids=RULE_CHECKS)
def test_flashinfer_keeps_the_rules_ifkv_relies_on(engine, check):
    check(engine)


@pytest.mark.parametrize("check", STANDIN_CHECKS.values(), ids=STANDIN_CHECKS)
def test_the_standin_refuses_what_flashinfer_would_misread(check):
    check(exact_engine())


@pytest.mark.parametrize("check", BACKEND_CHECKS.values(), ids=BACKEND_CHECKS)
def test_the_backend_agrees_with_the_dense_oracle(engine, check):
    check(engine)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "wrapper", ["BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper"]
)
@pytest.mark.parametrize("method", ["plan", "run"])
def test_the_standin_has_no_argument_that_flashinfer_has_not(wrapper, method):
    module = real_engine().module
    theirs = inspect.signature(getattr(getattr(module, wrapper), method)).parameters
    ours = inspect.signature(getattr(getattr(FlashInferStandIn(), wrapper), method)).parameters
    assert set(ours) <= set(theirs)
    required = [p.name for p in theirs.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    assert [name for name in required if name != "args"] == [
        p.name for p in ours.values() if p.default is p.empty and p.name != "args"
    ]


# --- mutation checks: a stand-in that breaks a rule must be found out ----------------------------


@pytest.mark.parametrize("rule", RULES)
def test_breaking_a_rule_is_noticed(rule):
    engine = exact_engine(rule)
    noticed = []
    for name, check in (RULE_CHECKS | STANDIN_CHECKS | BACKEND_CHECKS).items():
        try:
            check(engine)
        except (Exception, pytest.fail.Exception):
            noticed.append(name)
            break
    assert noticed, f"nothing depends on the rule that {rule}"


# Rules of the arithmetic must be noticed by the backend's own results, not only by a test of the
# module: otherwise ifkv would not depend on them.
ARITHMETIC = [
    "causal is right-aligned",
    "logsumexp is base 2",
    "merge_state is base 2",
    "last_page_len counts",
    "page indices count",
    "page indptr counts",
    "pages are HND",
    "masks are concatenated",
    "masks are row-major",
    "true means visible",
    "masks hide",
    "window_left leaves self out",
    "windows are right-aligned",
    "heads are grouped in order",
    "sm_scale counts",
    "rows that see nothing weigh nothing",
    "rows are requests in order",
    "k_scale and v_scale count",
    "one plan a wrapper",
]


@pytest.mark.parametrize("rule", ARITHMETIC)
def test_the_backend_depends_on_every_rule_of_the_arithmetic(rule):
    engine = exact_engine(rule)
    for check in BACKEND_CHECKS.values():
        try:
            check(engine)
        except (AssertionError, ValueError, RuntimeError, IndexError):
            return
    pytest.fail(f"the backend's results do not depend on the rule that {rule}")


def test_tiles_read_little_more_than_their_rows_see():
    """15 % of 32k slots and a prompt, four query heads to a key head."""
    length = 32768
    chosen = torch.randperm(length, generator=torch.Generator().manual_seed(0))[
        : length * 15 // 100
    ]
    slots = torch.cat((chosen.sort().values, torch.arange(length, length + 64)))
    parts = parts_of_rows([slots], 4, 64, None)
    read = {k: sum((p.stop - p.start) * (p.end - p.begin) for p in v) for k, v in parts.items()}
    assert sum(read.values()) < 1.01 * int((slots + 1).sum())
    assert read["masked"] < 0.04 * read["full"]


def test_a_short_run_is_not_read_in_a_call_of_its_own():
    """Unless there is nothing else, as in a decoding step, or it is long."""
    prompt, selected = torch.arange(1000, 1064), torch.arange(1, 1000, 3)
    long = torch.arange(300, 500)

    def kinds(*slots):
        parts = parts_of_rows(slots, 4, 64, None)
        return {kind: {p.sequence for p in some} for kind, some in parts.items() if some}

    assert kinds(prompt, torch.tensor([7])) == {"causal": {0, 1}}
    assert kinds(prompt, selected) == {"full": {0, 1}, "masked": {0, 1}}
    assert kinds(long, selected) == {"causal": {0}, "full": {1}, "masked": {1}}


@pytest.mark.parametrize(
    ("rows", "heads", "masked", "expected"),
    [
        ([128] * 4, 32, False, "auto"),
        ([128] * 4, 32, True, "fa2"),
        ([128] * 3, 32, False, "fa2"),  # most multiprocessors would be idle
        ([32] * 100, 32, False, "fa2"),  # tiles of one head would be three quarters empty
        ([1], 64, False, "fa2"),
        ([64] * 4, 32, False, "auto"),
        ([32768], 8, False, "auto"),
        ([], 8, False, "fa2"),
    ],
)
def test_which_kernels_run_a_call(rows, heads, masked, expected):
    assert kernels(rows, heads, masked=masked) == expected


def test_eight_bit_values_in_our_own_kernel():
    eight_bit(exact_engine(), "positions")


def test_what_eight_bit_keys_and_values_cost():
    """Against bfloat16 on normally distributed keys and values: 12 to 20 times its error.

    e4m3 keeps 3 bits behind the point where bfloat16 keeps 7: 16 times the rounding error.
    """
    backend = FlashInferBackend(FlashInferStandIn(relaxed=True), workspace_bytes=2**20)
    generator = torch.Generator().manual_seed(0)
    rows, length, dim = 64, 2048, 128
    slots = torch.arange(7, length, length // rows)
    query, keys, values = (
        torch.randn(1, heads, n, dim, generator=generator, dtype=torch.float64)
        for heads, n in ((8, len(slots)), (2, length), (2, length))
    )
    want, _ = dense(query[0], keys[0], values[0], causal(slots.tolist(), length), dim**-0.5)

    def error(keys, values, scales=UNSCALED):
        plan = backend.plan_requests([slots], [length], torch.device("cpu"))
        spec = AttentionSpec(dim**-0.5)
        out = backend.attend_requests(query, [keys], [values], plan, spec, scales=[scales])
        return float((out[0] - want).norm() / want.norm())

    half = error(*(x.to(torch.bfloat16) for x in (keys, values)))
    small, _, scales = eight_bits((keys, values))
    eight = error(*small, scales)
    assert half < 0.004
    assert eight < 0.05
    assert 12 < eight / half < 20


# --- properties on the exact stand-in ----------------------------------------------------------

EXACT = exact_engine()
BACKENDS = {mask: EXACT.backend(mask) for mask in ("positions", "split")}
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3), (64, 2), (128, 1)])
WINDOWS = st.sampled_from([None, None, 1, 3, 17, 64, 1000])


@st.composite
def row_slots(draw, total):
    """Slots of rows: scattered, runs of adjacent ones, the first, the last, one, all, none."""
    kind = draw(st.sampled_from(["any", "runs", "first", "last", "one", "all", "none"]))
    if kind == "runs":
        runs = draw(st.lists(st.tuples(st.integers(0, total - 1), st.integers(1, 40)), max_size=5))
        chosen = {slot for start, n in runs for slot in range(start, min(start + n, total))}
    elif kind == "any":
        chosen = draw(st.sets(st.integers(0, total - 1), max_size=50))
    else:
        one = draw(st.integers(0, total - 1))
        chosen = {
            "first": {0, one},
            "last": {one, total - 1},
            "one": {one},
            "all": set(range(total)),
            "none": set(),
        }[kind]
    return sorted(chosen)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    return lengths, [draw(row_slots(length)) for length in lengths]


@given(
    batch=batches(),
    heads=HEADS,
    window=WINDOWS,
    spare=st.sampled_from([0, 1, 7, 40, 64]),
    mask=st.sampled_from(list(BACKENDS)),
)
def test_rows_agree_with_the_dense_oracle(batch, heads, window, spare, mask):
    lengths, slots = batch
    check_rows(EXACT, slots, lengths, heads, window, max(lengths) + spare, backend=BACKENDS[mask])


@given(
    batch=batches(),
    heads=HEADS,
    page_size=st.sampled_from([1, 2, 3, 5, 16, 64]),
    seed=st.integers(0, 99),
)
def test_rows_on_shuffled_pages_agree_with_the_dense_oracle(batch, heads, page_size, seed):
    lengths, slots = batch
    slots = [own or [0] for own in slots]
    check_pages(EXACT, slots, lengths, page_size, heads, seed)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    prefix=st.integers(0, 9),
    heads=HEADS,
    window=WINDOWS,
)
def test_documents_agree_with_the_dense_oracle(lengths, prefix, heads, window):
    check_documents(EXACT, lengths, prefix, heads, window, backend=BACKENDS["split"])


@given(
    rows=st.integers(1, 20),
    length=st.integers(1, 150),
    heads=HEADS,
    window=WINDOWS,
    spare=st.sampled_from([0, 1, 42, 64]),
    gap=st.integers(0, 30),
)
def test_queries_agree_with_the_dense_oracle(rows, length, heads, window, spare, gap):
    check_query(EXACT, rows, length, heads, window, length + spare, gap)


@given(data=st.data(), heads=HEADS, window=WINDOWS, gap=st.integers(0, 30), rounded=st.booleans())
def test_queries_of_several_requests_agree_with_the_dense_oracle(data, heads, window, gap, rounded):
    requests = data.draw(st.integers(1, 4))
    counts = [data.draw(st.integers(1, 9)) for _ in range(requests)]
    lengths = [data.draw(st.integers(1, 128)) for _ in range(requests)]
    order = data.draw(st.permutations(range(requests)))
    together = data.draw(st.booleans())
    check_queries(EXACT, counts, lengths, heads, window, 128, gap, order, rounded, together)
