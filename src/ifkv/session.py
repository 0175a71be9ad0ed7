"""One object for people with text and a tokenizer: add documents, ask questions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.cost import ModelShape, mean_position, speedup_bound
from ifkv.documents import DocumentCache, prefill_documents
from ifkv.errors import InvalidInputError
from ifkv.generation import generate
from ifkv.patching import patch
from ifkv.recomputation import recompute
from ifkv.reordering import reorder as reorder_documents
from ifkv.scoring import default_layers, score
from ifkv.selection import budget, select
from ifkv.stitching import stitch
from ifkv.text import INSTRUCTION, PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.stitched_cache import StitchedCache
    from ifkv.store import DocumentStore


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """An answer and how it came about.

    Attributes:
        text: The answer, special tokens left out.
        token_ids: The answer's tokens, long ``[new]``, on the CPU.
        ttft_seconds: From the question's arrival to the first token's logits.
        timings: Seconds of each step before that, and of ``decode`` after it.
        scores: Attention norms ``[T]`` in the cache's order, on the CPU; None if nothing had to be
            scored (ratio 0 or 1).
        slots: Slots that were recomputed, ascending, on the CPU.
        order: For each document of the context, its index among those asked.
        context_ids: The context's tokens ``[T]``, on the CPU.
        document_slices: Slots of each document, in the cache's order.
        prompt_ids: The prompt's tokens, on the CPU.
        first_logits: Logits of the first answered token, float32 ``[vocabulary]``, on the CPU.
        speedup_bound: S(r) of this request: what a full prefill costs over what this did, in
            operations, with the selected rows' actual positions.
    """

    text: str
    token_ids: Tensor
    ttft_seconds: float
    timings: dict[str, float]
    scores: Tensor | None
    slots: Tensor
    order: list[int]
    context_ids: Tensor
    document_slices: list[slice]
    prompt_ids: Tensor
    first_logits: Tensor
    speedup_bound: float

    def __str__(self) -> str:
        return self.text


class Session:
    """Documents of one model and one prefix, and the questions asked over them.

    Args:
        model: A Llama, Qwen or Mistral model; it is patched if it is not.
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
            self.prefix_ids = list(prefix)
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
            prefix=self._prefix or self.prefix_ids,
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
        ttft = time.perf_counter() - started

        decoding = time.perf_counter()
        streamer = _streamer(self.tokenizer, stream)
        generate_kwargs.setdefault("do_sample", False)
        sequence = generate(
            self.model,
            cache,
            prompt,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=_pad_token_id(self.tokenizer),
            **generate_kwargs,
        )
        timings["decode"] = time.perf_counter() - decoding
        token_ids = sequence[0, len(prompt) :].cpu()
        assert logits is not None
        return Answer(
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True).strip(),
            token_ids=token_ids,
            ttft_seconds=ttft,
            timings=timings,
            scores=None if scores is None else scores.cpu(),
            slots=slots.cpu(),
            order=cache.order,
            context_ids=cache.token_ids.cpu(),
            document_slices=cache.document_slices,
            prompt_ids=torch.tensor(prompt),
            first_logits=logits.float().cpu(),
            speedup_bound=self._bound(cache, slots, len(prompt), layers, scores is not None),
        )

    def _documents(self, keys: Sequence[str] | None) -> list[DocumentCache]:
        """Documents by key, refused with the remedy if they are not there."""
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
        scored: bool,
    ) -> float:
        shape = ModelShape.of(self.model)
        deepest = 0
        if scored:
            chosen = default_layers(shape.num_layers) if layers is None else layers
            deepest = max(layer % shape.num_layers for layer in chosen) + 1
        return speedup_bound(
            shape,
            context_length=cache.context_length,
            query_length=query_length,
            ratio=len(slots) / cache.context_length,
            scoring_layers=deepest,
            position=mean_position(slots, cache.context_length),
        )


class _Stopwatch:
    """Times named steps; on a GPU it waits for them, so that a step's time is its own."""

    def __init__(self, timings: dict[str, float], model: PreTrainedModel):
        self._timings = timings
        self._cuda = model.device.type == "cuda"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self._timings[name] = time.perf_counter() - start


def _pad_token_id(tokenizer: Any) -> int | None:
    value: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if value is None else value


def _streamer(tokenizer: Any, stream: bool | Callable[[str], None]) -> Any:
    if stream is False:
        return None
    from transformers import TextStreamer

    if stream is True:
        return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    emit = stream

    class _Callback(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                emit(text)

    return _Callback(tokenizer, skip_prompt=True, skip_special_tokens=True)
