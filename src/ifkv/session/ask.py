"""From questions to answers: checked together, prepared and decoded batch by batch.

A single question is a list of one, and goes the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ifkv.cache.stitch import check_stitchable
from ifkv.errors import DocumentUnreadableError, InvalidInputError
from ifkv.models.decoder import DecoderView
from ifkv.patching.handle import checked_once, handle_of
from ifkv.session.answer import Answer, Prepared
from ifkv.session.complete import Stream, complete
from ifkv.session.library import KEYS_WANTED
from ifkv.session.prepare import PrepareOptions, PrepareRequest, prepare
from ifkv.session.prompt_format import check_question
from ifkv.session.stopwatch import Stopwatch
from ifkv.steps.scoring_layers import chosen_layers
from ifkv.utils.checks import check_positive, naming_request
from ifkv.utils.listing import as_list

if TYPE_CHECKING:
    from ifkv.documents.cache import DocumentCache
    from ifkv.generation.settings import GenerationSettings
    from ifkv.planning.plan import Plan
    from ifkv.session.engine import Engine
    from ifkv.session.options import AskOptions

# Tokens that a batch of questions holds when the caller does not say.
DEFAULT_REQUEST_TOKENS = 16384

Keys = Sequence[str] | None


def ask(
    engine: Engine, question: str, documents: Keys, options: AskOptions, stream: Stream
) -> Answer:
    """Answer a question; see [ifkv.Session.ask][]."""
    with checked_once(engine.model):
        settings, seeds = engine.settings(options), options.seeds(1)
        asked = _Questions(engine, [question], [documents], options, settings, numbered=False)
        (ready,) = asked.prepare(slice(0, 1))
        return complete(engine, [ready], settings, streams=[stream], seeds=seeds)[0]


def ask_many(
    engine: Engine,
    questions: Sequence[str],
    documents: Sequence[str] | Sequence[Keys] | None,
    options: AskOptions,
    *,
    streams: Sequence[Stream] | None,
    batch_tokens: int,
) -> list[Answer]:
    """Answer several questions; see [ifkv.Session.ask_many][]."""
    check_positive(batch_tokens, "batch_tokens")
    answers: list[Answer] = []
    with checked_once(engine.model):
        settings, seeds = engine.settings(options), options.seeds(len(questions))
        own = keys_of_each(documents, len(questions))
        asked = _Questions(engine, questions, own, options, settings, numbered=True)
        for batch in _batches(asked.sizes, batch_tokens):
            ready = asked.prepare(batch)
            own_streams = None if streams is None else streams[batch]
            answers += complete(engine, ready, settings, streams=own_streams, seeds=seeds[batch])
    return answers


def prepare_question(
    engine: Engine, question: str, documents: Keys, options: AskOptions
) -> Prepared:
    """Do everything before a question's first token; see `Session.prepare`."""
    with checked_once(engine.model):
        asked = _Questions(engine, [question], [documents], options, None, numbered=False)
        return asked.prepare(slice(0, 1))[0]


