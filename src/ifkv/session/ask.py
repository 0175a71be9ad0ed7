"""Several questions to a session at once: checked together, answered batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ifkv.cache.stitch import check_stitchable
from ifkv.errors import DocumentUnreadableError, InvalidInputError
from ifkv.generation.decode import decode
from ifkv.generation.finish_reason import finish_reason
from ifkv.generation.greedy import GreedySettings, greedy_part
from ifkv.generation.streaming import text_streamer
from ifkv.models.decoder import DecoderView
from ifkv.patching.handle import handle_of
from ifkv.selectors import Selector
from ifkv.session.answer import Answer, Prepared
from ifkv.session.complete import answer_of, answer_settings, chosen_selector, complete
from ifkv.session.library import KEYS_WANTED
from ifkv.session.prepare import PrepareOptions, PrepareRequest, prepare
from ifkv.session.ratio import Ratio
from ifkv.session.stopwatch import Stopwatch
from ifkv.steps.scoring_layers import chosen_layers
from ifkv.utils.checks import check_positive, naming_request
from ifkv.utils.listing import as_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.cache import DocumentCache
    from ifkv.generation.settings import GenerationSettings
    from ifkv.session.session import Session

Stream = Callable[[int, str], None]


def ask_many(
    session: Session,
    questions: Sequence[str],
    *,
    documents: Sequence[str] | Sequence[Sequence[str] | None] | None,
    ratio: Ratio | None,
    reorder: bool,
    selector: str | Selector | None,
    max_new_tokens: int | None,
    stream: Stream | None,
    layers: Sequence[int] | None,
    batch_tokens: int,
    generate_kwargs: dict[str, Any],
) -> list[Answer]:
    """See [ifkv.Session.ask_many][]."""
    watch = Stopwatch(session.model)
    budget = session._ratios.fixed(ratio, "several questions at once")
    rule = chosen_selector(session, selector, layers)
    check_positive(batch_tokens, "batch_tokens")
    settings = answer_settings(session, max_new_tokens, generate_kwargs)
    chosen_layers(DecoderView(session.model).num_layers, layers)
    questions = as_list(questions, "questions", "give a list, or call ask()")
    prompts = []
    for index, question in enumerate(questions):
        with naming_request(index):
            prompts.append(session.format.prompt_ids(question))
    bare = [session.format.encode(question) for question in questions]
    keys, found = session._library.get_many(_keys_of(documents, len(prompts)))
    sizes = _checked_sizes(
        session.model, [[found[key] for key in own] for own in keys], prompts, settings
    )
    how = PrepareOptions(rule, reorder, layers, session.tokenizer, session.kv_dtype)
    answers: list[Answer] = []
    for batch in _batches(sizes, batch_tokens):
        timed = Stopwatch(session.model, watch)
        own = list(zip(prompts[batch], bare[batch], strict=True))

        def run(
            documents: list[list[DocumentCache]],
            own: list[tuple[list[int], list[int]]] = own,
            timed: Stopwatch = timed,
        ) -> list[Prepared]:
            asked = [
                PrepareRequest(each, *ids, budget) for each, ids in zip(documents, own, strict=True)
            ]
            return prepare(session.model, asked, timed, how)

        ready = _repairing(session, keys[batch], found, run)
        ready = [
            dataclasses.replace(one, question=question, sources=session._catalog.first(own))
            for one, question, own in zip(ready, questions[batch], keys[batch], strict=True)
        ]
        own_stream = None if stream is None else functools.partial(_shifted, stream, batch.start)
        answers += _complete(session, ready, settings, own_stream)
        later = {key for own in keys[batch.stop :] for key in own}
        found = {key: document for key, document in found.items() if key in later}
    return answers


def _repairing(
    session: Session,
    keys: Sequence[list[str]],
    found: dict[str, DocumentCache],
    run: Callable[[list[list[DocumentCache]]], list[Prepared]],
) -> list[Prepared]:
    """Run over documents by key; one that cannot be had as it is read is made again, once."""
    repaired: set[str] = set()
    while True:
        try:
            return run([[found[key] for key in own] for own in keys])
        except DocumentUnreadableError as error:
            if error.key in repaired or error.key not in found:
                raise
            repaired.add(error.key)
            found[error.key] = session._library.make_again(error.key, error)


def _keys_of(
    documents: Sequence[str] | Sequence[Sequence[str] | None] | None, count: int
) -> list[Sequence[str] | None]:
    """Keys of each question's documents; None for all."""
    if documents is None:
        return [None] * count
    given = as_list(documents, "documents", KEYS_WANTED)
    shared = [isinstance(each, str) for each in given]
    if all(shared):
        return [given] * count
    if any(shared):
        raise InvalidInputError(
            "documents holds both keys and lists; give keys for all questions to share, or one "
            "list of keys for each question."
        )
    if len(given) != count:
        raise InvalidInputError(
            f"documents has {len(given)} lists for {count} questions; give one each, or a flat "
            "list of keys for all."
        )
    return given


