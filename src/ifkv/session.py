"""One object for people with text and a tokenizer: add documents, ask questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.answer import Answer, Prepared
from ifkv.checks import check_positive, token_tensor
from ifkv.cost import ModelShape, mean_position, speedup_bound
from ifkv.documents import DocumentCache, prefill_documents
from ifkv.errors import InvalidInputError
from ifkv.generation import generate
from ifkv.patching import handle_of, patch
from ifkv.recomputation import recompute
from ifkv.reordering import reorder as reorder_documents
from ifkv.scoring import default_layers, score
from ifkv.selection import budget, select
from ifkv.stitching import stitch
from ifkv.streaming import text_streamer
from ifkv.text import INSTRUCTION, PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.stitched_cache import StitchedCache
    from ifkv.store import DocumentStore


class Session:
    """Documents of one model and one prefix, and the questions asked over them.

    Args:
        model: A Llama, Qwen, Mistral or Phi-3 model; it is patched if it is not.
        tokenizer: Its tokenizer.
        store: Where documents are kept; in memory, for this session alone, if None.
        prefix: Text or token ids that every document is encoded behind; by default what the
            tokenizer's chat template puts before the documents, with ``instruction``.
        instruction: Text before the documents, when the prefix is not given.
        backend: For :func:`ifkv.patch`.

    Example:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> session = ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)
        >>> keys = session.add(["The lamp is red.", "The door is green."])
        >>> answer = session.ask("Which colour is the door?", ratio=0.5, max_new_tokens=4)
        >>> len(answer.token_ids) <= 4, sorted(answer.order)
        (True, [0, 1])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        store: DocumentStore | None = None,
        prefix: str | Sequence[int] | None = None,
        instruction: str = INSTRUCTION,
        backend: str = "auto",
    ):
        from ifkv.store import MemoryStore

        patch(model, backend=backend)
        self.model = model
        self.tokenizer = tokenizer
        self.format = PromptFormat(tokenizer, instruction)
        self.store: DocumentStore = MemoryStore() if store is None else store
        if prefix is None:
            self.prefix_ids = self.format.prefix_ids()
        elif isinstance(prefix, str):
            self.prefix_ids = self.format.encode(prefix)
        else:
            self.prefix_ids = token_tensor(model, prefix, "the prefix", empty=True).tolist()
        self.keys: list[str] = []
        self._prefix: DocumentCache | None = None

    def add(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[str]:
        """Prefill documents and keep them; those the store holds already are not computed again.

        Args:
            texts: The documents' texts.
            batch_tokens: As in :func:`ifkv.prefill_documents`.
            progress: Show a progress bar.

        Returns:
            The documents' keys in the store, in order.

        Raises:
            InvalidInputError: A document is blank, or ``texts`` is a single string.
        """
        if isinstance(texts, str):
            raise InvalidInputError(
                "texts is one string; give a list of documents, for example [text]."
            )
        ids = [self.format.document_ids(text) for text in texts]
        keys = [self.store.key_for(self.model, one, self.prefix_ids) for one in ids]
        missing = {key: one for key, one in zip(keys, ids, strict=True) if key not in self.store}
        made = prefill_documents(
            self.model,
            list(missing.values()),
            prefix=self._current_prefix() or self.prefix_ids,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        for document in made:
            self.store.put(document)
            self._prefix = document.prefix
        self.keys += [key for key in dict.fromkeys(keys) if key not in self.keys]
        return keys

    def ask(
        self,
        question: str,
        *,
        documents: Sequence[str] | None = None,
        ratio: float = 0.15,
        reorder: bool = False,
        max_new_tokens: int = 32,
        stream: bool | Callable[[str], None] = False,
        layers: Sequence[int] | None = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Answer a question over documents.

        Args:
            question: The question. The whole prompt it becomes is scored.
            documents: Keys of the documents to use, in order; all that this session added if None.
            ratio: Recompute ratio. 0 answers from the stitched documents as they are; 1 recomputes
                everything that is not exact already and equals a full prefill.
            reorder: Put the documents the question finds most in last.
            max_new_tokens: Length of the answer at most.
            stream: True prints the answer as it comes; a function is called with each piece.
            layers: Scoring layers, as in :func:`ifkv.score`.
            **generate_kwargs: For ``model.generate()``; greedy decoding by default.

        Returns:
            The answer.

        Raises:
            InvalidInputError: Nothing to answer from, an unknown document, or a bad argument.
        """
        check_positive(max_new_tokens, "max_new_tokens")  # before any work
        _check_kwargs(generate_kwargs)
        ready = self.prepare(
            question, documents=documents, ratio=ratio, reorder=reorder, layers=layers
        )
        return self.complete(ready, max_new_tokens=max_new_tokens, stream=stream, **generate_kwargs)

    def prepare(
        self,
        question: str,
        *,
        documents: Sequence[str] | None = None,
        ratio: float = 0.15,
        reorder: bool = False,
        layers: Sequence[int] | None = None,
    ) -> Prepared:
        """Everything before the first token: the cache with the prompt in it, and its logits.

        Takes the arguments of :meth:`ask` and raises its errors.
        """
        started = time.perf_counter()
        budget(1, ratio)  # refuse a bad ratio before any work
        prompt = self.format.prompt_ids(question)
        chosen = self._documents(documents)
        timings: dict[str, float] = {}
        timed = _Stopwatch(timings, self.model)

        order = None
        if reorder:
            with timed("reorder"):
                order = reorder_documents(self.model, chosen, prompt, ratio=ratio, layers=layers)
        with timed("stitch"):
            cache = stitch(self.model, chosen, order=order)
        scores, slots = None, torch.zeros(0, dtype=torch.long)
        if ratio == 1:
            slots = torch.arange(cache.document_slices[0].stop, cache.context_length)
        elif ratio > 0:
            with timed("score"):
                scores = score(self.model, cache, prompt, layers=layers)
            with timed("select"):
                slots = select(cache, scores, ratio=ratio)
        with timed("recompute and prompt"):
            logits = recompute(self.model, cache, slots, prompt_ids=prompt)
        assert logits is not None
        return Prepared(
            cache=cache,
            prompt_ids=prompt,
            logits=logits,
            scores=scores,
            slots=slots,
            timings=timings,
            ttft_seconds=time.perf_counter() - started,
            speedup_bound=self._bound(
                cache, slots, len(prompt), layers, (scores is not None) + reorder
            ),
        )

    def complete(
        self,
        ready: Prepared,
        *,
        max_new_tokens: int = 32,
        stream: bool | Callable[[str], None] = False,
        **generate_kwargs: Any,
    ) -> Answer:
        """Decode the answer to a prepared question; takes the arguments of :meth:`ask`."""
        _check_kwargs(generate_kwargs)
        decoding = time.perf_counter()
        generate_kwargs.setdefault("do_sample", False)
        generate_kwargs.setdefault("pad_token_id", self.pad_token_id)
        sequence = generate(
            self.model,
            ready.cache,
            ready.prompt_ids,
            max_new_tokens=max_new_tokens,
            streamer=text_streamer(self.tokenizer, stream),
            **generate_kwargs,
        )
        token_ids = sequence[0, len(ready.prompt_ids) :].cpu()
        return Answer(
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True).strip(),
            token_ids=token_ids,
            ttft_seconds=ready.ttft_seconds,
            timings={**ready.timings, "decode": time.perf_counter() - decoding},
            scores=None if ready.scores is None else ready.scores.cpu(),
            slots=ready.slots.cpu(),
            order=ready.cache.order,
            context_ids=ready.cache.token_ids.cpu(),
            document_slices=ready.cache.document_slices,
            prompt_ids=torch.tensor(ready.prompt_ids),
            first_logits=ready.logits.float().cpu(),
            speedup_bound=ready.speedup_bound,
        )

    def context_ids(self, documents: Sequence[str] | None = None) -> Tensor:
        """Tokens of prefix and documents, long ``[T]``, as they are given to :meth:`ask`."""
        chosen = self._documents(documents)
        return torch.cat([chosen[0].prefix_ids, *(document.token_ids for document in chosen)])

    @property
    def pad_token_id(self) -> int | None:
        """What generate() pads with: the tokenizer's padding token, or its end-of-text token."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _current_prefix(self) -> DocumentCache | None:
        """The prefix's rows, unless the model's weights have changed since they were made."""
        identity = handle_of(self.model).fingerprints.of(self.model)
        if self._prefix is not None and self._prefix.fingerprint != identity:
            self._prefix = None
        return self._prefix

    def _documents(self, keys: Sequence[str] | None) -> list[DocumentCache]:
        """Documents by key, refused with the remedy if they are not there."""
        if isinstance(keys, str):
            raise InvalidInputError(
                "documents is one string; give a list of keys, for example [key]."
            )
        wanted = self.keys if keys is None else list(keys)
        if not wanted:
            raise InvalidInputError("there is no document to answer from; call add([...]) first.")
        found = []
        for key in wanted:
            try:
                found.append(self.store.get(key))
            except KeyError:
                raise InvalidInputError(
                    f"document {key!r} is not in the store; add() its text again. Keys are what "
                    "add() returns."
                ) from None
        return found

    def _bound(
        self,
        cache: StitchedCache,
        slots: Tensor,
        query_length: int,
        layers: Sequence[int] | None,
        passes: int,
    ) -> float:
        shape = ModelShape.of(self.model)
        deepest = 0
        if passes:
            chosen = default_layers(shape.num_layers) if layers is None else layers
            deepest = max(layer % shape.num_layers for layer in chosen) + 1
        return speedup_bound(
            shape,
            context_length=cache.context_length,
            query_length=query_length,
            ratio=len(slots) / cache.context_length,
            scoring_layers=deepest * passes,
            position=mean_position(slots, cache.context_length),
        )


def _check_kwargs(generate_kwargs: dict[str, Any]) -> None:
    """Refuse, before any work, what one answer has no place for."""
    for key in ("streamer", "return_dict_in_generate", "num_return_sequences"):
        if key in generate_kwargs:
            raise InvalidInputError(
                f"{key}={generate_kwargs[key]!r} cannot be given here, where one Answer is made; "
                "use ifkv.generate for it (and stream= for streaming)."
            )


class _Stopwatch:
    """Times named steps; on a GPU it waits for them, so that a step's time is its own."""

    def __init__(self, timings: dict[str, float], model: PreTrainedModel):
        self._timings = timings
        self._device = model.device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._timings[name] = time.perf_counter() - start
