"""Answers of a session: a full prefill's at ratio 1, and true in what they say of themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ifkv
from ifkv.steps.select import budget
from ifkv.store import MemoryStore
from ifkv.testing import FAMILIES, assert_bit_equal, assert_close, tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = "Which colour is the door?"


def make(template: bool = True, family: str = "llama", **options: Any) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=2048)
    return ifkv.Session(model, tokenizer, **{"store": MemoryStore(), **options})


@pytest.fixture
def session() -> ifkv.Session:
    made = make()
    made.add(TEXTS)
    return made


def native(session: ifkv.Session, answer: ifkv.Answer) -> tuple[Tensor, Tensor]:
    """First logits and greedy ids of the model's own full prefill of the answer's request."""
    model: Any = session.model
    ids = torch.cat((answer.context_ids, answer.prompt_ids))[None]
    with torch.no_grad():
        logits = model(ids, logits_to_keep=1).logits[0, -1]
    new = len(answer.token_ids)
    full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    return logits, full[0, ids.shape[1] :]


def test_an_answer_is_shown_in_a_line(session: ifkv.Session) -> None:
    answer = session.ask(QUESTION, ratio=0.5, max_new_tokens=100)
    shown = repr(answer)
    recomputed = f"{len(answer.slots)} of {len(answer.context_ids)} tokens recomputed"
    assert shown.startswith("Answer('")
    assert f"first token after {answer.ttft_seconds:.2f} s, {recomputed}, 3 documents)" in shown
    assert len(shown) < 200
    assert "tensor" not in repr(session.prepare(QUESTION, ratio=0.5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [True, False])
def test_at_ratio_one_an_answer_is_that_of_a_full_prefill(family: str, template: bool) -> None:
    session = make(template, family)
    session.add(TEXTS)
    answer = session.ask(QUESTION, ratio=1, max_new_tokens=12)
    logits, ids = native(session, answer)
    assert_close(answer.first_logits, logits.float(), what="first logits", tolerance=1e-6)
    assert answer.token_ids.tolist() == ids.tolist()
    assert answer.scores is None, "nothing had to be scored"


@pytest.mark.parametrize("reorder", [False, True])
def test_reordered_or_not_it_is_the_full_prefill_of_that_order(
    session: ifkv.Session, reorder: bool
) -> None:
    answer = session.ask(QUESTION, ratio=1, reorder=reorder, max_new_tokens=6)
    expected = [session.prefix_ids]
    expected += [session.store.get(session.keys[i]).token_ids.tolist() for i in answer.order]
    assert answer.context_ids.tolist() == [token for part in expected for token in part]
    assert answer.token_ids.tolist() == native(session, answer)[1].tolist()
    if not reorder:
        assert answer.order == [0, 1, 2]


@pytest.mark.parametrize("ratio", [0, 0.15, 1])
def test_what_an_answer_says_of_itself(session: ifkv.Session, ratio: float) -> None:
    answer = session.ask(QUESTION, ratio=ratio, max_new_tokens=5)
    total, first = len(answer.context_ids), answer.document_slices[0].stop
    rows = total - first if ratio == 1 else budget(total, ratio)
    assert answer.slots.tolist() == sorted(set(answer.slots.tolist()))
    assert len(answer.slots) == rows
    assert all(slot >= first for slot in answer.slots.tolist()), "the first document is exact"
    assert (answer.scores is None) == (ratio in (0, 1))
    if answer.scores is not None:
        assert answer.scores.shape == (total,)
        chosen, others = answer.scores[answer.slots], answer.scores[first:].sort().values
        assert chosen.min() == others[-rows]
    assert answer.token_ids[0] == answer.first_logits.argmax()
    assert answer.first_logits.dtype == torch.float32
    assert str(answer) == answer.text
    decoded = session.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.text == decoded.strip()
    assert len(answer.token_ids) <= 5
    assert [s.stop - s.start for s in answer.document_slices] == [
        len(session.store.get(key).token_ids) for key in session.keys
    ]
    assert answer.document_slices[-1].stop == total
    assert answer.ttft_seconds > 0
    assert set(answer.timings) >= {"stitch", "recompute and prompt", "decode"}


def test_asking_again_gives_the_same_answer(session: ifkv.Session) -> None:
    """Documents are read, never written: not by another question, order or ratio."""
    first = session.ask(QUESTION, max_new_tokens=5)
    session.ask("What is wet?", ratio=1, reorder=True, max_new_tokens=5)
    again = session.ask(QUESTION, max_new_tokens=5)
    assert_bit_equal(again.first_logits, first.first_logits, what="first logits")
    assert again.token_ids.tolist() == first.token_ids.tolist()


def test_documents_added_one_by_one_or_at_once_are_the_same(session: ifkv.Session) -> None:
    twin = make()
    keys = [key for text in TEXTS for key in twin.add([text])]
    assert keys == session.keys == twin.keys
    assert twin.add([TEXTS[1], TEXTS[1], TEXTS[0]]) == [keys[1], keys[1], keys[0]]
    assert twin.keys == keys, "nothing is answered from twice"
    for key in keys:
        got, want = twin.store.get(key), session.store.get(key)
        assert_close(got.keys, want.keys, what="keys")
    prefixes = {id(twin.store.get(key).prefix) for key in keys}
    assert len(prefixes) == 1, "the prefix is held once"


def test_sessions_share_a_store(session: ifkv.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ifkv.Session(session.model, session.tokenizer, store=session.store)
    assert other.keys == []
    made: list[int] = []
    real = ifkv.prefill_documents

    def counted(model: Any, documents: Any, **options: Any) -> Any:
        made.append(len(documents))
        return real(model, documents, **options)

    monkeypatch.setattr("ifkv.store.populate.prefill_documents", counted)
    assert other.add(TEXTS) == session.keys
    assert sum(made) == 0
    assert (
        other.ask(QUESTION, max_new_tokens=2).text == session.ask(QUESTION, max_new_tokens=2).text
    )


def test_another_instruction_is_another_document(session: ifkv.Session) -> None:
    store = session.store
    assert isinstance(store, MemoryStore)
    other = ifkv.Session(session.model, session.tokenizer, store=store, instruction="Guess.\n\n")
    assert not set(other.add(TEXTS)) & set(session.keys)
    with pytest.raises(ifkv.IfkvError, match="one prefix"):
        other.ask(QUESTION, documents=[session.keys[0], other.keys[0]])


@pytest.mark.parametrize("prefix", ["", "Read:\n", [0, 5, 6]])
def test_a_prefix_of_ones_own(prefix: Any) -> None:
    session = make(prefix=prefix)
    session.add(TEXTS[:2])
    answer = session.ask(QUESTION, ratio=1, max_new_tokens=3)
    expected = prefix
    if isinstance(prefix, str):
        expected = session.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    assert answer.context_ids[: answer.document_slices[0].start].tolist() == expected
    assert answer.token_ids.tolist() == native(session, answer)[1].tolist()


def test_documents_added_after_the_weights_changed(session: ifkv.Session) -> None:
    """They are encoded anew, prefix included; the old ones are refused instead of mixed in."""
    before = list(session.keys)
    model: Any = session.model
    with torch.no_grad():
        model.base_model.layers[0].self_attn.k_proj.weight.mul_(1.1)
    after = session.add(TEXTS)
    assert not set(after) & set(before)
    answer = session.ask(QUESTION, documents=after, ratio=1, max_new_tokens=4)
    assert answer.token_ids.tolist() == native(session, answer)[1].tolist()
    with pytest.raises(ifkv.IfkvError, match="was made by model"):
        session.ask(QUESTION, documents=before)


def test_streamed_to_the_terminal(
    session: ifkv.Session, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = session.ask(QUESTION, max_new_tokens=8, stream=True)
    assert capsys.readouterr().out.strip() == answer.text


def test_sampling_options_reach_generate(session: ifkv.Session) -> None:
    torch.manual_seed(0)
    first = session.ask(QUESTION, do_sample=True, temperature=5.0, max_new_tokens=10)
    second = session.ask(QUESTION, do_sample=True, temperature=5.0, max_new_tokens=10)
    assert first.token_ids.tolist() != second.token_ids.tolist()


def test_beams_reach_generate(session: ifkv.Session) -> None:
    answer = session.ask(QUESTION, ratio=1, num_beams=3, max_new_tokens=6)
    ids = torch.cat((answer.context_ids, answer.prompt_ids))[None]
    model: Any = session.model
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=6)
    assert answer.token_ids.tolist() == expected[0, ids.shape[1] :].tolist()
