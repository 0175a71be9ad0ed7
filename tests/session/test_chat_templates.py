"""Requests are laid out by the tokenizer's own chat template, or refused; the same every day."""

from __future__ import annotations

import datetime
import warnings
from typing import Any

import pytest
import torch

import ifkv
from chat_templates import DEAF, GEMMA, LLAMA2, LLAMA3, MISTRAL_SMALL, QWEN3, OwnWay, tokenizer_with
from ifkv.errors import FingerprintMismatchError, InvalidInputError, PromptWarning
from ifkv.session.prompt_format import INSTRUCTION, PromptFormat
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model

TEXTS = ["The lamp is red.", "The door is green."]
SYSTEM = " You answer kindly. "


def model_for(tokenizer: Any) -> Any:
    options = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 2048}
    return tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer), **options)


def session_of(template: str | None, **options: Any) -> ifkv.Session:
    tokenizer = tokenizer_with(template)
    return ifkv.Session(model_for(tokenizer), tokenizer, **{"store": MemoryStore(), **options})


def laid_out(format: PromptFormat, documents: list[str], question: str) -> list[int]:
    """A whole request, as a session puts it together."""
    made = [token for text in documents for token in format.document_ids(text)]
    return format.prefix_ids() + made + format.prompt_ids(question)


def message_of(documents: list[str], question: str) -> str:
    return INSTRUCTION + "".join(f"{text}\n\n" for text in documents) + f"Question: {question}"


# --- Whatever class the tokenizer is of


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("template", [LLAMA3, QWEN3, LLAMA2])
def test_a_request_is_what_the_tokenizer_makes_of_its_messages(
    template: str, system: str | None
) -> None:
    tokenizer = tokenizer_with(template)
    date = {} if template != LLAMA3 else {"date": "2026-11-30"}
    given = {} if template != LLAMA3 else {"date_string": "30 Nov 2026"}
    format = PromptFormat(tokenizer, system=system, **date)
    turns = [{"role": "user", "content": message_of(TEXTS, "Which?")}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    expected = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, **given
    )
    assert laid_out(format, TEXTS, "Which?") == expected


def test_a_tokenizer_that_lays_messages_out_by_itself() -> None:
    tokenizer: Any = OwnWay()
    session = ifkv.Session(model_for(tokenizer), tokenizer, store=MemoryStore())
    turns = [{"role": "user", "content": message_of(TEXTS, "Which?")}]
    expected = tokenizer.apply_chat_template(turns)
    assert expected[:2] == [1, 3]
    assert laid_out(session.format, TEXTS, "Which?") == expected
    session.add(TEXTS)
    chat = session.conversation()
    chat.ask("Which?", max_new_tokens=3)
    chat.ask("And?", max_new_tokens=3)
    said = tokenizer.decode(chat.token_ids)
    assert said.count("[INST]") == 2
    assert said.startswith("<s>[INST]Answer")


def test_letters_of_control_tokens_are_letters_to_such_a_tokenizer() -> None:
    format = PromptFormat(OwnWay())
    assert format.document_ids("a</s>") == OwnWay()("a</s>\n\n")["input_ids"]
    assert format.prompt_ids("[/INST]")[-1] == 4
    assert format.prompt_ids("[/INST]").count(4) == 1
    assert format.parse("<s>a") == [1, *OwnWay()("a")["input_ids"]]
    parsing = PromptFormat(OwnWay(), control_tokens="parse")
    assert parsing.document_ids("a</s>")[1] == 2


def test_a_tokenizer_whose_text_is_not_its_ids_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"word for word.*OwnWay"):
        PromptFormat(OwnWay(loses_spaces=True))

    class Quiet(OwnWay):
        def decode(self, ids: Any, skip_special_tokens: bool = True, **_: Any) -> str:
            return super().decode(ids, skip_special_tokens=True)

    with pytest.raises(InvalidInputError, match=r"token ids for a conversation.*Quiet"):
        PromptFormat(Quiet())


def test_a_tokenizer_that_splits_control_tokens_does_not_split_the_templates() -> None:
    expected = laid_out(PromptFormat(tokenizer_with(QWEN3)), TEXTS, "Which?")
    tokenizer = tokenizer_with(QWEN3)
    tokenizer.split_special_tokens = True
    assert laid_out(PromptFormat(tokenizer), TEXTS, "Which?") == expected


