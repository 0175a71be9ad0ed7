"""Session: text in, answers out, by the same token ids as a full prefill."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import ifkv
from ifkv.backends.reference import ReferenceBackend
from ifkv.errors import InvalidInputError, NotPatchedError, UnsupportedModelError
from ifkv.evaluation.compare import compare
from ifkv.generation.greedy import GreedySettings, greedy_settings
from ifkv.generation.settings import GenerationSettings
from ifkv.selectors import Budget
from ifkv.steps.select import budget
from ifkv.testing import assert_close, tiny_model, tiny_tokenizer
from sessions import QUESTION, TEXTS, full_logits, make_session


@pytest.fixture
def session() -> ifkv.Session:
    session = make_session()
    session.add(TEXTS)
    return session


def test_ratio_one_gives_the_logits_of_a_full_prefill(session: ifkv.Session) -> None:
    ready = session.prepare(QUESTION, ratio=1)
    assert_close(ready.logits, full_logits(session), what="first logits", tolerance=1e-10)


def test_ratio_zero_and_between_are_approximations(session: ifkv.Session) -> None:
    truth = full_logits(session)
    for ratio, rows in ((0, 0), (0.15, budget(len(session.context_ids()), 0.15))):
        ready = session.prepare(QUESTION, ratio=ratio)
        assert len(ready.slots) == rows
        assert (ready.logits - truth).abs().max() > 1e-3


def test_the_time_to_the_first_token_ends_with_its_step(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ifkv.session.prepare

    bound = ifkv.session.prepare.speedup_bound

    def late(*args: Any, **options: Any) -> float:
        time.sleep(0.3)  # counting operations is no part of an answer
        return bound(*args, **options)

    monkeypatch.setattr(ifkv.session.prepare, "speedup_bound", late)
    for answer in session.ask_many([QUESTION, QUESTION], max_new_tokens=1):
        steps = sum(seconds for name, seconds in answer.timings.items() if name != "decode")
        assert steps <= answer.ttft_seconds < steps + 0.3


def test_parts_are_what_the_template_renders(session: ifkv.Session) -> None:
    context = session.tokenizer.decode(session.context_ids())
    prompt = session.tokenizer.decode(session.format.prompt_ids(QUESTION))
    for text in TEXTS:
        assert text in context
    assert context.startswith(session.tokenizer.bos_token)
    assert QUESTION in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_streamed_pieces_are_the_answer(session: ifkv.Session) -> None:
    pieces: list[str] = []
    answer = session.ask(QUESTION, max_new_tokens=8, stream=pieces.append)
    assert "".join(pieces).strip() == answer.text
    assert len(answer.token_ids) <= 8


def test_comparing_at_a_budget_of_nothing_is_stitching_alone(session: ifkv.Session) -> None:
    options: dict[str, Any] = dict(reorder=True, max_new_tokens=2)
    ways = compare(session, QUESTION, ratios=(Budget(ratio=0.0), Budget(number=4)), **options)
    assert [way.name for way in ways[:2]] == ["full prefill", "stitch only"]
    assert ways[1].answer is not None
    assert ways[1].answer.order == [0, 1, 2], "not reordered"


def test_answers_from_reordered_documents_have_no_distance_to_full_prefill(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kls(order: list[int]) -> list[float | None]:
        monkeypatch.setattr("ifkv.session.prepare.order_by_hits", lambda *_: order)
        ways = compare(session, QUESTION, ratios=(0.0, 0.3), reorder=True, max_new_tokens=2)
        return [way.kl for way in ways]

    moved, kept = kls([2, 0, 1]), kls([0, 1, 2])
    assert moved[:2] == kept[:2]
    assert moved[2] is None
    assert kept[2] is not None


def test_comparing_what_no_plan_is_made_of_is_refused_first(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "context_ids", None)
    with pytest.raises(InvalidInputError, match=r"ratio='auto'.* with reorder=True"):
        compare(session, QUESTION, ratios=("auto",), reorder=True)


def test_a_stop_string_ends_an_answer_alone_in_a_batch_and_by_hand(session: ifkv.Session) -> None:
    whole = session.ask(QUESTION, ratio=1.0, max_new_tokens=24).token_ids.tolist()
    # The first token of the answer, made of random bytes, that is a character by itself.
    texts = [session.tokenizer.decode([token]) for token in whole]
    place = next(i for i, text in enumerate(texts) if text.isascii() and text.isprintable())
    limits: dict[str, Any] = dict(max_new_tokens=24, stop_strings=[texts[place]])
    answer = session.ask(QUESTION, ratio=1.0, **limits)
    assert answer.token_ids.tolist() == whole[: place + 1]
    (batched,) = session.ask_many([QUESTION], ratio=1.0, **limits)
    assert batched.token_ids.tolist() == answer.token_ids.tolist()
    given = {"max_new_tokens": 3, "tokenizer": session.tokenizer}
    plain = greedy_settings(GenerationSettings.of(session.model, given))
    assert isinstance(plain, GreedySettings), "a tokenizer alone asks for no stop string"
    ready = session.prepare(QUESTION, ratio=1.0)
    by_hand = ifkv.generate(
        session.model, ready.cache, ready.prompt_ids, tokenizer=session.tokenizer, **limits
    )
    assert by_hand[0, len(ready.prompt_ids) :].tolist() == answer.token_ids.tolist()


def test_documents_by_key_and_in_the_order_asked(session: ifkv.Session) -> None:
    keys = session.keys
    answer = session.ask(QUESTION, documents=[keys[2], keys[0]], max_new_tokens=1)
    text = session.tokenizer.decode(answer.context_ids)
    assert text.index(TEXTS[2]) < text.index(TEXTS[0])
    assert TEXTS[1] not in text
    with pytest.raises(InvalidInputError, match="not in the store"):
        session.ask(QUESTION, documents=["0" * 64])


def test_keys_may_come_from_a_generator(session: ifkv.Session) -> None:
    keys = session.keys[::-1]
    expected = session.ask(QUESTION, documents=keys, max_new_tokens=2)
    stream = session.stream(QUESTION, documents=iter(keys), max_new_tokens=2)
    assert list(stream)
    answers = [
        stream.answer,
        session.ask(QUESTION, documents=(key for key in keys), max_new_tokens=2),
        session.ask(QUESTION, documents=iter(keys), max_length=100),
        session.conversation(iter(keys)).ask(QUESTION, max_new_tokens=2),
        *session.ask_many([QUESTION], documents=[iter(keys)], max_new_tokens=2),
    ]
    for answer in answers:
        assert answer.sources == expected.sources
        assert torch.equal(answer.token_ids[:2], expected.token_ids)


def test_what_the_store_holds_is_not_computed_again(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ifkv.documents.prefill

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward was run")

    monkeypatch.setattr(ifkv.documents.prefill, "run_layers", refuse)
    assert session.add(TEXTS) == session.keys
    again = ifkv.Session(session.model, session.tokenizer, store=session.store)
    assert again.add(TEXTS[:2]) == session.keys[:2]


def test_reordering_counts_in_the_bound(session: ifkv.Session) -> None:
    plain = session.prepare(QUESTION, ratio=0.2)
    ordered = session.prepare(QUESTION, ratio=0.2, reorder=True)
    assert sorted(ordered.cache.order) == [0, 1, 2]
    assert "reorder" in ordered.timings
    assert ordered.speedup_bound != plain.speedup_bound


def test_a_session_keeps_the_backend_that_was_chosen() -> None:
    class Mine(ReferenceBackend):
        name = "mine"

    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    handle = ifkv.patch(model, backend=Mine())
    ifkv.Session(model, tokenizer)
    assert ifkv.patch(model) is handle
    assert handle.backend.name == "mine"


def test_a_block_on_an_undone_patch_is_refused() -> None:
    model = tiny_model()
    first, second = ifkv.patch(model), ifkv.patch(model)
    with first:
        pass
    with pytest.raises(NotPatchedError, match="undone"), second:
        pass


def test_without_a_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    session = ifkv.Session(model, tokenizer)
    session.add(TEXTS)
    assert session.tokenizer.decode(session.format.prompt_ids(QUESTION)).endswith("Answer:")
    assert len(session.ask(QUESTION, max_new_tokens=2).token_ids) <= 2


def test_a_template_that_changes_the_message_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] | upper | replace('QUESTION', '') }}"
    with pytest.raises(InvalidInputError, match="word for word"):
        ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": 1.5}, "1.5"),
        ({"ratio": -0.1}, "-0.1"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache cannot be given"),
        ({"tempreature": 0.5}, "did you mean temperature"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any], message: str
) -> None:
    import ifkv.session.prepare

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(ifkv.session.prepare, "stitch_many", refuse)
    with pytest.raises(InvalidInputError, match=message):
        session.ask(QUESTION, **kwargs)


def test_nothing_to_answer_from_and_blank_texts_are_refused() -> None:
    session = make_session()
    for documents in (None, []):
        with pytest.raises(InvalidInputError, match=r"no document to answer from.*add"):
            session.ask(QUESTION, documents=documents)
    with pytest.raises(InvalidInputError, match="one string"):
        session.add("a text")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="document"):
        session.add(["  \n"])


@pytest.mark.parametrize("given", [True, False])
def test_a_generation_config_that_asks_for_more_than_tokens(
    session: ifkv.Session, given: bool
) -> None:
    expected = session.ask(QUESTION, max_new_tokens=4)
    config: Any = GenerationConfig() if given else session.model.generation_config
    config.return_dict_in_generate, config.output_scores = True, True
    kwargs = {"generation_config": config} if given else {}
    assert session.ask(QUESTION, max_new_tokens=4, **kwargs).text == expected.text


def test_a_generate_that_fails_half_way_leaves_the_cache_whole() -> None:
    model = tiny_model("llama")
    ifkv.patch(model)
    documents = ifkv.prefill_documents(model, [[5, 6, 7, 8], [9, 10, 11]], prefix=[1])
    cache = ifkv.stitch(model, documents)
    expected = ifkv.generate(model, cache, [7], max_new_tokens=4, do_sample=False)
    base: Any = model.base_model

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = base.layers[1].register_forward_pre_hook(ifkv.observer(fail))
    with pytest.raises(RuntimeError, match="out of memory"):
        ifkv.generate(model, cache, list(range(30, 60)), max_new_tokens=4)
    hook.remove()
    assert {layer.get_seq_length() for layer in cache.layers} == {cache.context_length}
    again = ifkv.generate(model, cache, [7], max_new_tokens=4, do_sample=False)
    assert torch.equal(again, expected)
    ifkv.unpatch(model)


def test_rows_behind_a_fused_prompt_are_not_answered_from() -> None:
    model = tiny_model("llama")
    ifkv.patch(model)
    cache = ifkv.stitch(model, ifkv.prefill_documents(model, [[5, 6, 7, 8], [9, 10, 11]]))
    ifkv.recompute(model, cache, [4], prompt_ids=[3, 4])
    forward: Any = model
    with torch.no_grad():
        forward(torch.tensor([[20, 21]]), past_key_values=cache)
    with pytest.raises(InvalidInputError, match="appended"):
        ifkv.generate(model, cache, [3, 4])
    ifkv.unpatch(model)


def test_a_session_in_8_bits_answers_alone_and_in_batches() -> None:
    session = make_session(kv_dtype=torch.float8_e4m3fn)
    session.add(TEXTS)
    wanted = ifkv.stitch(
        session.model,
        [session.store.get(key) for key in session.keys],
        kv_dtype=torch.float8_e4m3fn,
    )
    ready = session.prepare(QUESTION, ratio=0.0)
    for layer, other in zip(ready.cache.layers, wanted.layers, strict=True):
        assert layer.scales == other.scales
        mine = layer.keys[:, :, : other.length]
        assert torch.equal(mine.view(torch.uint8), other.keys.view(torch.uint8))
    for reorder in (False, True):
        how: dict[str, Any] = {"ratio": 0.3, "reorder": reorder, "max_new_tokens": 5}
        alone = session.ask(QUESTION, **how)
        together = session.ask_many([QUESTION, "And the lamp?"], **how)
        assert together[0].token_ids.tolist() == alone.token_ids.tolist()
        assert_close(together[0].first_logits, alone.first_logits, what="logits", tolerance=1e-6)


def test_a_session_refuses_a_models_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"is of type str, but .*from_pretrained"):
        ifkv.Session("meta-llama/Llama-3.1-8B", tiny_tokenizer())  # type: ignore[arg-type]


def test_a_session_refuses_a_dtype_that_no_cache_has() -> None:
    with pytest.raises(InvalidInputError, match=r"kv_dtype is torch.int8"):
        make_session(kv_dtype=torch.int8)
