"""What can be said to generate() means the same in every way of asking, wherever it is said.

At ratio 1 a session's answer is the model's own over context and prompt, so that every setting can
be held against `model.generate()`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server import Service
from transformers import GenerationConfig
from typer.testing import CliRunner

import ifkv
import ifkv.generation.greedy
import ifkv.session.ask
import ifkv.session.complete
import ifkv.session.prepare
from ifkv.cli import app
from ifkv.errors import InvalidInputError
from ifkv.evaluation.compare import compare
from ifkv.generation.settings import DEFAULT_MAX_NEW_TOKENS
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green."]
QUESTION = "Which?"
EVEN = list(range(0, 260, 2))

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


@pytest.fixture(scope="module")
def made() -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    session = ifkv.Session(model, tokenizer, store=MemoryStore(), ratio=1)
    session.add(TEXTS)
    return session


@pytest.fixture
def session(made: ifkv.Session) -> Iterator[ifkv.Session]:
    """With the model's own generation config as it was, afterwards."""
    own = made.model.generation_config
    made.model.generation_config = GenerationConfig()
    yield made
    made.model.generation_config = own


def asked(session: ifkv.Session, **options: Any) -> list[int]:
    return session.ask(QUESTION, **options).token_ids.tolist()


def asked_together(session: ifkv.Session, **options: Any) -> list[int]:
    return session.ask_many([QUESTION], **options)[0].token_ids.tolist()


def streamed(session: ifkv.Session, **options: Any) -> list[int]:
    stream = session.stream(QUESTION, **options)
    text = "".join(stream)
    assert stream.answer is not None
    assert text.strip() == stream.answer.text
    return stream.answer.token_ids.tolist()


def streamed_together(session: ifkv.Session, **options: Any) -> list[int]:
    pieces: list[str] = []
    (answer,) = session.ask_many([QUESTION], stream=lambda _, text: pieces.append(text), **options)
    assert "".join(pieces).strip() == answer.text
    return answer.token_ids.tolist()


def conversed(session: ifkv.Session, **options: Any) -> list[int]:
    return session.conversation().ask(QUESTION, **options).token_ids.tolist()


def completed(session: ifkv.Session, **options: Any) -> list[int]:
    return session.complete(session.prepare(QUESTION), **options).token_ids.tolist()


WAYS: dict[str, Callable[..., list[int]]] = {
    each.__name__: each
    for each in (asked, asked_together, streamed, streamed_together, conversed, completed)
}


