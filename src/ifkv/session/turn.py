"""Later turns of a conversation: only new rows run before the first token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.cache.checks import check_cache
from ifkv.cache.extend import extend
from ifkv.cost import Cost, ModelShape, recompute_cost
from ifkv.errors import InvalidInputError
from ifkv.models.decoder import DecoderView
from ifkv.patching.handle import handle_of
from ifkv.selectors import Budget, Request, Selection, Selector
from ifkv.session.prepare import choose, prepared_of
from ifkv.session.prompt_format import check_question
from ifkv.session.stopwatch import Stopwatch
from ifkv.steps.pending_rows import defer
from ifkv.steps.recompute import recompute
from ifkv.steps.scoring_layers import chosen_layers

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache
    from ifkv.documents.cache import DocumentCache
    from ifkv.generation.settings import GenerationSettings
    from ifkv.session.answer import Prepared
    from ifkv.session.engine import Engine
    from ifkv.session.options import AskOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A question of a conversation, and how to answer it; as `Conversation.ask` takes it."""

    question: str
    budget: Budget
    selector: Selector
    revisit: bool
    settings: GenerationSettings
    seed: int | None

    @classmethod
    def checked(
        cls,
        engine: Engine,
        question: str,
        options: AskOptions,
        *,
        revisit: bool,
    ) -> Asked:
        """Check the arguments of `Conversation.ask`; refuses bad ones before any work."""
        settings = engine.settings(options)
        chosen_layers(DecoderView(engine.model).num_layers, options.layers)
        check_question(question)
        budget = engine.ratios.fixed(options.ratio, "turns of a conversation")
        (seed,) = options.seeds(1)
        return cls(question, budget, engine.rule(options), revisit, settings, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """Tokens and documents behind the rows of earlier turns.

    Attributes:
        documents: Further documents, in order.
        before_ids: Tokens that stand before these documents and have no rows yet; none without
            documents.
        prompt_ids: Tokens that follow them.
        old_slots: Slots of earlier documents that may be recomputed now, long, ascending, on the
            model's device.
    """

    documents: Sequence[DocumentCache]
    before_ids: list[int]
    prompt_ids: list[int]
    old_slots: Tensor

    @classmethod
    def read(
        cls,
        engine: Engine,
        cache: StitchedCache,
        asked: Asked,
        *,
        documents: Sequence[str],
        before_ids: list[int],
        prompt_ids: list[int],
        recomputed: Tensor,
        timed: Stopwatch,
    ) -> Turn:
        """Read a turn's documents from the session's store.

        Args:
            engine: The conversation's.
            cache: The conversation's cache.
            asked: The question.
            documents: Keys of further documents, maybe none.
            before_ids: As the attribute.
            prompt_ids: As the attribute.
            recomputed: Slots that earlier turns have recomputed, long, on the CPU.
            timed: Times the reading.

        Raises:
            InvalidInputError: The selector needs positions that documents do not have any more.
            FingerprintMismatchError: The model's weights have changed since the last turn.
            NotPatchedError: The model has been unpatched.
        """
        model = engine.model
        handle_of(model).identity(model)  # weights may have changed since the last turn
        check_cache(model, cache)
        own = getattr(asked.selector, "geometry", "global")
        if own != "global" and (asked.revisit or documents):
            raise InvalidInputError(
                f"selector {asked.selector} scores documents in positions of their own, but behind "
                "the first turn they have those of the conversation; give geometry=global."
            )
        found: list[DocumentCache] = []
        if documents:
            with timed("load"):
                found = engine.library.get(documents)
        open_slots = torch.zeros(cache.context_length, dtype=torch.bool)
        for rows in cache.stale_slices if asked.revisit else ():
            open_slots[rows] = True
        open_slots[recomputed] = False
        return cls(found, before_ids, prompt_ids, open_slots.nonzero()[:, 0].to(model.device))


def prepare_turn(
    engine: Engine,
    cache: StitchedCache,
    asked: Asked,
    turn: Turn,
    timed: Stopwatch,
    save: Callable[[Tensor], None],
) -> Prepared:
    """Append a turn's documents, repair them for its prompt, and run the prompt.

    Without documents and old slots that is the prompt's rows over the cache and nothing else.

    Args:
        engine: The conversation's.
        cache: The conversation's cache, which ends with its context.
        asked: The question; its budget is of the slots that may be recomputed.
        turn: What is new.
        timed: Started when the question arrived.
        save: Called with slots of earlier documents before they are recomputed.

    Returns:
        The cache with the prompt in it, and the first token's logits.

    Raises:
        InvalidInputError: As of the steps.
    """
    model, budget, selector = engine.model, asked.budget, asked.selector
    start, candidates = cache.context_length, turn.old_slots
    if turn.documents:
        defer(model, cache, turn.before_ids)
        # A selector may look at any row, unless its class says otherwise; and where slots before
        # these rows are to be recomputed, these see them as the turns before did.
        if len(turn.old_slots) or not vars(type(selector)).get("only_scores", False):
            with timed("recompute and prompt"):
                recompute(model, cache, [])
        with timed("stitch"):
            candidates = torch.cat((candidates, extend(model, cache, turn.documents)))
    selection = Selection(candidates, None, Cost())  # no slots, if there are none to choose from
    if len(candidates):
        with timed("select"):
            view = cache.choosing(candidates)
            request = Request(turn.prompt_ids, engine.format.encode(asked.question))
            (selection,) = choose(model, [view], [request], [budget], selector, engine.tokenizer)
    slots = selection.slots
    with timed("recompute and prompt"):
        save(slots[slots < start])
        logits = recompute(model, cache, slots, prompt_ids=turn.prompt_ids)
    assert logits is not None
    shape, length = ModelShape.of(model), cache.context_length
    ran = torch.cat((torch.arange(start, start + len(turn.before_ids)), slots.cpu()))
    new = recompute_cost(shape, torch.arange(start, length), length, len(turn.prompt_ids))
    own = recompute_cost(shape, ran, length, len(turn.prompt_ids)) + selection.cost
    bound = new.flops / own.flops
    ready = prepared_of(cache, turn.prompt_ids, logits, selection, selector, bound, timed)
    return dataclasses.replace(ready, question=asked.question)
