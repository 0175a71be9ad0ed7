"""Law 1 at the answer: with everything recomputed, generate() is the model's own generate().

And what the contract adds: the cache is ready for the next question, a cache may be handed to
`model.generate()` by hand, and shares nothing between sequences that diverge.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import ifkv
from ifkv.generation.settings import DEFAULT_MAX_NEW_TOKENS
from ifkv.testing import assert_bit_equal, assert_close, shared_tiny_model
from ifkv.testing.strategies import Request
from scenario import EXACT, Bench, Scenario, keys_of, prepared, scenarios, values_of
from tried import FAMILIES

REQUEST = Request([1, 2], [[5, 6, 7, 8], [9, 10], [11] * 7], [3, 4], [12, 13, 14])

WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False, max_new_tokens=8),
    "beams": dict(num_beams=3, do_sample=False, max_new_tokens=6),
    "beams returned": dict(num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=6),
    "sampling": dict(do_sample=True, temperature=1.3, max_new_tokens=8),
    "sampled sequences": dict(do_sample=True, num_return_sequences=3, max_new_tokens=6),
    "sampled beams": dict(do_sample=True, num_beams=2, max_new_tokens=5),
    "repetition penalty": dict(repetition_penalty=1.9, do_sample=False, max_new_tokens=8),
    "no repeated pairs": dict(no_repeat_ngram_size=2, do_sample=False, max_new_tokens=8),
    "top k": dict(do_sample=True, top_k=5, top_p=0.9, max_new_tokens=8),
    "an end token": dict(eos_token_id=list(range(0, 97, 2)), pad_token_id=0, max_new_tokens=8),
    "a config": dict(generation_config=GenerationConfig(max_new_tokens=5, num_beams=2)),
}


class Listener(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def full_ids(cache: ifkv.StitchedCache, prompt: list[int]) -> Tensor:
    return torch.cat([cache.token_ids, torch.tensor(prompt)])[None]


def repaired(bench: Bench, fused: bool) -> ifkv.StitchedCache:
    """Everything recomputed; the prompt's rows with it or not."""
    cache = bench.stitch()
    prompt = bench.request.prompt if fused else None
    ifkv.recompute(bench.model, cache, range(cache.context_length), prompt_ids=prompt)
    return cache


def both_ways(bench: Bench, cache: ifkv.StitchedCache, **kwargs: Any) -> tuple[Any, Any, Tensor]:
    """The library's answer, the model's own, and the full ids."""
    ids = full_ids(cache, bench.request.prompt)
    torch.manual_seed(7)
    got = ifkv.generate(bench.model, cache, bench.request.prompt, **kwargs)
    torch.manual_seed(7)
    expected: Any = bench.model.generate(ids, **kwargs)
    return got, expected, ids


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_law_1_every_way_of_generating(way: str, fused: bool) -> None:
    model = shared_tiny_model("qwen2")
    with prepared(model, REQUEST) as bench:
        cache = repaired(bench, fused)
        before = keys_of(cache)[:, :, : cache.context_length].clone()
        got, expected, _ = both_ways(bench, cache, **WAYS[way])
        assert torch.equal(got, expected[:, cache.context_length :])
        assert_bit_equal(keys_of(cache), before, what="keys afterwards")
        # Ready for the same question, and for the next.
        again, expected, _ = both_ways(bench, cache, **WAYS[way])
        assert torch.equal(again, expected[:, cache.context_length :])


@given(s=scenarios(), fused=st.booleans())
def test_law_1_greedy_answers_of_any_model(s: Scenario, fused: bool) -> None:
    with prepared(s.model, s.request) as bench:
        cache = repaired(bench, fused)
        got, expected, _ = both_ways(bench, cache, do_sample=False, max_new_tokens=4)
    assert torch.equal(got, expected[:, cache.context_length :])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 2])
