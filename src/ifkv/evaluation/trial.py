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
        self._documents = bench.documents(question)
        self._prompt = bench.prompt(question)
        self._gold = bench.gold(question, self._prompt).to(bench.model.device)
        self._request = Request(
            prompt_ids=self._prompt,
            question_ids=bench.format.encode(question.text),
            documents=self._documents,
        )
        self._caches: dict[tuple[int, ...] | None, StitchedCache] = {}
        self._ranked: dict[tuple[str, tuple[int, ...] | None], RankedOnce] = {}
        self._orders: dict[float, tuple[tuple[int, ...], Cost]] = {}
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
        ids = torch.cat([d.token_ids for d in self._parts()] + [torch.tensor(self._prompt)])
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
            documents=len(self._documents),
            tokens=len(self._reply),
            flops=prefill_cost(bench.shape, len(ids)).flops,
            nll=negative_log_likelihood(gold_logits, self._gold),
            answer=text,
            f1=best(token_f1, text, self._question.answers),
            em=best(exact_match, text, self._question.answers),
        )

    def _parts(self) -> list[DocumentCache]:
        prefix = self._documents[0].prefix
        return ([] if prefix is None else [prefix]) + self._documents

    @torch.no_grad()
    def _measured(self, way: Way, answers: bool) -> Result:
        bench, model = self._bench, self._bench.model
        order, spent = self._order(way)
        selection = self._selection(way, order)
        spent += selection.cost
        cache = self._stitched(order).clone()
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
        ratio = reorder_ratio(way.budget)
        if ratio not in self._orders:
            question = list(self._request.question_ids)
            asked = PrepareRequest(self._documents, self._prompt, question, way.budget)
            (order,), (cost,) = find_orders(self._bench.model, [asked])
            self._orders[ratio] = tuple(order), cost
        return self._orders[ratio]

    def _stitched(self, order: tuple[int, ...] | None) -> StitchedCache:
        """Return the documents stitched in an order, to be read only."""
        if order not in self._caches:
            self._caches[order] = stitch(self._bench.model, self._documents, order=order)
        return self._caches[order]

    def _selection(self, way: Way, order: tuple[int, ...] | None) -> Selection:
        cache = self._stitched(order)
        if way.selector is None:
            return Selection(torch.zeros(0, dtype=torch.long), None, Cost())
        selector: Selector = way.selector
        if isinstance(selector, Ranked):
            selector = self._ranked.setdefault((str(selector), order), RankedOnce(selector))
        bench = self._bench
        (selection,) = choose(
            bench.model, [cache], [self._request], [way.budget], selector, bench.tokenizer
        )
        return selection

    def _text(self, tokens: Tensor) -> str:
        text: str = self._bench.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()