def test_a_template_that_raises_is_named() -> None:
    tokenizer = tokenizer_with("{{ raise_exception('Only tools here.') }}")
    with pytest.raises(InvalidInputError, match=r"Only tools here\); set tokenizer.chat_template"):
        PromptFormat(tokenizer)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        PromptFormat(tokenizer_with("{% if %}"))
    several: Any = tokenizer_with(None)
    several.chat_template = {"rag": QWEN3}
    with pytest.raises(InvalidInputError, match="no chat template by default"):
        PromptFormat(several)
    several.chat_template = {"rag": LLAMA2, "default": QWEN3}
    assert "You are Qwen." in PromptFormat(several).prefix_text


# --- A template that prints today's date


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime(2031, 5, 6)


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called, it is another day to chat templates."""
    import transformers.utils.chat_template_utils as upstream

    return lambda: monkeypatch.setattr(upstream, "datetime", Tomorrow)


def test_documents_are_found_the_next_day(tomorrow: Any) -> None:
    store = MemoryStore()
    with pytest.warns(PromptWarning, match=r"today's date.*2024-07-26.*date='today'"):
        first = session_of(LLAMA3, store=store)
    assert first.add(TEXTS)
    assert "Today Date: 26 Jul 2024" in first.format.prefix_text
    tomorrow()
    with pytest.warns(PromptWarning):
        second = session_of(LLAMA3, store=store)
    second.add(TEXTS)
    assert second.prefilled == 0


def test_a_time_of_day_is_noticed_like_a_date() -> None:
    with pytest.warns(PromptWarning, match="date or time"):
        session_of("{{ 'At ' + strftime_now('%H:%M') }}" + QWEN3)


def test_a_session_goes_on_over_midnight(tomorrow: Any) -> None:
    session = session_of(LLAMA3, date="today")
    today = datetime.date.today()
    session.add(TEXTS[:1])
    tomorrow()
    session.add(TEXTS[1:])
    assert f"Today Date: {today:%d %b %Y}" in session.format.prefix_text
    chat = session.conversation()
    chat.ask("Which?", max_new_tokens=2)
    chat.ask("And?", max_new_tokens=2)
    assert session.ask("Which?", max_new_tokens=2).token_ids.numel() <= 2


def test_a_date_can_be_given_and_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        for date in ("2026-11-30", datetime.date(2026, 11, 30)):
            format = PromptFormat(tokenizer_with(LLAMA3), date=date)
            assert "Today Date: 30 Nov 2026" in format.prefix_text
            assert format.prefix_ids()
        own = PromptFormat(tokenizer_with(LLAMA3), chat_template_kwargs={"date_string": "a Monday"})
        assert "Today Date: a Monday\n" in own.prefix_text
        assert own.prefix_ids()
        assert PromptFormat(tokenizer_with(QWEN3)).prefix_ids()


def test_a_system_prompt_in_the_dates_place_leaves_no_date() -> None:
    with pytest.warns(PromptWarning):
        dated = session_of(MISTRAL_SMALL)
    assert "The current date is 2024-07-26." in dated.format.prefix_text
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        told = session_of(MISTRAL_SMALL, system=SYSTEM)
    assert "date" not in told.format.prefix_text
    with pytest.raises(InvalidInputError, match="prints no date"):
        session_of(MISTRAL_SMALL, system=SYSTEM, date="today")


def test_bad_dates_are_refused() -> None:
    for date in ("30.11.2026", 7, ""):
        with pytest.raises(InvalidInputError, match="2026-01-31"):
            PromptFormat(tokenizer_with(LLAMA3), date=date)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="prints no date"):
        PromptFormat(tokenizer_with(QWEN3), date="today")
    made_up = "{% set form = '%d' ~ '%m' %}{{ strftime_now(form) }}{{ messages[0].content }}"
    with pytest.raises(InvalidInputError, match="spell out"):
        PromptFormat(tokenizer_with(made_up))


def test_prefixes_that_differ_are_shown_where_they_do() -> None:
    store = MemoryStore()
    tokenizer = tokenizer_with(LLAMA3)
    model = model_for(tokenizer)
    one, other = (
        ifkv.Session(model, tokenizer, store=store, date=date)
        for date in ("2026-11-30", "2026-12-01")
    )
    keys = one.add(TEXTS[:1]) + other.add(TEXTS[1:])
    with pytest.raises(FingerprintMismatchError) as refused:
        one.ask("Which?", documents=keys)
    assert "01 Dec 2026" in str(refused.value)
    assert "30 Nov 2026" in str(refused.value)
    assert "one prefix" in str(refused.value)
    assert len(str(refused.value)) < 400
    with pytest.raises(FingerprintMismatchError) as below:
        ifkv.stitch(model, [store.get(key) for key in keys])
    assert "at token" in str(below.value)
    assert len(str(below.value)) < 400


# --- System prompts and variables


@pytest.mark.parametrize("template", [LLAMA3, QWEN3, LLAMA2])
def test_a_system_prompt_is_part_of_the_prefix(template: str) -> None:
    date = {"date": "2026-11-30"} if template == LLAMA3 else {}
    store = MemoryStore()
    plain = session_of(template, store=store, **date)
    told = session_of(template, store=store, system=SYSTEM, **date)
    assert SYSTEM.strip() in told.format.prefix_text
    assert set(plain.add(TEXTS)).isdisjoint(told.add(TEXTS))
    assert told.prefilled == 2
    if template == QWEN3:
        assert "You are Qwen." in plain.format.prefix_text
        assert "You are Qwen." not in told.format.prefix_text
    if template != LLAMA2:  # which writes a space before an answer, and no turns alike
        chat = told.conversation()
        chat.ask("Which?", max_new_tokens=2)
        chat.ask("And?", max_new_tokens=2)
        assert told.tokenizer.decode(chat.token_ids).count(SYSTEM.strip()) == 1


def test_a_template_that_refuses_or_ignores_a_system_prompt_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"system cannot be given.*not supported"):
        session_of(GEMMA, system=SYSTEM)
    with pytest.raises(InvalidInputError, match=r"ignores or changes it.*instruction"):
        session_of(DEAF, system=SYSTEM)
    with pytest.raises(InvalidInputError, match=r"no chat template.*instruction"):
        session_of(None, system=SYSTEM)
    with pytest.raises(InvalidInputError, match="roles must be"):
        PromptFormat(OwnWay(), system=SYSTEM)
    for blank in ("", " ", 3):
        with pytest.raises(InvalidInputError, match=f"system is {blank!r}"):
            PromptFormat(tokenizer_with(QWEN3), system=blank)  # type: ignore[arg-type]
    assert session_of(GEMMA).add(TEXTS)


def test_variables_reach_the_template() -> None:
    tokenizer = tokenizer_with(QWEN3)
    format = PromptFormat(tokenizer, chat_template_kwargs={"enable_thinking": False})
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": message_of(TEXTS, "Which?")}],
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=False,
    )
    assert laid_out(format, TEXTS, "Which?") == expected
    thoughts = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [token for token in expected if token in thoughts] == thoughts
    assert PromptFormat(tokenizer).prompt_ids("Which?") != format.prompt_ids("Which?")


def test_a_conversation_whose_template_drops_empty_thoughts_is_refused() -> None:
    session = session_of(QWEN3, chat_template_kwargs={"enable_thinking": False})
    session.add(TEXTS)
    with pytest.raises(InvalidInputError, match=r"earlier turns cannot be kept.*ask\(\)"):
        session.conversation()


def test_what_is_no_text_and_what_names_no_variables_is_refused() -> None:
    for given in (3, None, ["Read."]):
        with pytest.raises(InvalidInputError, match=r"instruction is .*give the text"):
            PromptFormat(tokenizer_with(QWEN3), given)  # type: ignore[arg-type]
    wrong: Any = [1]
    with pytest.raises(InvalidInputError, match=r"chat_template_kwargs is \[1\]"):
        PromptFormat(tokenizer_with(QWEN3), chat_template_kwargs=wrong)


def test_variables_that_nothing_reads_are_refused() -> None:
    for template, given, message in (
        (QWEN3, {"enable_thinkng": False}, r"'enable_thinkng'.*reads .*enable_thinking"),
        (QWEN3, {"tokenize": True}, "'tokenize'.*not the caller's"),
        (QWEN3, {"messages": []}, "'messages'.*not the caller's"),
        (LLAMA3, {"strftime_now": "x"}, "'strftime_now'.*not the caller's"),
        (None, {"enable_thinking": False}, "no chat template"),
        (QWEN3, {3: False}, "names are texts"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            PromptFormat(tokenizer_with(template), chat_template_kwargs=given)
    with pytest.raises(InvalidInputError, match=r"'enable_thinking'.*reads tools"):
        PromptFormat(OwnWay(), chat_template_kwargs={"enable_thinking": False})


def test_a_prefix_stands_for_system_prompt_and_date() -> None:
    for given in ({"system": SYSTEM}, {"date": "today"}):
        with pytest.raises(InvalidInputError, match="prefix was given together"):
            session_of(LLAMA3, prefix="Mine.", **given)
    session = session_of(QWEN3, prefix="<|im_start|>Mine.")
    assert session.prefix_ids == session.format.parse("<|im_start|>Mine.")
    assert session.prefix_ids[0] == session.tokenizer.convert_tokens_to_ids("<|im_start|>")