def test_law_1_scores_of_the_answer(family: str, beams: int) -> None:
    """What return_dict_in_generate adds is the model's own, and so are sequences cut to prompt."""
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    with prepared(shared_tiny_model(family), REQUEST) as bench:
        cache = repaired(bench, False)
        got, expected, _ = both_ways(bench, cache, max_new_tokens=5, num_beams=beams, **options)
    assert type(got) is type(expected)
    assert torch.equal(got.sequences, expected.sequences[:, cache.context_length :])
    for name in ("scores", "logits"):
        for ours, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
            assert_close(ours, theirs, what=name, tolerance=EXACT)


@pytest.mark.parametrize("fused", [False, True])
def test_a_streamer_hears_prompt_and_answer(fused: bool) -> None:
    """What the model's own streaming says, but for the context."""
    with prepared(shared_tiny_model("llama"), REQUEST) as bench:
        cache = repaired(bench, fused)
        ours, theirs = Listener(), Listener()
        ids = ifkv.generate(bench.model, cache, REQUEST.prompt, max_new_tokens=5, streamer=ours)
        bench.model.generate(full_ids(cache, REQUEST.prompt), max_new_tokens=5, streamer=theirs)
    assert ours.ended
    assert ours.heard[0] == REQUEST.prompt
    assert ours.heard[1:] == theirs.heard[1:]
    assert [token for part in ours.heard for token in part] == ids[0].tolist()


@pytest.mark.parametrize(("length", "expected"), [(8, 8), (4, 4)])
def test_lengths_count_from_the_prompts_start(length: int, expected: int) -> None:
    with prepared(shared_tiny_model("llama"), REQUEST) as bench:
        cache = bench.stitch()
        ids = ifkv.generate(bench.model, cache, REQUEST.prompt, max_length=length)
        assert ids.shape == (1, expected)
        config = GenerationConfig(max_length=length, do_sample=False)
        ids = ifkv.generate(bench.model, cache, REQUEST.prompt, generation_config=config)
        assert ids.shape == (1, expected)
        assert config.max_length == length
        free = ifkv.generate(bench.model, cache, REQUEST.prompt)
        assert free.shape == (1, 3 + DEFAULT_MAX_NEW_TOKENS)


@pytest.mark.parametrize("fused", [False, True])
def test_a_models_own_least_length_counts_as_after_a_full_prefill(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model's own config it counts context, prompt and answer, as for transformers."""
    ends = dict(eos_token_id=list(range(96)), pad_token_id=0, max_new_tokens=9, do_sample=False)
    model = shared_tiny_model("llama")
    with prepared(model, REQUEST) as bench:
        cache = repaired(bench, fused)
        before = cache.context_length + len(REQUEST.prompt)
        assert len(both_ways(bench, cache, **ends)[0][0]) == len(REQUEST.prompt) + 1
        for least in (before - 1, before + 5):
            monkeypatch.setattr(model.generation_config, "min_length", least)
            got, expected, _ = both_ways(bench, cache, **ends)
            assert torch.equal(got, expected[:, cache.context_length :])
            assert got.shape[1] - len(REQUEST.prompt) == max(1, least + 1 - before)
        monkeypatch.setattr(model.generation_config, "min_length", 0)
        asked = ifkv.generate(model, cache, REQUEST.prompt, min_length=7, **ends)
        assert asked.shape[1] == 7 + 1


def test_what_generate_does_not_know_is_refused_at_once() -> None:
    with prepared(shared_tiny_model("llama"), REQUEST) as bench:
        with pytest.raises(ifkv.IfkvError, match=r"tempereture .* did you mean temperature"):
            ifkv.generate(bench.model, bench.stitch(), REQUEST.prompt, tempereture=0.5)
        with pytest.raises(ifkv.IfkvError, match=r"xyzzy is no option .* leave it out"):
            ifkv.generate(bench.model, bench.stitch(), REQUEST.prompt, xyzzy=1)


def test_assisted_decoding_is_refused() -> None:
    """Upstream's loses tokens behind any cache that holds a context already."""
    with prepared(shared_tiny_model("llama"), REQUEST) as bench:
        for assistant in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=bench.model)):
            with pytest.raises(ifkv.IfkvError, match="assist"):
                ifkv.generate(bench.model, bench.stitch(), REQUEST.prompt, **assistant)


