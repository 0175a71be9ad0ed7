"""Settings that cannot be followed are refused before any work, in every way of asking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ifkv
import ifkv.session.ask
import ifkv.session.complete
import ifkv.session.prepare
from ifkv.errors import InvalidInputError
from ways_of_asking import PLACES, QUESTION, WAYS

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
