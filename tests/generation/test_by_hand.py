"""A stitched cache handed to `model.generate()` by hand: its own answer, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.models.compat import cache_keyword
from ifkv.testing import assert_bit_equal, tiny_model
from scenario import keys_of
from tried import FAMILIES

DOCUMENTS = [[5, 6, 7, 8], [9, 10], [11] * 7]
PROMPT = [12, 13, 14]
LONG = list(range(20, 60))
GREEDY = dict(max_new_tokens=5, do_sample=False)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = tiny_model(request.param)
    ifkv.patch(made)
    yield made
    ifkv.unpatch(made)


def stitched(model: Any) -> ifkv.StitchedCache:
    return ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS, prefix=[1, 2]))


def by_hand(model: Any, cache: Any, ids: Any, **kwargs: Any) -> list[int]:
    given = torch.as_tensor(ids)[None]
    named = cache_keyword(model, cache)
    out = model.generate(given, **named, **{**GREEDY, **kwargs})
    return out[0, given.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_tokens_of_context_and_prompt_are_answered(model: Any, prompt: list[int]) -> None:
    cache = stitched(model)
    expected = ifkv.generate(model, cache, prompt, **GREEDY)[0, len(prompt) :].tolist()
    whole = torch.cat((cache.token_ids, torch.tensor(prompt)))
    assert by_hand(model, cache, whole) == expected
    cache.crop()
    mask = torch.ones(1, len(whole), dtype=torch.long)
    assert by_hand(model, cache, prompt, attention_mask=mask) == expected


BAD: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a prompt shorter than the context": (
        lambda m, c: by_hand(m, c, PROMPT),
        r"3 tokens that do not continue the 15 rows.*ifkv\.generate\(model, cache, prompt_ids\)",
    ),
    "a prompt longer than the context": (
        lambda m, c: by_hand(m, c, LONG),
        r"40 tokens that do not continue the 15 rows.*ifkv\.generate",
    ),
    "a prompt as long as the context": (
        lambda m, c: by_hand(m, c, LONG[:15]),
        r"15 tokens that do not continue.*ifkv\.generate",
    ),
    "the context alone": (
        lambda m, c: by_hand(m, c, c.token_ids),
        r"15 tokens that do not continue.*ifkv\.generate",
    ),
    "another context": (
        lambda m, c: by_hand(m, c, torch.cat((c.token_ids.flip(0), torch.tensor(PROMPT)))),
        r"18 tokens that do not continue.*ifkv\.generate",
    ),
    "a mask of another length": (
        lambda m, c: by_hand(m, c, PROMPT, attention_mask=torch.ones(1, 20).long()),
        r"3 tokens and an attention mask of 20.* has to cover all 18.*ifkv\.generate",
    ),
    "a mask with holes": (
        lambda m, c: by_hand(
            m, c, PROMPT, attention_mask=torch.tensor([[0] * 2 + [1] * 16], dtype=torch.long)
        ),
        r"mask hides some of the 15 rows.*ifkv\.generate",
    ),
    "two prompts": (
        lambda m, c: m.generate(torch.tensor([LONG, LONG]), **cache_keyword(m, c), **GREEDY),
        r"40 tokens that do not continue.*ifkv\.generate",
    ),
    "a prompt for beams": (
        lambda m, c: by_hand(m, c, PROMPT, num_beams=3),
        r"3 tokens that do not continue.*ifkv\.generate",
    ),
    "embeddings": (
        lambda m, c: m.generate(
            inputs_embeds=m.get_input_embeddings()(torch.tensor([LONG])),
            **cache_keyword(m, c),
            **GREEDY,
        ),
        r"inputs_embeds beside a stitched cache.*ifkv\.generate",
    ),
    "chunks": (
        lambda m, c: by_hand(
            m, c, torch.cat((c.token_ids, torch.tensor(PROMPT))), prefill_chunk_size=4
        ),
        r"prefill_chunk_size is 4.*ifkv\.generate",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_continue_the_cache_is_refused(name: str) -> None:
    call, message = BAD[name]
    model = tiny_model("llama")
    with ifkv.patch(model):
        cache = stitched(model)
        before = keys_of(cache).clone()
        with pytest.raises(InvalidInputError, match=rf"(?s){message}"):
            call(model, cache)
        assert cache.get_seq_length() == cache.context_length
        assert_bit_equal(keys_of(cache), before, what="keys after the refusal")


def test_behind_a_prompt_that_has_been_run_its_tokens_count_too() -> None:
    model = tiny_model("llama")
    with ifkv.patch(model):
        cache = stitched(model)
        expected = ifkv.generate(model, cache, [*PROMPT, 7], **GREEDY)[0, 4:].tolist()
        ifkv.recompute(model, cache, [], prompt_ids=PROMPT)
        context = cache.token_ids.tolist()
        with pytest.raises(InvalidInputError, match="do not continue the 18 rows"):
            by_hand(model, cache, [*context, 3, 4, 5, 7])
        assert by_hand(model, cache, [*context, *PROMPT, 7]) == expected


def test_an_answer_goes_on_by_hand() -> None:
    """The cache holds the answer's rows but for the last one's, as transformers' caches do."""
    model = tiny_model("llama")
    with ifkv.patch(model):
        cache = stitched(model)
        whole = ifkv.generate(model, cache, PROMPT, max_new_tokens=8, do_sample=False)[0]
        ids = torch.cat((cache.token_ids, torch.tensor(PROMPT)))[None]
        for _ in range(2):
            config = GenerationConfig(max_new_tokens=4, do_sample=False)
            ids = model.generate(ids, **cache_keyword(model, cache), generation_config=config)
        assert ids[0, cache.context_length :].tolist() == whole.tolist()


def test_assisted_decoding_is_refused() -> None:
    """Upstream's loses tokens behind any cache that holds a context already."""
    model = tiny_model("llama")
    with ifkv.patch(model):
        cache = stitched(model)
        whole = torch.cat((cache.token_ids, torch.tensor(PROMPT * 2)))
        with pytest.raises(InvalidInputError, match=r"assisted decoding|crop\("):
            by_hand(model, cache, whole, assistant_model=tiny_model("llama"), max_new_tokens=9)
