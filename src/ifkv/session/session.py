"""One object for people with text and a tokenizer: add documents, ask questions."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.backends.fp8 import check_kv_dtype
from ifkv.documents.source import Source
from ifkv.errors import InvalidInputError
from ifkv.generation.checks import functions
from ifkv.models.families import resolve_family
from ifkv.patching.handle import patch
from ifkv.planning.support import check_plannable
from ifkv.selectors import DEFAULT_SELECTOR, Selector, resolve
from ifkv.session import ask as asking
from ifkv.session.answer import Answer, Prepared
from ifkv.session.catalog import Catalog
from ifkv.session.complete import complete
from ifkv.session.control_tokens import ControlTokens
from ifkv.session.corpus import Corpus
from ifkv.session.engine import Engine
from ifkv.session.library import Library
from ifkv.session.options import AskOptions
from ifkv.session.prompt_format import INSTRUCTION, PromptFormat
from ifkv.session.ratio import Ratio, Ratios
from ifkv.session.text_documents import document_pieces, surrogate_of_texts
from ifkv.store import session_store
from ifkv.utils.checks import token_tensor
from ifkv.utils.copying import Uncopied
from ifkv.utils.listing import as_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.surrogate import SurrogateContext
    from ifkv.generation.streaming import Closing
    from ifkv.planning.planner import Planner
    from ifkv.session.answer_stream import AnswerStream
    from ifkv.session.conversation import Conversation
    from ifkv.store import DocumentStore


class Session(Uncopied):
    """Documents of one model and one prefix, and the questions asked over them.

    Args:
        model: A model of a type that ``ifkv families`` lists; it is patched if it is not.
        tokenizer: The model's tokenizer.
        store: Store that keeps the documents; or its path or URL, which is opened behind 2 GiB of
            memory. If None, a store in the user's cache folder (or where ``IFKV_STORE`` or
            ``IFKV_CACHE`` point), in which later sessions find the documents. ``MemoryStore()``
            keeps them for this session only.
        prefix: Text or token ids that every document is encoded behind; by default what the
            tokenizer's chat template puts before the documents, with ``instruction``.
        surrogate: Text that stands between prefix and document while a document is encoded, and
            is then dropped; several texts for the mean over them. It is tokenised as a document
            is. See [ifkv.SurrogateContext][]. None encodes each document alone. It is part of the
            documents' keys: the session finds only documents encoded behind the same texts.
        instruction: Text before the documents, when the prefix is not given.
        system: System prompt, part of the prefix; the chat template's default if None.
        chat_template_kwargs: Further variables of the chat template, such as
            ``{"enable_thinking": False}``.
        date: Date for chat templates that print today's, with which no document would be found
            the next day: a date, also as text (``"2026-01-31"``), or ``"today"``, the day of this
            call. If None, always the same date, with a `PromptWarning`.
        control_tokens: ``"text"`` takes control tokens such as ``<|im_end|>`` for letters in
            documents and questions, in the instruction and in the system prompt; ``"parse"`` takes
            them for what they are in the chat template, so that whoever writes a document can end
            its message.
        backend: Attention backend, as in [ifkv.patch][].
        ratio: Recompute ratio of requests that give none; see `ask`.
        selector: Selector of requests that give none; see `ask`.
        planner: Planner for ``ratio="auto"``; one for this machine if None.
        kv_dtype: Dtype of each request's cache, as in [ifkv.stitch][]. The dtype of stored
            documents is set by the stores' ``codec``.

    Attributes:
        engine: Engine that answers the questions; conversations share it.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> session = ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)
        >>> keys = session.add(["The lamp is red.", "The door is green."])
        >>> answer = session.ask("Which colour is the door?", ratio=0.5, max_new_tokens=4)
        >>> len(answer.token_ids) <= 4, sorted(answer.order)
        (True, [0, 1])
    """

    _instead = (
        "copy.copy(session) is another over the same model and store, and in another process make "
        "one: ifkv.Session(model, tokenizer, store=path)"
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        store: DocumentStore | str | os.PathLike[str] | None = None,
        prefix: str | Sequence[int] | None = None,
        surrogate: str | Sequence[str] | None = None,
        instruction: str = INSTRUCTION,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: datetime.date | str | None = None,
        control_tokens: ControlTokens = "text",
        backend: str = "auto",
        ratio: Ratio = 0.15,
        selector: str | Selector = DEFAULT_SELECTOR,
        planner: Planner | None = None,
        kv_dtype: torch.dtype | None = None,
    ):
        resolve_family(model)
        check_kv_dtype(kv_dtype, model.device)
        rule = resolve(selector)
        if ratio == "auto":
            check_plannable(rule, reorder=False)
        if prefix is not None and (system is not None or date is not None):
            raise InvalidInputError(
                "prefix was given together with a system prompt or date, which it replaces; write "
                "them into the prefix."
            )
        layout = PromptFormat(
            tokenizer,
            instruction,
            system=system,
            chat_template_kwargs=chat_template_kwargs,
            date=date,
            control_tokens=control_tokens,
        )
        patch(model, backend=backend)
        if prefix is None:
            prefix_ids = layout.prefix_ids()
        elif isinstance(prefix, str):
            prefix_ids = layout.parse(prefix)
        else:
            prefix_ids = token_tensor(model, prefix, "the prefix", empty=True).tolist()
        standing_in = surrogate_of_texts(model, layout, prefix_ids, surrogate)
        kept = session_store(store)
        self.engine = Engine(
            model=model,
            tokenizer=tokenizer,
            format=layout,
            prefix_ids=prefix_ids,
            library=Library(model, kept, prefix_ids, tokenizer.decode, standing_in),
            catalog=Catalog(kept),
            ratios=Ratios(model, ratio, backend, planner),
            selector=rule,
            kv_dtype=kv_dtype,
        )
        self._corpus = Corpus(self.engine)

    def __copy__(self) -> Session:
        """Return a session over the same model and store, with its own list of documents."""
        twin = object.__new__(type(self))
        engine = self.engine
        twin.engine = dataclasses.replace(engine, library=copy.copy(engine.library))
        twin._corpus = Corpus(twin.engine)
        return twin

    def __repr__(self) -> str:
        behind = f"{len(self.prefix_ids)} tokens"
        if self.surrogate is not None:
            behind += f" and a {self.surrogate!r}"
        return (
            f"Session({type(self.model).__name__}, {len(self.keys)} documents behind {behind}, "
            f"{type(self.store).__name__})"
        )

    @property
    def model(self) -> PreTrainedModel:
        """Return the model."""
        return self.engine.model

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        return self.engine.tokenizer

    @property
    def format(self) -> PromptFormat:
        """Return the layout of prompts."""
        return self.engine.format

    @property
    def prefix_ids(self) -> list[int]:
        """Return the tokens that every document is encoded behind."""
        return self.engine.prefix_ids

    @property
    def surrogate(self) -> SurrogateContext | None:
        """Return the surrogate context that documents are encoded behind; None if there is none."""
        return self.engine.library.surrogate

    @property
    def selector(self) -> Selector:
        """Return the selector of questions that name none."""
        return self.engine.selector

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """Return the dtype of each request's cache; None is the model's."""
        return self.engine.kv_dtype

    @property
    def store(self) -> DocumentStore:
        """Return the store of the documents."""
        return self.engine.library.store

    @property
    def keys(self) -> list[str]:
        """Return the keys of the documents that this session added, in order, each once."""
        return self.engine.library.keys

    @property
    def prefilled(self) -> int:
        """Return how many documents this session has prefilled; others were in the store."""
        return self.engine.library.prefilled

    def add(
        self,
        texts: Sequence[str],
        *,
        split: int | None = None,
        sources: Sequence[Source | str | None] | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[str]:
        """Prefill documents and keep them; those the store holds already are not computed again.

        A session that chooses by ``sensitivity-aware`` measures their sensitivities, too, for one
        more prefill of each, and makes those again that the store holds without. Each batch is kept
        as soon as it is made: after an interruption the same call goes on from there.

        Args:
            texts: The documents' texts: a list, or anything else that has them in an order, such
                as a generator or one column of a table.
            split: Most tokens of a document: longer texts are cut into several, at headings,
                paragraphs, sentences and, where these are too long themselves, words. If None, a
                text is a document.
            sources: Source of each text: an [ifkv.Source][], or a title. They are kept
                beside the documents, are no part of their keys, and come back with answers
                (`Answer.sources`); those of pieces say which, and where it begins.
            batch_tokens: As in [ifkv.prefill_documents][].
            progress: Show a progress bar.

        Returns:
            The documents' keys in the store, in order. With ``split`` this is still one flat list,
            of the pieces of the first text, then those of the second. To know which are whose,
            give sources, or add texts one by one.

        Raises:
            InvalidInputError: A document is blank or longer than the model's positions, or
                ``texts`` is no list of texts: a mapping, say, a set or a whole table. Of a list
                it says which text is meant, counting from 0. Or ``sources`` are not one for each.
            StoreFullError: The store or its disk has no room.
        """
        ids, names, own = document_pieces(
            self.model, self.format, self.prefix_ids, texts, split, sources, self.surrogate
        )
        keys = self.engine.library.add(
            ids,
            names=names,
            batch_tokens=batch_tokens,
            sensitivities=self.selector.sensitivities,
            progress=progress,
        )
        self.engine.catalog.add(keys, own)
        return keys

    def stored(self, only: str | Sequence[str] | None = None) -> list[str]:
        """Return keys of what the store holds for this session, whoever added it.

        That is what this model encoded behind the session's prefix and surrogate context.

        Args:
            only: Patterns such as ``"notes/*"``: documents with a source whose title or location
                matches one of them. All if None.

        Returns:
            The keys, ordered by location and the place in it.

        Raises:
            InvalidInputError: There is none, or none that a pattern matches.
        """
        return self._corpus.stored(only)

    def sources(self, documents: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return where documents are from, by key: what this session was told, then the store.

        Args:
            documents: The documents' keys; all that this session added if None.
        """
        keys = self.engine.library.named(documents)
        known = self.engine.catalog.find(keys)
        return {key: known.get(key, []) for key in keys}

    def retrieve(
        self, question: str, count: int, *, documents: Sequence[str] | None = None
    ) -> list[str]:
        """Return keys of the documents whose words fit a question best, by BM25.

        Args:
            question: The question.
            count: Most documents to return; those without a word of the question are left out.
            documents: Keys of those to choose among, as `stored` gives them; all that this
                session added if None.

        Returns:
            The keys, the best last, next to the question.

        Raises:
            InvalidInputError: The package bm25s is not installed (``ifkv[retrieve]``), or no
                document has a word of the question.
        """
        return self._corpus.retrieve(question, count, documents)

    def ask(
        self,
        question: str,
        *,
        documents: Sequence[str] | None = None,
        ratio: Ratio | None = None,
        reorder: bool = False,
        selector: str | Selector | None = None,
        max_new_tokens: int | None = None,
        stream: bool | Callable[[str], None] = False,
        layers: Sequence[int] | None = None,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Answer a question over documents.

        Args:
            question: The question, by which the default selector chooses.
            documents: Keys of the documents to use, in order; all that this session added if None.
            ratio: Recompute ratio. 0 answers from the stitched documents as they are; 1 recomputes
                everything that is not exact already and equals a full prefill. Or a
                `Budget`, for other limits and for smoothed scores. Or
                ``"auto"``: a `Plan` for this machine chooses, and is the
                answer's ``plan``; the first time the machine is measured for some seconds.
                The session's ratio if None.
            reorder: Put the documents the question finds most in last.
            max_new_tokens: Length of the answer at most; 64 if nothing else limits it.
            stream: True prints the answer as it comes; a function is called with each piece.
            selector: Selector of the tokens to recompute: a name, with options behind a colon, or
                a selector object; see [ifkv.selectors][]. The session's if None.
            layers: Scoring layers, as in [ifkv.score][], of reordering and of a selector that
                has some and does not name them itself.
            seed: Seed of sampling; torch's own random numbers go on undisturbed.
            **generate_kwargs: Keywords of ``model.generate()``, with the same meaning:
                sampling, beams, penalties, ``stop_strings``, or a ``generation_config``. All else
                is taken from the model's own ``generation_config``, which the checkpoint's
                ``generation_config.json`` fills. If that asks for sampling, answers are sampled;
                ``do_sample=False`` makes them greedy. ``max_length`` counts from the prompt's
                start, in the model's own config from the context's.

        Returns:
            The answer.

        Raises:
            InvalidInputError: Nothing to answer from, an unknown document, or a bad argument.
            DocumentUnreadableError: A stored document cannot be trusted, or its store does not
                answer, and this session does not know its tokens. Otherwise it is prefilled
                again, with a ``StoreWarning``.
        """
        options = AskOptions(
            ratio, reorder, selector, layers, max_new_tokens, seed, generate_kwargs
        )
        return asking.ask(self.engine, question, documents, options, stream)

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """Stream the answer to a question, piece by piece as it is generated.

        Work begins with the first piece. To leave the loop, or to close the stream, stops the
        answer there.

        Args:
            question: The question.
            **options: Options as in `ask`.

        Returns:
            An iterator over the pieces, for ``for`` or ``async for``, whose ``answer`` is the
            `Answer` at the end.

        Raises:
            InvalidInputError: As of `ask`, with the first piece.

        Examples:
            >>> import ifkv
            >>> from ifkv.testing import tiny_model, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer()
            >>> session = ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)
            >>> keys = session.add(["The lamp is red.", "The door is green."])
            >>> stream = session.stream("Which colour is the door?", max_new_tokens=4)
            >>> text = "".join(stream)
            >>> stream.answer.text == text.strip()
            True
        """
        from ifkv.session.answer_stream import AnswerStream

        def run(emit: Callable[[str], None], stopping: Closing) -> Answer:
            own = functions("stopping_criteria", options.get("stopping_criteria"))
            criteria = [*own, stopping]
            given = {**options, "stopping_criteria": criteria}
            return self.ask(question, stream=emit, **given)

        return AnswerStream(run)

    def ask_many(
        self,
        questions: Sequence[str],
        *,
        documents: Sequence[str] | Sequence[Sequence[str] | None] | None = None,
        ratio: Ratio | None = None,
        reorder: bool = False,
        selector: str | Selector | None = None,
        max_new_tokens: int | None = None,
        stream: Callable[[int, str], None] | None = None,
        layers: Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        batch_tokens: int = asking.DEFAULT_REQUEST_TOKENS,
        **generate_kwargs: Any,
    ) -> list[Answer]:
        """Answer several questions, in batches that share every read of the weights.

        The answers are those of `ask`, one question after another. Greedy answers are
        decoded side by side; sampling, beams and further settings of ``model.generate()`` one by
        one. Selectors that score by the query do so for all questions of a batch in one pass.

        Args:
            questions: The questions; their prompts may have any lengths.
            documents: Keys of the documents of all questions, or for each question a list of its
                own (None in it for all documents). Documents that questions share are read once.
            ratio: As in `ask`; ``"auto"`` plans for each question.
            reorder: As in `ask`.
            selector: As in `ask`.
            max_new_tokens: As in `ask`, of each answer.
            stream: Called with a question's number and each piece of its answer as it comes.
            layers: As in `ask`.
            seed: Seed of sampling: one for each question, or one for all.
            batch_tokens: Tokens of context, prompt and answer that a batch holds at most, over
                its questions (a longer one goes alone): it bounds the memory.
            **generate_kwargs: As in `ask`.

        Returns:
            The answers, in order. ``ttft_seconds`` counts from this call; a step's timing is that
            of its batch.

        Raises:
            InvalidInputError: As of `ask`, naming the question (request) that it is about.
                Everything is checked before any answer is worked on.
            DocumentUnreadableError: As of `ask`.

        Examples:
            >>> import ifkv
            >>> from ifkv.testing import tiny_model, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer()
            >>> session = ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)
            >>> lamp, door = session.add(["The lamp is red.", "The door is green."])
            >>> answers = session.ask_many(
            ...     ["Which colour is the lamp?", "And the door?"],
            ...     documents=[[lamp], [lamp, door]],
            ...     max_new_tokens=4,
            ... )
            >>> [len(answer.document_slices) for answer in answers]
            [1, 2]
        """
        options = AskOptions(
            ratio, reorder, selector, layers, max_new_tokens, seed, generate_kwargs
        )
        asked = as_list(questions, "questions", "give a list, or call ask()")
        streams = None
        if stream is not None:
            streams = [functools.partial(stream, number) for number in range(len(asked))]
        return asking.ask_many(
            self.engine, asked, documents, options, streams=streams, batch_tokens=batch_tokens
        )

    def prepare(
        self,
        question: str,
        *,
        documents: Sequence[str] | None = None,
        ratio: Ratio | None = None,
        reorder: bool = False,
        selector: str | Selector | None = None,
        layers: Sequence[int] | None = None,
    ) -> Prepared:
        """Prepare a question up to its first token: its cache, and its logits.

        Takes the arguments of `ask` and raises its errors.
        """
        options = AskOptions(ratio, reorder, selector, layers)
        return asking.prepare_question(self.engine, question, documents, options)

    def complete(
        self,
        ready: Prepared,
        *,
        max_new_tokens: int | None = None,
        stream: bool | Callable[[str], None] = False,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Decode the answer to a prepared question; takes the arguments of `ask`."""
        options = AskOptions(
            max_new_tokens=max_new_tokens, seed=seed, generate_kwargs=generate_kwargs
        )
        settings, seeds = self.engine.settings(options), options.seeds(1)
        return complete(self.engine, [ready], settings, streams=[stream], seeds=seeds)[0]

    def conversation(self, documents: Sequence[str] | None = None) -> Conversation:
        """Begin a conversation: questions that follow one another over one repaired cache.

        Args:
            documents: Keys of the documents to begin with, in order; all that this session added
                if None. `Conversation.add` brings in more.

        Raises:
            InvalidInputError: There is none, or one is not in the store; or the tokenizer's chat
                template rewrites earlier turns, which a kept cache cannot follow.

        Examples:
            >>> import ifkv
            >>> from ifkv.testing import tiny_model, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer()
            >>> session = ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)
            >>> chat = session.conversation(session.add(["The lamp is red."]))
            >>> first = chat.ask("Which colour is the lamp?", max_new_tokens=4)
            >>> chat.add(session.add(["The door is green."]))
            >>> second = chat.ask("And the door?", max_new_tokens=4)
            >>> len(second.document_slices), len(chat.answers)
            (2, 2)
        """
        from ifkv.session.conversation import Conversation

        return Conversation(self.engine, documents)

    def context_ids(self, documents: Sequence[str] | None = None) -> Tensor:
        """Return the tokens of prefix and documents, long ``[T]``, as `ask` takes them."""
        chosen = self.engine.library.get(documents, lazy=True)
        return torch.cat([chosen[0].prefix_ids, *(document.token_ids for document in chosen)])
