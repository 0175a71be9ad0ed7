"""What ifkv relies on in FlashInfer, as checks on an engine: each asserts one of its rules.

The tests run all of them on every engine, and the mutation tests on stand-ins with a broken rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flashinfer_engine import WORKSPACE, Engine, causal, dense


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
    """Plan one request of 3 rows over 11 slots on pages of 4; see `setting`."""
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
        pytest.skip("only a Hopper GPU has fa3")
    mask = torch.ones(33, dtype=torch.bool, device=engine.device)
    wrapper = paged(engine, backend="auto", module=engine.strict)
    strict = {"head_dim_qk": 128, "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    plan_paged(engine, wrapper, **strict)
    assert wrapper._backend == "fa3"
    query = torch.zeros(3, 4, 128, dtype=torch.bfloat16, device=engine.device)
    pages = torch.zeros(5, 2, 4, 128, dtype=torch.bfloat16, device=engine.device)

    def plan_and_run() -> None:
        plan_paged(engine, wrapper, custom_mask=mask, **strict)
        wrapper.run(query, (pages, pages))

    must_fail(plan_and_run)


def rule_auto_takes_fa2_for_eight_bit_keys(engine: Engine) -> None:
    """fa3 wants queries of 8 bits beside such keys; "auto" knows, and takes the other kernels."""
    wrapper = paged(engine, backend="auto", module=engine.strict)
    kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.float8_e4m3fn}
    plan_paged(engine, wrapper, head_dim_qk=128, **kinds)
    assert wrapper._backend == "fa2"


def must_fail(call: Callable[[], None]) -> None:
    """Whatever the module raises, at plan or at run."""
    with pytest.raises((ValueError, RuntimeError, AssertionError, KeyError, TypeError)):
        call()


def refused(engine: Engine, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """A plan and run that must fail; `dtype` is that of the tensors."""
    known = {"head_dim_qk": 128, "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
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
    query = torch.zeros(3, 4, 128, dtype=torch.bfloat16, device=engine.device)
    pages = torch.zeros(5, 2, 4, 128, dtype=torch.bfloat16, device=engine.device)
    wrapper.plan(
        ints([0, 3]), ints([0, 3]), ints([4, 0, 2]), ints([3]), 4, 2, page_size=4,
        head_dim_qk=128,
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
            head_dim_qk=128,
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


RULE_CHECKS: dict[str, Callable[[Engine], None]] = {
    name.removeprefix("rule_"): check for name, check in globals().items() if name[:5] == "rule_"
}
STANDIN_CHECKS: dict[str, Callable[[Engine], None]] = {
    "int32": standin_int32,
    "mask_length": standin_mask_length,
    "pages_alike": standin_pages_alike,
}