@pytest.mark.parametrize("setting", ["prompt_lookup_num_tokens", "token_healing"])
def test_what_a_models_own_config_says_counts_beside_a_config_given(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate() fills up what a config given leaves out."""
    own = GenerationConfig(max_new_tokens=3)
    with prepared(shared_tiny_model("llama"), REQUEST) as bench:
        monkeypatch.setattr(bench.model.generation_config, setting, 3, raising=False)
        with pytest.raises(ifkv.IfkvError, match=rf"{setting} .* leave it out"):
            ifkv.generate(bench.model, bench.stitch(), REQUEST.prompt, generation_config=own)


def test_beams_of_a_models_own_config_beside_a_config_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = GenerationConfig(max_new_tokens=4, do_sample=False)
    with prepared(shared_tiny_model("llama"), REQUEST) as bench:
        monkeypatch.setattr(bench.model.generation_config, "num_beams", 3)
        cache = repaired(bench, False)
        got, expected, _ = both_ways(bench, cache, generation_config=own)
    assert torch.equal(got, expected[:, cache.context_length :])


def answer_logits(model: PreTrainedModel, cache: ifkv.StitchedCache, ids: list[int]) -> Tensor:
    twin = cache.clone()
    logits = ifkv.recompute(model, twin, [], prompt_ids=ids)
    assert logits is not None
    return logits


@given(s=scenarios())
def test_the_cache_is_reusable_after_an_answer(s: Scenario) -> None:
    """For any selection: same rows as before, same answer again, fused or separate."""
    prompt = s.request.prompt
    with prepared(s.model, s.request) as bench:
        cache = bench.recomputed(s.slots, s.order)
        keys, values = keys_of(cache).clone(), values_of(cache).clone()
        first = ifkv.generate(s.model, cache, prompt, max_new_tokens=4, do_sample=False)
        assert_bit_equal(keys_of(cache), keys, what="keys after an answer")
        assert_bit_equal(values_of(cache), values, what="values after an answer")
        second = ifkv.generate(s.model, cache, prompt, max_new_tokens=4, do_sample=False)
        fused = bench.stitch(s.order)
        ifkv.recompute(s.model, fused, s.slots, prompt_ids=prompt)
        third = ifkv.generate(s.model, fused, prompt, max_new_tokens=4, do_sample=False)
        other = ifkv.generate(s.model, fused, s.request.query, max_new_tokens=4, do_sample=False)
        fresh = ifkv.generate(s.model, cache, s.request.query, max_new_tokens=4, do_sample=False)
    assert torch.equal(second, first)
    assert torch.equal(third, first)
    assert torch.equal(other, fresh)


@given(s=scenarios(), tokens=st.integers(1, 5))
def test_answers_are_greedy_in_the_librarys_own_logits(s: Scenario, tokens: int) -> None:
    """For any selection each token is the best one of a fused forward over all before it."""
    prompt = s.request.prompt
    with prepared(s.model, s.request) as bench:
        cache = bench.recomputed(s.slots, s.order)
        ids = ifkv.generate(s.model, cache, prompt, max_new_tokens=tokens, do_sample=False)[0]
        for step in range(tokens):
            sofar = ids[: len(prompt) + step].tolist()
            assert answer_logits(s.model, cache, sofar).argmax() == ids[len(sofar)]


@given(s=scenarios(), prompt_only=st.booleans())
def test_a_stitched_cache_by_hand(s: Scenario, prompt_only: bool) -> None:
    """In both forms: the full ids, or the prompt's with an attention mask of full length."""
    with prepared(s.model, s.request) as bench:
        cache = bench.recomputed(s.slots, s.order)
        expected = ifkv.generate(
            s.model, cache, s.request.prompt, max_new_tokens=4, do_sample=False
        )
        ids = full_ids(cache, s.request.prompt)
        given_ids = ids[:, s.total :] if prompt_only else ids
        out = s.model.generate(
            given_ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(out[:, given_ids.shape[1] :], expected[:, len(s.request.prompt) :])
        assert torch.equal(out[:, : given_ids.shape[1]], given_ids)
        assert cache.get_seq_length() == ids.shape[1] + 3
        cache.crop()
        again = ifkv.generate(s.model, cache, s.request.prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, expected)
