"""Pending rows join the next passes, and come out as if they had run before."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import InvalidInputError
from ifkv.patching import handle_of
from ifkv.selectors import AttentionNorm, Request, names, resolve
from ifkv.steps import partial_depth as depths
from ifkv.steps import pending_rows
from ifkv.steps.pending_rows import defer
from ifkv.testing import assert_close, shared_tiny_model
from ifkv.testing.strategies import Request as Tokens
from ifkv.testing.strategies import documents as lists_of_documents
from ifkv.testing.strategies import slot_subsets, token_ids
from scenario import (
    EXACT,
    Bench,
    Scenario,
    assert_rows_equal,
    keys_of,
    poison,
    prepared,
    scenarios,
)

LOOKS_AT_ANY_ROW = {"cacheblend", "deviation-aware", "oracle"}


def extended(bench: Bench, before: list[int], further: list[list[int]], how: str) -> StitchedCache:
    """A cache with tokens before further documents, that have been run or are pending."""
    model, cache = bench.model, bench.stitch()
    if how == "pending":
        defer(model, cache, before)
        poison(cache, slice(cache.context_length - len(before), None), torch.nan)
    else:
        ifkv.recompute(model, cache, cache.add_tokens(before))
    more = ifkv.prefill_documents(model, further, prefix=bench.request.prefix)
    ifkv.extend(model, cache, more)
    return cache


@given(
    s=scenarios(),
    before=token_ids(1, 5),
    further=lists_of_documents(max_documents=2, max_length=6),
    data=st.data(),
)
def test_pending_rows_are_those_of_a_separate_pass(s: Scenario, before, further, data) -> None:
    """Scored once, twice, not at all, as deep or less; then recomputed with any slots."""
    model, layers = s.model, s.model.config.num_hidden_layers
    total = s.total + len(before) + sum(map(len, further))
    chosen = data.draw(slot_subsets(total, first=s.total))
    scored = data.draw(st.lists(st.integers(0, layers - 1), max_size=2))
    block = data.draw(st.none() | st.integers(1, 6))
    reach = data.draw(
        st.none() | st.lists(st.integers(0, layers), min_size=len(chosen), max_size=len(chosen))
    )
    with prepared(model, s.request) as bench:
        pending, ran = (extended(bench, before, further, how) for how in ("pending", "ran"))
        own = range(s.total, s.total + len(before))
        if reach is not None:  # pending rows run through all layers, whatever depth they are given
            reach = [layers if c in own else d for c, d in zip(chosen, reach, strict=True)]
        for layer in scored:
            norms = [ifkv.score(model, c, s.request.query, layers=[layer]) for c in (pending, ran)]
            assert_close(norms[0], norms[1], what="scores", tolerance=1e-6)  # they are float32
        got, want = (
            ifkv.recompute(
                model, c, chosen, prompt_ids=s.request.prompt, block_tokens=block, depths=reach
            )
            for c in (pending, ran)
        )
    assert_close(got, want, what="logits", tolerance=EXACT)
    assert_rows_equal(pending, ran, what="with rows that were pending")
    assert pending.pending is not None
    assert len(pending.pending.slots) == 0


@pytest.mark.parametrize("name", names())
def test_every_selector_chooses_as_if_they_had_run(name: str) -> None:
    model = shared_tiny_model(family="llama", seed=1)
    selector = resolve(name)
    assert type(selector).only_scores == (name not in LOOKS_AT_ANY_ROW)
    with ifkv.patch(model):
        first, second = ifkv.prefill_documents(
            model, [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], prefix=[1]
        )
        found = []
        for run_before in (True, False):
            cache = ifkv.stitch(model, [first])
            defer(model, cache, [30, 31, 32])
            if run_before or not selector.only_scores:
                ifkv.recompute(model, cache, [])
            view = cache.choosing(ifkv.extend(model, cache, [second]))
            chosen = selector.select(model, view, Request([20, 21], [20]), 0.5)
            logits = ifkv.recompute(model, cache, chosen.slots, prompt_ids=[20, 21])
            found.append((chosen.slots.tolist(), logits))
    assert found[0][0] == found[1][0]
    assert_close(found[1][1], found[0][1], what="logits", tolerance=EXACT)


def test_a_copy_keeps_its_own_pending_tokens() -> None:
    model = shared_tiny_model(family="llama", seed=1)
    with ifkv.patch(model):
        document, other = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1])
        cache = ifkv.stitch(model, [document])
        defer(model, cache, [30, 31])
        view, twin = cache.choosing(torch.tensor([1])), cache.clone()
        ifkv.score(model, view, [20], layers=[1])
        assert cache.pending.layer == view.pending.layer == 1
        assert twin.pending.layer == 0
        ifkv.recompute(model, twin, [])
        assert len(twin.pending.slots) == 0
        assert cache.pending.slots.tolist() == [4, 5]
        ifkv.extend(model, cache, [other])
        ifkv.recompute(model, cache, [])
        assert_close(keys_of(cache)[:, :, :6], keys_of(twin), what="keys", tolerance=EXACT)
        defer(model, twin, [])  # nothing
        assert len(twin.pending.slots) == 0


# --- work, counted ------------------------------------------------------------------------------


def passes(model: Any, run: Any) -> Counter[str]:
    """How often each layer's projections were called, and with how many rows."""
    calls: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            calls[f"{name} calls"] += 1
            calls[f"{name} rows"] += args[0][..., 0].numel()

        return ifkv.observer(hook)

    hooks = [
        layer.self_attn.q_proj.register_forward_pre_hook(watch(str(index)))
        for index, layer in enumerate(model.base_model.layers)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def turn(chat: Any, selector: Any) -> Counter[str]:
    return passes(
        chat._engine.model,
        lambda: chat.ask("Rain?", ratio=0.3, max_new_tokens=1, selector=selector),
    )


def conversation(layers: int = 6) -> tuple[Any, list[str]]:
    from conversing import TEXTS, make_session

    session = make_session(num_layers=layers)
    lamp, door, rain, hill = session.add(TEXTS)
    chat = session.conversation([lamp, door])
    chat.ask("Red?", max_new_tokens=3)
    return chat, [rain, hill]


def check_turn_reads_weights_twice(selector: Any) -> None:
    """Scoring layers are passed twice, deeper ones once, and no row runs twice but the prompt's."""
    chat, documents = conversation()
    chat.add(documents)
    calls = turn(chat, selector)
    answer = chat.answers[-1]
    before = answer.document_slices[2].start - answer.document_slices[1].stop
    before -= len(chat.answers[0].prompt_ids) + len(chat.answers[0].token_ids) - 1
    prompt, slots = len(answer.prompt_ids), len(answer.slots)
    deepest = selector.layers.within(6)[-1]
    once = before + slots + prompt
    for layer in range(5):
        scored = layer <= deepest
        assert calls[f"{layer} calls"] == 1 + scored, f"layer {layer}"
        twice = prompt + (before if layer == deepest else 0) if scored else 0
        assert calls[f"{layer} rows"] == once + twice, f"layer {layer}"


def test_a_turn_with_new_documents_reads_the_weights_twice() -> None:
    check_turn_reads_weights_twice(AttentionNorm())


def test_a_pass_of_their_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionNorm, "only_scores", False)
    with pytest.raises(AssertionError, match="layer 0"):
        check_turn_reads_weights_twice(AttentionNorm())


