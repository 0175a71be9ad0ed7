"""Predict times to first token from a model's shape and a machine's rates, and choose a ratio.

Predicted times are the counts of `ifkv.cost` at the rates of [ifkv.planning.calibration][]: rows
through a layer, pairs of a row and a key, bytes stitched, one read of the vocabulary's matrix. On a
machine with one rate for everything and no overhead, the prediction is the arithmetic itself. Where
layers have a sliding window, pairs beyond it are taken to need no time. An attention that computes
and masks them, as SDPA does in full prefill, takes longer than predicted.

`ifkv.planning.plan.choose` takes the largest ratio whose hot time to first token is predicted to be
``speedup`` times faster than full prefill (twice by default), since answers come nearer to full
prefill's with every recomputed token. If there is none, it takes the fastest ratio. If no ratio is
faster than full prefill, it takes full prefill, which is exact.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ifkv.cost import (
    ModelShape,
    causal_pairs,
    query_pairs,
    scoring_cost,
    speedup_bound,
    spread_pairs,
)
from ifkv.errors import CalibrationWarning
from ifkv.planning.calibration import Rates, rates_for
from ifkv.planning.plan import Forecast, Plan, choose
from ifkv.planning.sanity import doubt_about
from ifkv.planning.support import check_plannable, check_request
from ifkv.selectors import DEFAULT_SELECTOR, QueryRanked, Selector, resolve
from ifkv.steps.select import budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "RATIOS",
    "SPEEDUP",
    "Forecast",
    "Plan",
    "Planner",
    "planner_for",
    "shape_of_config",
]

RATIOS = (0.05, 0.15, 0.3)
SPEEDUP = 2.0

shape_of_config = ModelShape.of_config


class Planner:
    """Planner for one model on one machine.

    Args:
        shape: The model's shape.
        rates: The machine's rates.
        positions: Positions that the model has; None if there is no limit.

    Examples:
        >>> from ifkv.planning.planner import Planner
        >>> from ifkv.planning.calibration import Curve, Grid, Rates
        >>> from ifkv.cost import ModelShape
        >>> from ifkv.testing import tiny_model
        >>> flat = Grid((1.0,), (1.0,), ((1e9,),))
        >>> rates = Rates("2026-01-01", Curve((1.0,), (1e-3,)), flat, flat, flat, flat,
        ...               value_bytes=1e9, weight_bytes=1e9, stitch_bytes=1e9, stitch_document=0.0,
        ...               host_bytes=None)
        >>> plan = Planner(ModelShape.of(tiny_model()), rates).plan(1000, documents=4, prompt=20)
        >>> plan.ratio, plan.reason
        (0.3, 'the largest of these ratios predicted to be 2× faster than full prefill')
    """

    def __init__(self, shape: ModelShape, rates: Rates, *, positions: int | None = None):
        self.shape = shape
        self.rates = rates
        self.positions = positions
        self._warned = False

    def plan(
        self,
        tokens: int,
        *,
        documents: int,
        prompt: int,
        question: int | None = None,
        ratios: Sequence[float] = RATIOS,
        selector: str | Selector = DEFAULT_SELECTOR,
        speedup: float = SPEEDUP,
        first_exact: bool = True,
    ) -> Plan:
        """Predict a request's times and choose among the ratios.

        Warn with a `CalibrationWarning` once, at the first plan whose times are in doubt
        (``Plan.doubt``).

        Args:
            tokens: Tokens of the context, including the prefix.
            documents: Number of documents; they count as equally long.
            prompt: Tokens of the prompt.
            question: Tokens of the bare question, for selectors that score by it; the prompt's if
                None.
            ratios: Ratios to choose among.
            selector: Selector of the tokens, as in [ifkv.Session.ask][].
            speedup: Speed-up over full prefill that a ratio should reach.
            first_exact: Whether the first document is exact already and never recomputed, as it
                is unless documents are encoded behind a surrogate context.

        Raises:
            InvalidInputError: A number that is not positive, more documents than tokens, a ratio
                outside [0, 1] or none at all, more tokens than the model has positions, or a
                selector whose time is not predicted.
        """
        question = prompt if question is None else question
        check_request(
            tokens,
            documents=documents,
            prompt=prompt,
            question=question,
            ratios=ratios,
            speedup=speedup,
            positions=self.positions,
        )
        rule = check_plannable(resolve(selector))
        seconds, flops = self._choosing(tokens, prompt, question, rule)
        prefill = self._prefill(tokens + prompt)
        forecasts = tuple(
            self._forecast(tokens, documents, prompt, ratio, seconds, flops, first_exact)
            for ratio in sorted(set(ratios))
        )
        ratio, reason = choose(prefill, forecasts, speedup)
        nbytes = tokens * self.shape.token_bytes
        plan = Plan(tokens, documents, prompt, prefill, nbytes, forecasts, ratio, reason)
        doubt = doubt_about(plan, self.rates, self.shape.num_layers)
        if doubt is not None and not self._warned:
            self._warned = True
            warnings.warn(doubt, CalibrationWarning, stacklevel=2)
        return dataclasses.replace(plan, doubt=doubt)

    def _prefill(self, tokens: int) -> float:
        shape, rates = self.shape, self.rates
        pairs = shape.pairs(lambda window: causal_pairs(0, tokens, window))
        attention = 4 * shape.attention_width * pairs / rates.prefill_attention.at(tokens, 1)
        return shape.num_layers * rates.layer.at(tokens) + attention + self._head()

    def _forecast(
        self,
        tokens: int,
        documents: int,
        prompt: int,
        ratio: float,
        choosing: float,
        choosing_flops: float,
        first_exact: bool,
    ) -> Forecast:
        shape, rates = self.shape, self.rates
        first = tokens // documents if first_exact else 0  # never selected
        rows = min(budget(tokens, ratio), tokens - first)
        position = (tokens + first) / (2 * tokens)
        nbytes = tokens * shape.token_bytes
        stitch = nbytes / rates.stitch_bytes + documents * rates.stitch_document
        if rates.host_bytes is not None:
            stitch += nbytes / rates.host_bytes
        if ratio in (0, 1):  # a budget of nothing or of everything needs no scores
            choosing = choosing_flops = 0.0
        recompute = self._recompute(tokens, rows, prompt, position)
        hot = stitch + choosing + recompute
        warm, cold = (
            None if speed is None else hot + nbytes / speed + documents * rates.open_document
            for speed in (rates.warm_bytes, rates.cold_bytes)
        )
        bound = speedup_bound(
            shape,
            context_length=tokens,
            query_length=prompt,
            ratio=rows / tokens,
            position=position,
            selection_flops=choosing_flops,
        )
        return Forecast(ratio, rows, stitch, choosing, recompute, hot, warm, cold, bound)

    def _choosing(
        self, tokens: int, prompt: int, question: int, rule: QueryRanked
    ) -> tuple[float, float]:
        """Return the seconds and the operations of a selector."""
        shape, layers = self.shape, rule.layers.within(self.shape.num_layers)
        lengths = {"prompt": [prompt], "question": [question], "both": [prompt, question]}
        seconds = flops = 0.0
        for length in lengths[rule.query]:
            further = rule.further_cost(shape, length, tokens, layers)
            seconds += self._scoring(tokens, length, layers)
            seconds += further.bytes / self.rates.value_bytes
            flops += (scoring_cost(shape, length, tokens, layers) + further).flops
        return seconds, flops

    def _scoring(self, tokens: int, query: int, layers: list[int]) -> float:
        shape, rates = self.shape, self.rates
        wide = shape.attention_width
        deepest, through = max(layers), rates.layer.at(query)
        attended = shape.pairs(lambda window: causal_pairs(tokens, query, window), deepest + 1)
        scored = sum(query_pairs(tokens, query, shape.window(layer)) for layer in layers)
        # The deepest layer runs without its MLP.
        return (
            (deepest + self._attention_share) * through
            + 4 * wide * attended / rates.query_attention.at(tokens, query)
            + 2 * wide * scored / rates.norms.at(tokens, query)
        )

    def _recompute(self, tokens: int, rows: int, prompt: int, position: float) -> float:
        shape, rates = self.shape, self.rates
        wide, every = shape.attention_width, rows + prompt
        through = rates.layer.at(every)
        rate = rates.rows_attention.at(tokens, every / tokens)

        def pairs(window: int | None) -> float:
            spread = spread_pairs(rows, tokens, position, window)
            return spread + causal_pairs(tokens, prompt, window)

        attended = shape.pairs(pairs, shape.num_layers - 1)
        one = causal_pairs(tokens + prompt - 1, 1, shape.window(-1))
        # In the last layer, all rows give keys and values, but only the last row runs through the
        # rest.
        return (
            (shape.num_layers - 1 + self._attention_share) * through
            + 4 * wide * attended / rate
            + rates.layer.at(1)
            + 4 * wide * one / rates.query_attention.at(tokens, 1)
            + self._head()
        )

    def _head(self) -> float:
        shape = self.shape
        return shape.vocabulary * shape.hidden_size * shape.element_size / self.rates.weight_bytes

    @property
    def _attention_share(self) -> float:
        return self.shape.attention_parameters / self.shape.layer_parameters


def planner_for(
    model: PreTrainedModel | PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    recalibrate: bool = False,
) -> Planner:
    """Build a planner for a model on this machine, whose rates are measured if unknown.

    Args:
        model: A model, or only its config.
        dtype: Dtype of weights and cache; ignored for a model, which has one.
        device: Device to run on; ignored for a model, which is on one.
        backend: As in [ifkv.patch][].
        recalibrate: If True, measure the rates again.

    Raises:
        InvalidInputError: The config describes no model of this kind.
        UnsupportedModelError: The model belongs to no family that is supported.
    """
    found: Any = model
    if hasattr(found, "get_decoder"):
        config, shape = found.config, ModelShape.of(found)
        dtype, device = found.dtype, found.device
    else:
        config, dtype = found, dtype or torch.float32
        shape = ModelShape.of_config(config, dtype)
    rates = rates_for(
        config,
        shape,
        dtype=dtype,
        device=torch.device(device),
        backend=backend,
        again=recalibrate,
    )
    return Planner(shape, rates, positions=config.max_position_embeddings)
