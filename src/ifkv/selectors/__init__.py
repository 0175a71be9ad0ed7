"""Selectors: rules that choose which slots to recompute, under one protocol and one budget.

A selector is used by name, with options behind a colon:

    >>> from ifkv import selectors
    >>> selectors.names()[:3]
    ['attention-norm', 'cacheblend', 'deviation-aware']
    >>> selectors.resolve("attention-norm:layers=0.0-1.0,query=question").query
    'question'

Each reports what it spent, in operations and bytes, so that rules are compared at equal cost.

Belongs here: one file for each rule that chooses slots, their protocol, options and registry.
Not here: running rows; a rule calls the steps, which do not know it.
"""

from ifkv.cost import Cost
from ifkv.selectors.attention_norm import AttentionNorm
from ifkv.selectors.budget import Budget, sentence_groups
from ifkv.selectors.cacheblend import CacheBlend
from ifkv.selectors.chance import Random
from ifkv.selectors.deviation_aware import DeviationAware
from ifkv.selectors.entropy import Entropy
from ifkv.selectors.epic import Epic
from ifkv.selectors.options import Layers, describe
from ifkv.selectors.oracle import Oracle
from ifkv.selectors.prophetkv import ProphetKV
from ifkv.selectors.protocol import Ranked, Request, Selection, Selector
from ifkv.selectors.query_ranked import QueryRanked
from ifkv.selectors.recency import Recency
from ifkv.selectors.registry import DEFAULT_SELECTOR, names, register, resolve, selector_class
from ifkv.selectors.schedule import layer_depths
from ifkv.selectors.sensitivity_aware import SensitivityAware
from ifkv.selectors.sink_aware import SinkAware
from ifkv.selectors.two_round import TwoRound
from ifkv.selectors.value_aware import ValueAware

__all__ = [
    "DEFAULT_SELECTOR",
    "AttentionNorm",
    "Budget",
    "CacheBlend",
    "Cost",
    "DeviationAware",
    "Entropy",
    "Epic",
    "Layers",
    "Oracle",
    "ProphetKV",
    "QueryRanked",
    "Random",
    "Ranked",
    "Recency",
    "Request",
    "Selection",
    "Selector",
    "SensitivityAware",
    "SinkAware",
    "TwoRound",
    "ValueAware",
    "describe",
    "layer_depths",
    "names",
    "register",
    "resolve",
    "selector_class",
    "sentence_groups",
]
