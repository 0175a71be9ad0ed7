"""Conversation: what a turn's rows see is what the model's own forward over the history sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ifkv
from conversing import (
    EXACT,
    FORGETFUL,
    LLAMA3,
    TEXTS,
    assert_unchanged,
    make_session,
    own_logits,
    saying,
    state,
)
from ifkv.cost import ModelShape, recompute_cost
from ifkv.errors import InvalidInputError
from ifkv.selectors import Budget
from ifkv.session.prompt_format import FURTHER, INSTRUCTION
from ifkv.testing import assert_bit_equal, assert_close


@pytest.fixture
def session() -> ifkv.Session:
    return make_session()


@pytest.mark.parametrize("template", ["", LLAMA3, None], ids=["chatml", "llama-3", "none"])
def test_ratio_one_is_the_models_own_conversation(template: str | None) -> None:
    """Logits and greedy answers over documents, turn, turn, further documents, turn, turn."""
    session = make_session(template)
    model: Any = session.model
    lamp, door, rain, hill = session.add(TEXTS)
    chat = session.conversation([lamp, door])
    lengths = []
    for question, further in [("Red?", []), ("Old?", []), ("Rain?", [rain, hill]), ("So?", [])]:
        if further:
            chat.add(further)
        answer = chat.ask(question, ratio=1, max_new_tokens=5)
        ids = torch.cat((answer.context_ids, answer.prompt_ids))
        assert_close(
            answer.first_logits, own_logits(session, answer), what=question, tolerance=EXACT
        )
        greedy = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )[0, len(ids) :]
        assert torch.equal(answer.token_ids, greedy)
        lengths.append(len(answer.document_slices))
    assert lengths == [2, 2, 4, 4]
    assert repr(chat) == f"Conversation(4 documents, 4 turns, {len(chat.token_ids)} tokens)"
    assert [answer.question for answer in chat.answers] == ["Red?", "Old?", "Rain?", "So?"]


@pytest.mark.parametrize("template", ["", LLAMA3], ids=["chatml", "llama-3"])
@pytest.mark.parametrize("stop", [True, False], ids=["ended", "cut off"])
def test_the_ids_are_what_the_template_gives_for_the_whole_history(
    template: str, stop: bool
) -> None:
    session = make_session(template)
    lamp, door, rain = session.add(TEXTS[:3])
    chat = session.conversation([lamp, door])
    chat.ask("Red?", **saying(session, "Yes, it is.", stop))
    chat.ask("Old?", **saying(session, "The door.", stop))
    chat.add([rain])
    last = chat.ask("Rain?", **saying(session, "In the valley.", stop))

    texts = [f"{text}\n\n" for text in TEXTS]
    history = [
        ("user", f"{INSTRUCTION}{texts[0]}{texts[1]}Question: Red?"),
        ("assistant", "Yes, it is."),
        ("user", "Question: Old?"),
        ("assistant", "The door."),
        ("user", f"{FURTHER}{texts[2]}Question: Rain?"),
    ]
    messages = [{"role": role, "content": content} for role, content in history]
    rendered = session.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = torch.cat((last.context_ids, last.prompt_ids)).tolist()
    assert session.tokenizer.decode(ids) == rendered
    assert ids == session.format.parse(rendered)
    assert session.tokenizer.decode(chat.token_ids) == rendered + "In the valley."


@pytest.mark.parametrize("template", [FORGETFUL], ids=["forgetful"])
def test_a_template_that_rewrites_earlier_turns_is_refused(template: str) -> None:
    session = make_session(template)
    session.add(TEXTS[:1])
    session.ask("Red?", max_new_tokens=1)  # one question by itself is no matter
    with pytest.raises(InvalidInputError, match="word for word"):
        session.conversation()


def test_the_first_turn_is_ask(session: ifkv.Session) -> None:
    session.add(TEXTS)
    alone = session.ask("Old?", ratio=0.2, max_new_tokens=5)
    first = session.conversation().ask("Old?", ratio=0.2, max_new_tokens=5)
    assert torch.equal(first.token_ids, alone.token_ids)
    assert_bit_equal(first.first_logits, alone.first_logits, what="logits")
    assert torch.equal(first.slots, alone.slots)
    assert first.speedup_bound == alone.speedup_bound


def test_a_turn_without_new_documents_runs_its_own_rows(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = session.conversation(session.add(TEXTS))
    chat.ask("Old?", ratio=0.2, max_new_tokens=3)
    import ifkv.steps.recompute_request

    rows: list[int] = []
    embed = ifkv.steps.recompute_request.embed

    def counted(model: Any, ids: Tensor) -> Tensor:
        rows.append(len(ids))
        return embed(model, ids)

    monkeypatch.setattr(ifkv.steps.recompute_request, "embed", counted)
    before = state(chat)
    answer = chat.ask("Red?", max_new_tokens=3)
    assert rows == [len(answer.prompt_ids)]
    assert set(answer.timings) == {"recompute and prompt", "decode"}
    assert answer.speedup_bound == 1
    assert len(answer.slots) == 0
    assert answer.scores is None
    for old, new in zip(before[3:], state(chat)[3:], strict=True):  # earlier rows stay
        assert_bit_equal(new[:, :, : old.shape[2]], old, what="rows")


def test_new_documents_cost_their_share(session: ifkv.Session) -> None:
    texts = [*TEXTS[:2], 12 * TEXTS[2], 12 * TEXTS[3]]
    lamp, door, rain, hill = session.add(texts)
    chat = session.conversation([lamp, door])
    chat.ask("Red?", max_new_tokens=3)
    start = len(chat.token_ids)
    chat.add([rain])
    chat.add([hill])
    answer = chat.ask("Rain?", ratio=0.3, max_new_tokens=3)
    new = range(answer.document_slices[2].start, answer.document_slices[3].stop)
    assert len(answer.slots) == int(0.3 * len(new))
    assert set(answer.slots.tolist()) <= set(new)
    assert answer.document_slices[3].stop == len(answer.context_ids)
    # All new rows over the kept ones, against those that ran and what choosing them cost.
    shape, total, prompt = ModelShape.of(session.model), new.stop, len(answer.prompt_ids)
    rows = torch.arange(start - 1, total)  # the last token of an answer is run with the next turn
    every = recompute_cost(shape, rows, total, prompt).flops
    between = torch.arange(start - 1, new.start)
    own = recompute_cost(shape, torch.cat((between, answer.slots)), total, prompt).flops
    assert answer.speedup_bound == every / (own + answer.selection_cost.flops) > 1
    assert sorted(answer.timings) == ["decode", "load", "recompute and prompt", "select", "stitch"]
    text = session.tokenizer.decode(answer.context_ids[new.start : new.stop])
    assert text == f"{texts[2]}\n\n{texts[3]}\n\n"


@pytest.mark.parametrize("name", ["attention-norm", "cacheblend", "epic", "random", "two-round"])
def test_selectors_and_budgets_choose_among_new_slots(session: ifkv.Session, name: str) -> None:
    lamp, door, rain, hill = session.add(TEXTS)
    chat = session.conversation([lamp, door])
    chat.ask("Red?", max_new_tokens=2)
    for ratio, further, count in ((0.5, rain, None), (Budget(number=4), hill, 4)):
        chat.add([further])
        answer = chat.ask("Rain?", ratio=ratio, selector=name, max_new_tokens=2)
        own = answer.document_slices[-1]
        assert len(answer.slots) == (count or int(0.5 * (own.stop - own.start)))
        assert own.start <= answer.slots.min() <= answer.slots.max() < own.stop
        assert answer.selector == name
    chat.add([lamp])
    mass = Budget(mass=0.6, cap=0.5, sentences=True)
    answer = chat.ask("Red?", ratio=mass, selector=name, max_new_tokens=2)
    assert 0 < len(answer.slots) <= int(0.5 * (len(TEXTS[0]) + 2))


def test_revisiting_recomputes_what_no_turn_has(session: ifkv.Session) -> None:
    chat = session.conversation(session.add(TEXTS))
    first = chat.ask("Red?", ratio=0.2, max_new_tokens=3)
    slices = first.document_slices
    open_slots = {slot for rows in slices[1:] for slot in range(rows.start, rows.stop)}
    open_slots -= set(first.slots.tolist())
    second = chat.ask("Rain?", ratio=0.25, revisit=True, max_new_tokens=3)
    assert set(second.slots.tolist()) <= open_slots
    assert len(second.slots) == int(0.25 * len(open_slots))
    assert second.speedup_bound < 1  # more than the turn's own rows
    third = chat.ask("So?", ratio=1, revisit=True, max_new_tokens=3)
    assert set(third.slots.tolist()) == open_slots - set(second.slots.tolist())
    assert len(chat.ask("So?", ratio=1, revisit=True, max_new_tokens=3).slots) == 0
    # What a turn has recomputed stays as it was then, and so do the turns themselves.
    cache = ifkv.stitch(session.model, [session.store.get(key) for key in session.keys])
    for answer in (first, second, third):
        ifkv.recompute(session.model, cache, answer.slots)
    assert chat._cache is not None
    for mine, by_hand in zip(chat._cache.layers, cache.layers, strict=True):
        kept = mine.keys[:, :, : cache.context_length]
        assert_close(kept, by_hand.keys, what="keys", tolerance=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(do_sample=True, temperature=1.5),
        dict(repetition_penalty=1.8),
        dict(eos_token_id=list(range(0, 260, 3))),
    ],
    ids=["beams", "sampling", "penalty", "other ends"],
)
def test_every_way_of_decoding_keeps_the_turn(
    session: ifkv.Session, options: dict[str, Any]
) -> None:
    chat = session.conversation(session.add(TEXTS[:2]))
    torch.manual_seed(3)
    first = chat.ask("Red?", ratio=1, max_new_tokens=6, **options)
    second = chat.ask("Old?", ratio=1, max_new_tokens=2)
    assert_close(second.first_logits, own_logits(session, second), what="logits", tolerance=EXACT)
    said = first.token_ids.tolist()
    ends = options.get("eos_token_id", [session.tokenizer.eos_token_id])
    if said[-1] in ends:
        said.pop()
    ids = [*first.context_ids.tolist(), *first.prompt_ids.tolist(), *said]
    asked = torch.cat((second.context_ids, second.prompt_ids)).tolist()
    assert asked == ids + session.format.turn_ids("Old?")


def test_streaming_gives_the_answer_that_ask_gives(session: ifkv.Session) -> None:
    keys = session.add(TEXTS[:2])
    asked, streamed = session.conversation(keys), session.conversation(keys)
    for question in ("Red?", "Old?"):
        answer = asked.ask(question, max_new_tokens=6)
        pieces = list(streamed.stream(question, max_new_tokens=6))
        assert "".join(pieces).strip() == answer.text
        assert torch.equal(streamed.answers[-1].token_ids, answer.token_ids)
    heard: list[str] = []
    asked.ask("So?", max_new_tokens=6, stream=heard.append)
    assert "".join(heard).strip() == asked.answers[-1].text


def test_a_stream_that_is_left_keeps_what_was_said(session: ifkv.Session) -> None:
    chat = session.conversation(session.add(TEXTS[:2]))
    text = " ".join(["word"] * 40)
    pieces = chat.stream("Red?", ratio=1, **saying(session, text))
    first = next(pieces)  # a word, or as little as the release of transformers hands over
    assert first
    assert text.startswith(first)
    with pytest.raises(InvalidInputError, match="still being made"):
        chat.ask("Old?")
    with pytest.raises(InvalidInputError, match="still being made"):
        chat.add(session.keys)
    pieces.close()  # type: ignore[attr-defined]
    partial = chat.answers[-1]
    assert text.startswith(partial.text)
    assert 1 < len(partial.token_ids) < 60
    after = chat.ask("Old?", ratio=1, max_new_tokens=2)
    assert_close(after.first_logits, own_logits(session, after), what="logits", tolerance=EXACT)
    asked = session.tokenizer.decode(after.prompt_ids)
    assert asked.endswith("Question: Old?<|im_end|>\n<|im_start|>assistant\n")
    assert partial.text in session.tokenizer.decode(
        torch.cat((after.context_ids, after.prompt_ids))
    )


def test_a_stream_that_is_never_read_does_nothing(session: ifkv.Session) -> None:
    chat = session.conversation(session.add(TEXTS[:2]))
    before = state(chat)
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        chat.stream("Red?", max_new_tokens=0)
    chat.stream("Red?")
    assert_unchanged(chat, before)
    assert chat.ask("Red?", max_new_tokens=1).text is not None


def test_within_inference_mode(session: ifkv.Session) -> None:
    with torch.inference_mode():
        chat = session.conversation(session.add(TEXTS[:2]))
        chat.ask("Red?", max_new_tokens=2)
        assert "".join(chat.stream("Old?", max_new_tokens=2)) is not None
        assert len(chat.answers) == 2


def test_begun_within_inference_mode_and_continued_outside(session: ifkv.Session) -> None:
    keys, expected = session.add(TEXTS[:2]), None
    for inside in (False, True):
        with torch.inference_mode(inside):
            chat = session.conversation(keys)
            chat.ask("Red?", max_new_tokens=2)
        last = chat.ask("Old?", max_new_tokens=2).first_logits
        expected = last if expected is None else expected
    assert_bit_equal(last, expected, what="logits of the second turn")


def test_the_cache_is_seldom_copied(session: ifkv.Session) -> None:
    chat = session.conversation(session.add(TEXTS[:1]))
    places = set()
    for _ in range(40):
        chat.ask("Red?", max_new_tokens=4)
        assert chat._cache is not None
        places.add(chat._cache.layers[0].key_buffer.data_ptr())
    assert len(chat.token_ids) > 1500
    assert len(places) <= 6


def test_an_answer_of_a_later_turn_is_drawn(session: ifkv.Session) -> None:
    lamp, door, rain = session.add(TEXTS[:3])
    chat = session.conversation([lamp, door])
    chat.ask("Red?", **saying(session, "Secret."))
    chat.add([rain])
    page = chat.ask("Rain?", **saying(session, "In the valley.")).to_html(titles=["a", "b", "c"])
    for word in ("lamp", "door", "rains", "In the valley."):
        assert word in page
    assert "Secret" not in page  # documents are shown, turns are not
    assert "Secret" not in chat.ask("So?", **saying(session, "Well.")).to_html()


@pytest.mark.parametrize(
    ("family", "window"),
    [("llama", None), ("qwen2", 24), ("qwen3", 24), ("mistral", 24), ("phi3", None)],
)
def test_every_family_and_sliding_windows(family: str, window: int | None) -> None:
    session = make_session(family=family, sliding_window=window)
    lamp, door, rain = session.add(TEXTS[:3])
    chat = session.conversation([lamp, door])
    for question, further in (("Red?", []), ("Rain?", [rain]), ("So?", [])):
        if further:
            chat.add(further)
        answer = chat.ask(question, ratio=1, max_new_tokens=8)
        truth = own_logits(session, answer)
        assert_close(answer.first_logits, truth, what=question, tolerance=EXACT)
