"""Questions that follow one another over one repaired cache, and documents that join later."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.cache.rollback import all_or_nothing
from ifkv.errors import InvalidInputError
from ifkv.generation.streaming import Closing
from ifkv.patching.handle import checked_once, handle_of
from ifkv.session.answer import Answer
from ifkv.session.answer_stream import AnswerStream
from ifkv.session.ask import prepare_question
from ifkv.session.complete import Stream, complete
from ifkv.session.options import AskOptions
from ifkv.session.ratio import Ratio
from ifkv.session.stopwatch import Stopwatch
from ifkv.session.turn import Asked, Turn, prepare_turn
from ifkv.utils.copying import Uncopied

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache
    from ifkv.generation.settings import GenerationSettings
    from ifkv.selectors import Selector
    from ifkv.session.engine import Engine


class Conversation(Uncopied):
    """Turns over documents of a session, each of which costs only what is new in it.

    The first question is answered as `Session.ask` answers it. Then the repaired documents,
    the question and the answer stay in the cache, as they are, and the next turn's rows attend to
    all of them: the same logits as the model's own forward over this cache. The tokenizer's chat
    template decides what stands between turns. Documents that are added lie behind the turns
    before them, in the next question's message, and a turn recomputes the selected of their slots
    under everything that stands before them. With ratio 1 in every turn all equals a full prefill
    of `token_ids`.

    Below ratio 1 rows of earlier turns are what they were when they were computed: a document's
    slot that a later turn recomputes (``revisit``) does not change them.

    A call that raises, or is interrupted, leaves the conversation as it was before the call.
    One thread at a time may use it.

    Made by `Session.conversation`.

    Attributes:
        answers: The answers so far. An answer's ``context_ids`` are all tokens before its
            ``prompt_ids``, and ``slots`` those recomputed in its turn. ``speedup_bound`` of a
            later turn compares with running all of its new tokens over the same cache: 1 without
            new documents.
    """

    _instead = "copy.copy(conversation) goes on from here by itself, over the same session"

    def __init__(self, engine: Engine, documents: Sequence[str] | None = None):
        self.answers: list[Answer] = []
        self._engine = engine
        self._cache: StitchedCache | None = None
        self._pending: list[int] = []  # tokens of the last answer that have no rows yet
        self._waiting: list[str] = []  # documents for the next question
        self._documents: list[str] = []  # those of earlier ones
        self._waiting_tokens = 0
        self._recomputed = torch.zeros(0, dtype=torch.long)
        self._busy = threading.Lock()
        _ = engine.format.opening  # refuses a template that rewrites earlier turns
        self.add(documents)

    def __copy__(self) -> Conversation:
        """Return a conversation that goes on from here; neither sees the other's turns."""
        with self._alone():
            twin = object.__new__(type(self))
            twin.__dict__.update(
                self.__dict__,
                answers=list(self.answers),
                _cache=None if self._cache is None else self._cache.clone(),
                _waiting=list(self._waiting),
                _busy=threading.Lock(),
            )
        return twin

    def __repr__(self) -> str:
        documents = len(self._waiting)
        if self._cache is not None:
            documents += len(self._cache.document_slices)
        return (
            f"Conversation({documents} documents, {len(self.answers)} turns, "
            f"{len(self.token_ids) + self._waiting_tokens} tokens)"
        )

    @property
    def token_ids(self) -> Tensor:
        """Return all tokens so far, long ``[n]``, on the CPU: documents, questions and answers.

        Without the stop token of the last answer, which the next turn begins with, and without
        documents that no question has followed yet.
        """
        if self._cache is None:
            return torch.tensor(self._engine.prefix_ids, dtype=torch.long)
        return torch.cat((self._cache.token_ids.cpu(), torch.tensor(self._pending).long()))

    def add(self, documents: Sequence[str] | None) -> None:
        """Bring documents in; the next question is the first to see them.

        Nothing is computed now. They stay in the conversation from that question on.

        Args:
            documents: Their keys, in order, as `Session.add` returned them; all that the
                session added if None.

        Raises:
            InvalidInputError: There is none, one is not in the store, or the conversation would be
                longer than the model's positions.
        """
        with self._alone():
            keys = self._engine.library.named(documents)
            found = self._engine.library.get(keys, lazy=True)
            tokens = sum(map(len, found))
            between = self._engine.prefix_ids
            if self._cache is not None:
                between = self._pending + self._engine.format.further_ids()
            self._check_length(len(between), documents=tokens)
            self._waiting += keys
            self._waiting_tokens += tokens

    def ask(
        self,
        question: str,
        *,
        ratio: Ratio | None = None,
        revisit: bool = False,
        selector: str | Selector | None = None,
        max_new_tokens: int | None = None,
        stream: Stream = False,
        layers: Sequence[int] | None = None,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Answer the next question.

        Args:
            question: The question.
            ratio: Share of the new documents' tokens to recompute (in the first turn of all tokens
                before the question, as in `Session.ask`), or a budget; the session's if
                None, and never ``"auto"``. A turn without new
                documents has nothing to recompute.
            revisit: Let the question choose among the slots of earlier documents, too, that no
                turn has recomputed yet; the ratio then counts these as well. Rows of earlier turns
                are not run again.
            selector: As in `Session.ask`; behind the first turn one that scores in the
                conversation's own positions (``geometry=global``).
            max_new_tokens: As in `Session.ask`.
            stream: As in `Session.ask`.
            layers: As in `Session.ask`.
            seed: As in `Session.ask`.
            **generate_kwargs: As in `Session.ask`. Beams decode copies of the cache, and
                their answer is run once more with the next question.

        Returns:
            The answer, which is also the last of `answers`.

        Raises:
            InvalidInputError: A bad argument, or more tokens than the model has positions; nothing
                has been computed.
            FingerprintMismatchError: The model's weights have changed since the last turn.
            NotPatchedError: The model has been unpatched.
        """
        options = AskOptions(ratio, False, selector, layers, max_new_tokens, seed, generate_kwargs)
        asked = Asked.checked(self._engine, question, options, revisit=revisit)
        return self._answer(asked, stream)

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """Stream the next answer, piece by piece as it is generated.

        Work begins with the first piece. To leave the loop, or to close the iterator, stops the
        answer there: what has been generated is the turn's answer. It is the last of
        `answers` either way.

        Args:
            question: The question.
            **options: As of `ask`.

        Raises:
            InvalidInputError: As of `ask`, with this call or with the first piece.
        """
        own = {"ratio", "selector", "layers", "max_new_tokens", "seed"}
        said = {name: options.pop(name) for name in own & options.keys()}
        revisit = options.pop("revisit", False)
        asking = AskOptions(**said, generate_kwargs=options)
        asked = Asked.checked(self._engine, question, asking, revisit=revisit)
        return AnswerStream(functools.partial(self._answer, asked))

    def _answer(self, asked: Asked, stream: Stream, stopping: Closing | None = None) -> Answer:
        """Run one turn, from the question to the rows that are kept."""
        engine, settings = self._engine, asked.settings
        if stopping is not None:
            settings = settings.stopped_by(stopping)
        with self._alone():
            watch = Stopwatch(engine.model)
            before, prompt = self._new_ids(asked.question)
            self._check_room(settings, len(before), len(prompt))
            with contextlib.ExitStack() as whole:
                whole.enter_context(checked_once(engine.model))
                if self._cache is None:
                    how = AskOptions(ratio=asked.budget, selector=asked.selector)
                    ready = prepare_question(engine, asked.question, self._waiting, how)
                else:
                    save = whole.enter_context(all_or_nothing(self._cache))
                    turn = Turn.read(
                        engine,
                        self._cache,
                        asked,
                        documents=self._waiting,
                        before_ids=before,
                        prompt_ids=prompt,
                        recomputed=self._recomputed,
                        timed=watch,
                    )
                    ready = prepare_turn(engine, self._cache, asked, turn, watch, save)
                documents = [*self._documents, *self._waiting]
                ready = dataclasses.replace(ready, sources=engine.catalog.first(documents))
                (answer,) = complete(
                    engine, [ready], settings, streams=[stream], seeds=[asked.seed], keep=True
                )
                said = [*ready.prompt_ids, *answer.token_ids.tolist()]
                ran = ready.cache.appended
                ready.cache.keep(said[:ran])
            self._pending = said[ran:]
            if self._pending[-1] in {*settings.stop_token_ids, engine.tokenizer.eos_token_id}:
                self._pending.pop()  # the template has its own end of an answer
            self._cache = ready.cache
            self._recomputed = torch.cat((self._recomputed, answer.slots))
            self._documents, self._waiting, self._waiting_tokens = documents, [], 0
            self.answers.append(answer)
            return answer

    def _new_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Return the tokens without rows before the waiting documents, and those behind."""
        layout = self._engine.format
        if self._cache is None:
            return self._engine.prefix_ids, layout.prompt_ids(question)
        if self._waiting:
            return self._pending + layout.further_ids(), layout.prompt_ids(question)
        return [], self._pending + layout.turn_ids(question)

    def _check_length(self, new: int, documents: int = 0) -> int:
        """Raise if tokens do not fit behind the cache and the waiting documents.

        Returns:
            How many positions there would be.
        """
        length = new + self._waiting_tokens + documents
        if self._cache is not None:
            length += self._cache.query_position
        handle_of(self._engine.model).rope.check_length(length, "the conversation")
        return length

    def _check_room(self, settings: GenerationSettings, before: int, prompt: int) -> None:
        """Raise if a question or its answer does not fit."""
        length = self._check_length(before + prompt)
        context = before + self._waiting_tokens
        if self._cache is not None:
            context += self._cache.context_length
        limit = settings.new_tokens(context, prompt)
        rope = handle_of(self._engine.model).rope
        rope.check_answer(length, limit, "the conversation and answer")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the conversation; raise if an answer is being made."""
        if not self._busy.acquire(blocking=False):
            raise InvalidInputError(
                "an answer of this conversation is still being made; read its stream to the end, "
                "or close() it, before the next call."
            )
        try:
            yield
        finally:
            self._busy.release()
