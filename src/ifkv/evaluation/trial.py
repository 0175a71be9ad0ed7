"""Trial: one question on one model, by full prefill and in every other way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ifkv.cache.stitch import stitch
from ifkv.cost import Cost, prefill_cost, recompute_cost
from ifkv.documents.cache import DocumentCache
from ifkv.evaluation.decoding import greedy, teacher_forced
from ifkv.evaluation.encodings import Encoding
from ifkv.evaluation.questions import Question
from ifkv.evaluation.ranked_once import RankedOnce
from ifkv.evaluation.setup import Bench
from ifkv.evaluation.text_metrics import best, exact_match, token_f1
from ifkv.evaluation.token_metrics import agreement, divergence, negative_log_likelihood
from ifkv.evaluation.ways import Reference, Result, Way
from ifkv.models.compat import cache_keyword
from ifkv.selectors import Ranked, Request, Selection, Selector
from ifkv.session.prepare import PrepareRequest, choose, find_orders, reorder_ratio
from ifkv.steps.recompute import recompute

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache


# How documents were encoded, and their order; None is the given one.
Placed = tuple["Encoding | None", tuple[int, ...] | None]


class Trial:
    """Question, prefilled in full and stitched, on which ways of answering are measured.

    Args:
        bench: Model and layout.
        question: The question.

    Attributes:
        reference: Full prefill's answer, which the ways are compared with.

    Raises:
        InvalidInputError: There are fewer than two documents, or too many tokens for the model.
    """

    def __init__(self, bench: Bench, question: Question):
        self._bench, self._question = bench, question
        self._parts = bench.parts(question)
        self._prompt = bench.prompt(question)
        self._gold = bench.gold(question, self._prompt).to(bench.model.device)
        self._question_ids = bench.format.encode(question.text)
        self._documents: dict[Encoding | None, list[DocumentCache]] = {}
        self._caches: dict[Placed, StitchedCache] = {}
        self._ranked: dict[tuple[str, Placed], RankedOnce] = {}
        self._orders: dict[tuple[Encoding | None, float], tuple[tuple[int, ...], Cost]] = {}
        self.reference = self._full_prefill()

    def measure(self, ways: Sequence[Way], *, answers: bool = True) -> Iterator[Result]:
        """Yield the measured result of each way, one after the other.

        Args:
            ways: The ways. Those that differ only in the budget share one ranking.
            answers: True to decode answers too, and score them against the right ones.
        """
        for way in ways:
            yield self._measured(way, answers)

    @torch.no_grad()
    def _full_prefill(self) -> Reference:
        """Run the model's own forward over the same ids, and return it as the reference."""
        bench, model = self._bench, self._bench.model
        parts = [bench.format.prefix_ids(), *self._parts, self._prompt]
        ids = torch.cat([torch.tensor(part, dtype=torch.long) for part in parts])
        # A plain cache keeps every key, so that it can be cropped where layers slide.
        run: Any = model
        cache = DynamicCache()
        first = run(
            ids[None].to(model.device),
            use_cache=True,
            logits_to_keep=1,
            **cache_keyword(model, cache),
        ).logits[0, -1]
        self._reply, _ = greedy(
            model, cache, first, max_new_tokens=bench.max_new_tokens, stop=bench.stop
        )
        # Read in one forward, as the other ways read it: single rows round differently.
        self._truth = teacher_forced(model, cache, first, self._reply)
        gold_logits = teacher_forced(model, cache, first, self._gold)
        text = self._text(self._reply)
        return Reference(
            context=len(ids) - len(self._prompt),
            prompt=len(self._prompt),
            documents=len(self._parts),
            tokens=len(self._reply),
            flops=prefill_cost(bench.shape, len(ids)).flops,
            nll=negative_log_likelihood(gold_logits, self._gold),
            answer=text,
            f1=best(token_f1, text, self._question.answers),
            em=best(exact_match, text, self._question.answers),
        )

    @torch.no_grad()
    def _measured(self, way: Way, answers: bool) -> Result:
        bench, model = self._bench, self._bench.model
        order, spent = self._order(way)
        placed = way.encoding, order
        selection = self._selection(way, placed)
        spent += selection.cost
        cache = self._stitched(placed).clone()
        first = recompute(model, cache, selection.slots, prompt_ids=self._prompt)
        assert first is not None
        logits = teacher_forced(model, cache, first, self._reply)
        gold = teacher_forced(model, cache, first, self._gold)
        text = None
        if answers:
            tokens, _ = greedy(
                model,
                cache,
                first,
                max_new_tokens=bench.max_new_tokens,
                stop=bench.stop,
                draft=self._reply,
                draft_logits=logits,
            )
            text = self._text(tokens)
        recomputed = recompute_cost(
            bench.shape, selection.slots.cpu(), cache.context_length, len(self._prompt)
        )
        golds = self._question.answers
        return Result(
            way=way,
            rows=len(selection.slots),
            flops=spent.flops + recomputed.flops,
            selecting_flops=spent.flops,
            selecting_bytes=spent.bytes,
            kl=divergence(self._truth, logits),
            top1=agreement(self._truth, logits),
            nll=negative_log_likelihood(gold, self._gold),
            answer=text,
            f1=None if text is None else best(token_f1, text, golds),
            em=None if text is None else best(exact_match, text, golds),
        )

    def _order(self, way: Way) -> tuple[tuple[int, ...] | None, Cost]:
        """Return the documents' order, None for the given one, and the cost of finding it."""
        if not way.reorder:
            return None, Cost()
        key = way.encoding, reorder_ratio(way.budget)
        if key not in self._orders:
            documents, question = self._encoded(way.encoding), list(self._question_ids)
            asked = PrepareRequest(documents, self._prompt, question, way.budget)
            (order,), (cost,) = find_orders(self._bench.model, [asked])
            self._orders[key] = tuple(order), cost
        return self._orders[key]

    def _encoded(self, encoding: Encoding | None) -> list[DocumentCache]:
        """Return the documents, prefilled when they are first wanted."""
        if encoding not in self._documents:
            self._documents[encoding] = self._bench.documents(self._question, encoding)
        return self._documents[encoding]

    def _stitched(self, placed: Placed) -> StitchedCache:
        """Return documents stitched in an order, to be read only."""
        if placed not in self._caches:
            encoding, order = placed
            documents = self._encoded(encoding)
            self._caches[placed] = stitch(self._bench.model, documents, order=order)
        return self._caches[placed]

    def _selection(self, way: Way, placed: Placed) -> Selection:
        cache = self._stitched(placed)
        if way.selector is None:
            return Selection(torch.zeros(0, dtype=torch.long), None, Cost())
        selector: Selector = way.selector
        if isinstance(selector, Ranked):
            selector = self._ranked.setdefault((str(selector), placed), RankedOnce(selector))
        bench = self._bench
        request = Request(self._prompt, self._question_ids, self._encoded(way.encoding))
        (selection,) = choose(
            bench.model, [cache], [request], [way.budget], selector, bench.tokenizer
        )
        return selection

    def _text(self, tokens: Tensor) -> str:
        text: str = self._bench.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()