class _Questions:
    """Questions that have been checked, with the documents they are asked over.

    Attributes:
        sizes: Tokens of each question's context, prompt and answer together.

    Args:
        engine: What answers them.
        questions: The questions.
        documents: For each the keys of its documents; None for all.
        options: How to answer them.
        settings: Of the answers; None where none are decoded.
        numbered: Whether a refusal says which question it is about.
    """

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[str],
        documents: Sequence[Keys],
        options: AskOptions,
        settings: GenerationSettings | None,
        *,
        numbered: bool,
    ):
        self._engine, self._questions, self._numbered = engine, questions, numbered
        rule = engine.rule(options)
        chosen_layers(DecoderView(engine.model).num_layers, options.layers)
        chosen: list[list[str]] = []  # a generator gives its keys once
        for index, (question, keys) in enumerate(zip(questions, documents, strict=True)):
            with self._naming(index):
                check_question(question)
                chosen.append(engine.library.named(keys))
        # Measures the machine where it has to be, before the questions' clock starts.
        self._choose = engine.ratios.chooser(options.ratio, rule, reorder=options.reorder)
        self._watch = Stopwatch(engine.model)
        self._how = PrepareOptions(
            rule, options.reorder, options.layers, engine.tokenizer, engine.kv_dtype
        )
        self._prompts = [engine.format.prompt_ids(question) for question in questions]
        self._bare = [engine.format.encode(question) for question in questions]
        with self._watch("load"):
            self._keys, self._found = engine.library.get_many(chosen, naming=self._naming)
        self.sizes = self._checked_sizes(settings)

    def _naming(self, index: int) -> contextlib.AbstractContextManager[None]:
        return naming_request(index) if self._numbered else contextlib.nullcontext()

    def _checked_sizes(self, settings: GenerationSettings | None) -> list[int]:
        """Count tokens; refuse what would fail in the midst of the work."""
        documents = [[self._found[key] for key in own] for own in self._keys]
        if len(documents) > 1:  # alone, it is checked as it is stitched, which comes first
            check_stitchable(self._engine.model, documents)
        rope = handle_of(self._engine.model).rope
        sizes = []
        for index, (own, prompt) in enumerate(zip(documents, self._prompts, strict=True)):
            context = len(own[0].prefix_ids) + sum(map(len, own))
            length = context + len(prompt)
            with self._naming(index):
                rope.check_length(length, "context and prompt")
                limit = 0 if settings is None else settings.new_tokens(context, len(prompt))
                rope.check_answer(length, limit, "context, prompt and answer")
            sizes.append(length + limit)
        return sizes

    def prepare(self, batch: slice) -> list[Prepared]:
        """Prepare a batch; batches are taken in order, each once.

        Documents that no later batch needs are let go.
        """
        engine, timed = self._engine, Stopwatch(self._engine.model, self._watch)
        if batch.start == 0:
            timed.timings |= self._watch.timings
        plans: list[Plan | None] = []
        ready = self._repairing(batch, timed, plans)
        later = {key for own in self._keys[batch.stop :] for key in own}
        self._found = {key: document for key, document in self._found.items() if key in later}
        return [
            dataclasses.replace(
                one, question=question, plan=plan, sources=engine.catalog.first(keys)
            )
            for one, question, plan, keys in zip(
                ready, self._questions[batch], plans, self._keys[batch], strict=True
            )
        ]

    def _repairing(
        self, batch: slice, timed: Stopwatch, plans: list[Plan | None]
    ) -> list[Prepared]:
        """Prepare; a document that cannot be had as it is read is made again, once."""
        engine = self._engine
        made: dict[str, DocumentCache] = {}
        requests = self._requests(batch, plans)
        while True:
            try:
                return prepare(engine.model, requests, timed, self._how)
            except DocumentUnreadableError as error:
                if error.key in made or error.key not in self._found:
                    raise
                with timed("load"):
                    made[error.key] = engine.library.make_again(error.key, error)
                    # Anew and whole: others may have been found unreadable meanwhile.
                    keys = list(dict.fromkeys(key for own in self._keys[batch] for key in own))
                    again = engine.library.get(keys, made=made)
                self._found.update(zip(keys, again, strict=True))
                requests = [
                    dataclasses.replace(one, documents=self._documents(own))
                    for one, own in zip(requests, self._keys[batch], strict=True)
                ]

    def _documents(self, keys: Sequence[str]) -> list[DocumentCache]:
        return [self._found[key] for key in keys]

    def _requests(self, batch: slice, plans: list[Plan | None]) -> list[PrepareRequest]:
        """Build the requests of a batch, each with a budget of its own, and note their plans."""
        requests = []
        for keys, prompt, bare in zip(
            self._keys[batch], self._prompts[batch], self._bare[batch], strict=True
        ):
            documents = self._documents(keys)
            budget, plan = self._choose(documents, len(prompt), len(bare))
            plans.append(plan)
            requests.append(PrepareRequest(documents, prompt, bare, budget))
        return requests


def keys_of_each(documents: Sequence[str] | Sequence[Keys] | None, count: int) -> list[Keys]:
    """Return the keys of each question's documents; None for all.

    Raises:
        InvalidInputError: There are both keys and lists, or not as many lists as questions.
    """
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