def test_a_selector_that_may_look_at_any_row_is_given_them_all() -> None:
    @dataclasses.dataclass(frozen=True)
    class Looking(AttentionNorm):
        """It inherits nothing of what its parent says about the rows it reads."""

        def rank(self, model: Any, cache: Any, request: Any) -> Any:
            assert len(cache.pending.slots) == 0
            return super().rank(model, cache, request)

    chat, documents = conversation()
    chat.add(documents)
    assert turn(chat, Looking())["0 calls"] == 3


def test_what_has_run_is_not_pending() -> None:
    """Once the tokens have run, scoring and generating take the cache as any other."""
    request = Tokens([1, 2], [[5, 6, 7], [8, 9]], [3, 4], [20, 21])
    with prepared(shared_tiny_model("llama"), request) as bench:
        cache = extended(bench, [30, 31], [[40, 41]], "pending")
        with pytest.raises(InvalidInputError, match="2 rows of the context have not run yet"):
            ifkv.generate(bench.model, cache, [20, 21])
        ifkv.score(bench.model, cache, [20, 21], layers=[1])
        with pytest.raises(InvalidInputError, match="2 rows of the context have not run yet"):
            ifkv.generate(bench.model, cache, [20, 21])
        ifkv.recompute(bench.model, cache, [], prompt_ids=[20, 21])
        ifkv.score(bench.model, cache, [20, 21], layers=[2])
        assert ifkv.generate(bench.model, cache, [20, 21], max_new_tokens=1).shape == (1, 3)


def test_no_pass_is_joined_without_pending_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary request meets none of this."""
    monkeypatch.setattr(pending_rows.PendingPass, "__init__", None)
    monkeypatch.setattr(depths, "run_by_depth", None)
    model = shared_tiny_model(family="llama", seed=1)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1])
        cache = ifkv.stitch(model, documents)
        scores = ifkv.score(model, cache, [20, 21])
        ifkv.recompute(model, cache, ifkv.select(cache, scores), prompt_ids=[20, 21])


def test_pending_rows_attend_only_where_their_outputs_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The deepest scoring layer is run for their keys and values: the recompute begins with it."""
    request = Tokens([1, 2], [[5, 6, 7], [8, 9]], [3, 4], [20, 21])
    with prepared(shared_tiny_model("llama"), request) as bench:
        cache = extended(bench, [30, 31], [[40, 41]], "pending")
        backend = type(handle_of(bench.model).backend)
        attend, calls = backend.attend_requests, Counter[str]()

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls["attend"] += 1
            return attend(*args, **kwargs)

        monkeypatch.setattr(backend, "attend_requests", counted)
        ifkv.score(bench.model, cache, [20, 21], layers=[2])
        assert calls["attend"] == 2