def _checked_sizes(
    model: PreTrainedModel,
    documents: Sequence[Sequence[DocumentCache]],
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
) -> list[int]:
    """Tokens of each request at its end; refuses what would fail in the midst of the work."""
    check_stitchable(model, documents)
    rope = handle_of(model).rope
    sizes = []
    for index, (own, prompt) in enumerate(zip(documents, prompts, strict=True)):
        context = len(own[0].prefix_ids) + sum(map(len, own))
        length = context + len(prompt)
        with naming_request(index):
            rope.check_length(length, "context and prompt")
            limit = settings.new_tokens(context, len(prompt))
            if rope.rope_type == "longrope":
                rope.check_length(length + limit - 1, "context, prompt and answer")
        sizes.append(length + limit)
    return sizes


def _batches(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Cut requests, in order, into batches of at most so many tokens, or of one request."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            yield slice(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def _shifted(stream: Stream, first: int, index: int, text: str) -> None:
    stream(first + index, text)


def _complete(
    session: Session,
    ready: Sequence[Prepared],
    settings: GenerationSettings,
    stream: Stream | None,
) -> list[Answer]:
    """Decode a batch: side by side if that gives what generate() would, one by one otherwise."""
    greedy = greedy_part(settings)
    if not isinstance(greedy, GreedySettings):
        return [
            complete(
                session.model,
                session.tokenizer,
                one,
                settings,
                stream=False if stream is None else functools.partial(stream, index),
            )
            for index, one in enumerate(ready)
        ]
    decoding = time.perf_counter()
    device = session.model.device
    prompts = [torch.tensor(one.prompt_ids, device=device) for one in ready]
    streamers = []
    if stream is not None:
        for index, prompt in enumerate(prompts):
            streamers.append(text_streamer(session.tokenizer, functools.partial(stream, index)))
            streamers[index].put(prompt[None].cpu())

    def emit(index: int, token: int) -> None:
        streamers[index].put(torch.tensor([token]))

    caches = [one.cache for one in ready]
    limits = [
        settings.new_tokens(cache.context_length, len(prompt))
        for cache, prompt in zip(caches, prompts, strict=True)
    ]
    try:
        found = decode(
            session.model,
            caches,
            prompts,
            [one.logits for one in ready],
            greedy,
            limits,
            emit if streamers else None,
        )
    finally:
        for cache in caches:
            cache.crop()
    for streamer in streamers:
        streamer.end()
    seconds = time.perf_counter() - decoding
    answers = []
    for one, token_ids, limit in zip(ready, found, limits, strict=True):
        reason = finish_reason(settings, session.tokenizer, token_ids, limit=limit)
        answers.append(answer_of(session.tokenizer, one, token_ids, reason, seconds))
    return answers
