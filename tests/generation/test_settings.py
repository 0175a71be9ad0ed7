"""What can be said to generate() means the same in every way of asking, wherever it is said.

At ratio 1 a session's answer is the model's own over context and prompt, so that every setting can
be held against `model.generate()`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from server import Service
from transformers import GenerationConfig

import ifkv
from ifkv.evaluation.compare import compare
from ifkv.generation.greedy import GreedySettings, greedy_settings
from ifkv.generation.settings import DEFAULT_MAX_NEW_TOKENS, GenerationSettings
from ways_of_asking import EVEN, PLACES, QUESTION, WAYS, asked

SETTINGS: dict[str, dict[str, Any]] = {
    "max_new_tokens": dict(max_new_tokens=3),
    "an end token": dict(max_new_tokens=9, eos_token_id=EVEN),
    "least length": dict(max_new_tokens=9, eos_token_id=list(range(250)), min_new_tokens=4),
    "sampling": dict(max_new_tokens=8, do_sample=True, temperature=1.7, top_p=0.9, top_k=40),
    "beams": dict(max_new_tokens=6, num_beams=3, length_penalty=0.4),
    "sampled beams": dict(max_new_tokens=5, num_beams=2, do_sample=True),
    "repetition penalty": dict(max_new_tokens=8, repetition_penalty=1.9),
    "no repeated pairs": dict(max_new_tokens=8, no_repeat_ngram_size=2),
    "suppressed": dict(max_new_tokens=6, suppress_tokens=EVEN),
    "bad words": dict(max_new_tokens=6, bad_words_ids=[[token] for token in EVEN]),
    "a bias": dict(max_new_tokens=6, sequence_bias=[[[7], 9.0]]),
    "a growing end": dict(
        max_new_tokens=9, eos_token_id=5, exponential_decay_length_penalty=[2, 3.0]
    ),
    "guidance": dict(max_new_tokens=5, guidance_scale=1.5),
    "a forced end": dict(max_new_tokens=5, forced_eos_token_id=9),
    "nothing": dict(max_new_tokens=DEFAULT_MAX_NEW_TOKENS),
}


def plain(session: ifkv.Session, said: dict[str, Any]) -> list[int]:
    """The model's own answer over context and prompt."""
    prompt = torch.tensor(session.format.prompt_ids(QUESTION))
    ids = torch.cat((session.context_ids(), prompt))[None]
    model: Any = session.model
    torch.manual_seed(7)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, pad_token_id=1, **said)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_means_what_it_means_to_generate(
    session: ifkv.Session, tmp_path: Path, name: str, place: str
) -> None:
    expected = plain(session, SETTINGS[name])
    said = {} if name == "nothing" else SETTINGS[name]
    options = PLACES[place](session, tmp_path, said)
    given = {key: vars(value).copy() for key, value in options.items() if hasattr(value, "update")}
    for way, ask in WAYS.items():
        torch.manual_seed(7)
        assert ask(session, **options) == expected, way
    for key, before in given.items():
        if isinstance(options[key], GenerationConfig):
            assert vars(options[key]) == before, "a config given stays as it is"
    service = Service(session)
    if not options and "do_sample" not in said:
        reply = service.ask(QUESTION, session.keys)
        assert reply["answer"] == session.ask(QUESTION).text


@pytest.mark.parametrize("place", PLACES)
def test_a_stop_string_ends_the_answer_wherever_it_is_said(
    session: ifkv.Session, tmp_path: Path, place: str
) -> None:
    whole = asked(session, max_new_tokens=24)
    texts = [session.tokenizer.decode([token]) for token in whole]
    at = next(i for i, text in enumerate(texts) if text.isascii() and text.isprintable())
    said = dict(max_new_tokens=24, stop_strings=[texts[at]])
    options = PLACES[place](session, tmp_path, said)
    for way, ask in WAYS.items():
        assert ask(session, **options) == whole[: at + 1], way
    assert session.ask(QUESTION, **options).finish_reason == "stop_string"
    if not options:
        ways = compare(session, QUESTION, ratios=(1.0,))
        assert [(way.tokens, way.finish_reason) for way in ways] == [(at + 1, "stop_string")] * 2