def as_keywords(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    return said


def as_config(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    return {"generation_config": GenerationConfig(**said)}


def as_attributes(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    for name, value in said.items():
        setattr(session.model.generation_config, name, value)
    return {}


def as_file(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(said))
    session.model.generation_config = GenerationConfig.from_pretrained(folder)
    return {}


PLACES = {each.__name__: each for each in (as_keywords, as_config, as_attributes, as_file)}


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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "several answers": (dict(num_return_sequences=2, num_beams=2), "num_return_sequences"),
    "assisted": (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens.*assisted"),
    "a cache": (dict(cache_implementation="static"), "cache_implementation"),
    "token healing": (dict(token_healing=True), "token_healing"),
    "contrastive search": (dict(penalty_alpha=0.6, top_k=4), "penalty_alpha.*from its hub"),
    "groups of beams": (
        dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
        "num_beam_groups.*from its hub",
    ),
    "forced words": (dict(force_words_ids=[[5]], num_beams=2), "force_words_ids.*from its hub"),
    "no room": (dict(max_length=3), r"max_length is 3 .* tokens; give max_new_tokens"),
    "stop strings of another kind": (dict(stop_strings=[5]), r"stop_strings is \[5\]"),
    "no temperature": (dict(do_sample=True, temperature=0.0), "temperature"),
    "no stop tokens at all": (dict(eos_token_id=[]), "eos_token_id is an empty list"),
    "a negative penalty": (dict(repetition_penalty=-1.0), "penalty"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_before_any_work(
    session: ifkv.Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: str,
) -> None:
    said, message = REFUSED[name]
    ready = session.prepare(QUESTION)
    options = PLACES[place](session, tmp_path, said)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(ifkv.session.prepare, "stitch_many", refuse)
    monkeypatch.setattr(ifkv.session.ask, "prepare", refuse)
    monkeypatch.setattr(ifkv.session.complete, "run_generate", refuse)
    monkeypatch.setattr(ifkv.session.complete, "decode", refuse)
    for way, ask in WAYS.items():
        if way == "completed":
            continue
        with pytest.raises(InvalidInputError, match=message) as refusal:
            ask(session, **options)
        assert any(word in str(refusal.value) for word in _words(place)), way
    with pytest.raises(InvalidInputError, match=message):
        session.complete(ready, **options)


def _words(place: str) -> list[str]:
    if place == "as_keywords":
        return ["keyword", "cannot be given", "generate() cannot be told"]
    if place == "as_config":
        return ["in the generation config given", "generate() cannot be told"]
    return ["in the model's generation config", "generate() cannot be told"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=True), "max_new_tokens is True"),
        (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
        (dict(max_length=0), "max_length is 0"),
        (dict(generation_config={"max_new_tokens": 3}), "generation_config is a dict"),
        (dict(stopping_criteria=len), "stopping_criteria is .* list of functions"),
        (dict(stopping_criteria=[3]), "stopping_criteria is .* list of functions"),
        (dict(logits_processor=["x"]), "logits_processor is .* list of functions"),
        (dict(output_scores=True), "output_scores=True cannot be given here"),
        (dict(custom_generate="a/b"), "custom_generate='a/b' cannot be given here"),
        (dict(early_stopping="soon"), "early_stopping"),
        (dict(num_return_sequences=2), "num_return_sequences"),
        (dict(num_beams=0), "num_beams is 0"),
        (dict(num_beams="4"), "num_beams is '4'"),
        (dict(num_beams=2.5), "num_beams is 2.5"),
        (dict(min_new_tokens="x"), "min_new_tokens is 'x'"),
        (dict(min_new_tokens=-1), "min_new_tokens is -1"),
        (dict(max_time="x"), "max_time is 'x'"),
        (dict(guidance_scale="x"), "guidance_scale is 'x'"),
        (dict(eos_token_id="x"), "cannot be told"),
        (
            dict(exponential_decay_length_penalty=(1, 1.5), eos_token_id=None),
            r"fails over these settings: .*'exponential_decay_length_penalty'",
        ),
    ],
)
def test_bad_settings_are_refused(
    session: ifkv.Session, options: dict[str, Any], message: str
) -> None:
    for ask in WAYS.values():
        with pytest.raises(InvalidInputError, match=message):
            ask(session, **options)


def test_settings_of_the_config_that_is_none_of_generation_are_refused(
    session: ifkv.Session,
) -> None:
    """generate() refuses them too, after all the work; greedy batches would ignore them."""
    config: Any = session.model.config
    config.num_beams = 4
    try:
        for ask in WAYS.values():
            with pytest.raises(InvalidInputError, match=r"model.config holds {'num_beams': 4}"):
                ask(session)
    finally:
        del config.num_beams


def test_stop_strings_by_hand_need_a_tokenizer(session: ifkv.Session) -> None:
    ready = session.prepare(QUESTION)
    with pytest.raises(InvalidInputError, match=r"stop_strings .* give tokenizer="):
        ifkv.generate(session.model, ready.cache, ready.prompt_ids, stop_strings=["."])


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
    settings = ifkv.generation.greedy.greedy_settings(session.model, {})
    assert isinstance(settings, ifkv.generation.greedy.GreedySettings)
    own.do_sample = True
    assert ifkv.generation.greedy.greedy_settings(session.model, {}) == "do_sample=True"


def test_a_comparison_is_greedy_whatever_the_file_says(session: ifkv.Session) -> None:
    expected = [way.text for way in compare(session, QUESTION, ratios=(1.0,), max_new_tokens=6)]
    own = session.model.generation_config
    own.num_beams, own.do_sample, own.max_new_tokens = 4, True, 6
    found = compare(session, QUESTION, ratios=(1.0,))
    assert [way.text for way in found] == expected
    assert [way.tokens for way in found] == [6, 6]
    assert {way.finish_reason for way in found} == {"length"}


# The command line


@pytest.mark.parametrize(
    "said",
    [
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["a"]},
        {"suppress_tokens": EVEN, "num_beams": 2, "do_sample": True},
    ],
)
def test_the_laws_hold_whatever_the_file_says(folder: Path, said: dict[str, Any]) -> None:
    (folder / "model" / "generation_config.json").write_text(json.dumps(said))
    result = CliRunner().invoke(app, ["verify", str(folder / "model"), "--length", "16"])
    assert result.exit_code == 0, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "lamp.txt").write_text("The lamp is red.")
    return tmp_path


def ask_in(folder: Path, said: dict[str, Any] | str, *options: str) -> Any:
    text = said if isinstance(said, str) else json.dumps(said)
    (folder / "model" / "generation_config.json").write_text(text)
    arguments = ["ask", QUESTION, str(folder / "lamp.txt"), "--model", str(folder / "model")]
    return CliRunner().invoke(app, [*arguments, "--store", "memory", *options])


@pytest.mark.parametrize("options", [(), ("--no-compare",)])
def test_the_command_line_follows_the_file(folder: Path, options: tuple[str, ...]) -> None:
    result = ask_in(folder, {"num_beams": 4, "max_new_tokens": 3}, *options)
    assert result.exit_code == 0, result.output
    assert "cut off at 3 tokens" in " ".join(result.output.split())
    said = "num_beams=4; a comparison decodes greedily" in " ".join(result.output.split())
    assert said == (not options)
    result = ask_in(folder, {"max_new_tokens": 3}, "--max-new-tokens", "5", *options)
    assert "cut off at 5 tokens" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences is 2"),
        ({"max_length": 20}, "max_length is 20"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ("{", "generation_config.json cannot be used"),
    ],
)
def test_the_command_line_refuses_before_the_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Any, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("ifkv.cli.load_model.load_model", refuse)
    result = ask_in(folder, said)
    assert result.exit_code != 0
    assert not isinstance(result.exception, AssertionError)
    shown = " ".join(f"{result.output} {result.exception}".split())
    assert message in shown