@pytest.mark.parametrize("place", PLACES)
def test_the_greatest_length_counts_from_the_prompts_start_or_the_contexts(
    session: ifkv.Session, tmp_path: Path, place: str
) -> None:
    """In the model's own config from the context's, as after a full prefill."""
    prompt = len(session.format.prompt_ids(QUESTION))
    own = place in ("as_attributes", "as_file")
    length = prompt + 5 + (len(session.context_ids()) if own else 0)
    options = PLACES[place](session, tmp_path, dict(max_length=length))
    for way, ask in WAYS.items():
        assert len(ask(session, **options)) == 5, way
        assert len(ask(session, max_new_tokens=2, **options)) == 2, way


def test_what_is_said_nearer_comes_first(session: ifkv.Session) -> None:
    session.model.generation_config.max_new_tokens = 9
    prompt = len(session.format.prompt_ids(QUESTION))
    near = GenerationConfig(max_length=prompt + 5)
    for ask in WAYS.values():
        assert len(ask(session)) == 9
        assert len(ask(session, generation_config=near)) == 5
        assert len(ask(session, generation_config=near, max_new_tokens=2)) == 2
        assert len(ask(session, max_length=prompt + 7)) == 7
    session.model.generation_config.do_sample = True
    greedy = asked(session, do_sample=False)
    assert asked(session, generation_config=GenerationConfig(do_sample=False)) == greedy


def test_requests_of_a_batch_have_the_length_that_is_left_to_each(session: ifkv.Session) -> None:
    longer = QUESTION + " Say it."
    total = len(session.format.prompt_ids(longer)) + 2
    answers = session.ask_many([QUESTION, longer], max_length=total)
    more = len(longer) - len(QUESTION)
    assert [len(answer.token_ids) for answer in answers] == [2 + more, 2]


@pytest.mark.parametrize("by_hand", [False, True])
def test_chunks_of_a_prefill_change_no_token(session: ifkv.Session, by_hand: bool) -> None:
    expected = asked(session, max_new_tokens=5)
    session.model.generation_config.prefill_chunk_size = 4
    if by_hand:
        ready = session.prepare(QUESTION)
        out = ifkv.generate(session.model, ready.cache, ready.prompt_ids, max_new_tokens=5)
        assert out[0, len(ready.prompt_ids) :].tolist() == expected
    else:
        assert asked(session, max_new_tokens=5) == expected


def test_several_prompts_by_hand_have_the_models_own_length(session: ifkv.Session) -> None:
    session.model.generation_config.max_new_tokens = 3
    session.model.generation_config.do_sample = True  # greedy all the same, as documented
    ready = [session.prepare(QUESTION) for _ in range(2)]
    caches, prompts = [one.cache for one in ready], [one.prompt_ids for one in ready]
    answers = ifkv.generate_many(session.model, caches, prompts)
    expected = asked(session, do_sample=False)
    assert [answer.tolist() for answer in answers] == [expected] * 2
    assert len(expected) == 3


def test_what_a_file_says_beside_settings_costs_no_batch(session: ifkv.Session) -> None:
    """Entries that generate() does not know, and neutral values, leave greedy answers greedy."""
    own = GenerationConfig(chat_format="chatml", num_beams=1, no_repeat_ngram_size=0, top_k=20)
    session.model.generation_config = own
    assert isinstance(greedy_settings(GenerationSettings.of(session.model, {})), GreedySettings)
    own.do_sample = True
    assert greedy_settings(GenerationSettings.of(session.model, {})) == "do_sample=True"


def test_a_comparison_is_greedy_whatever_the_file_says(session: ifkv.Session) -> None:
    expected = [way.text for way in compare(session, QUESTION, ratios=(1.0,), max_new_tokens=6)]
    own = session.model.generation_config
    own.num_beams, own.do_sample, own.max_new_tokens = 4, True, 6
    found = compare(session, QUESTION, ratios=(1.0,))
    assert [way.text for way in found] == expected
    assert [way.tokens for way in found] == [6, 6]
    assert {way.finish_reason for way in found} == {"length"}
