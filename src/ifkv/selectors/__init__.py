"""Selectors: rules that choose which slots to recompute, under one protocol and one budget.

A selector is used by name, with options behind a colon:

    >>> from ifkv import selectors
    >>> selectors.names()
    ['attention-norm', 'random']
    >>> selectors.resolve("attention-norm:layers=0.0-1.0,query=question").query
    'question'

Each reports what it spent, in operations and bytes, so that rules are compared at equal cost.
"""

from ifkv.cost import Cost
from ifkv.selectors.attention_norm import AttentionNorm
from ifkv.selectors.budget import Budget, sentence_groups
from ifkv.selectors.chance import Random
from ifkv.selectors.options import Layers, describe
from ifkv.selectors.protocol import Ranked, Request, Selection, Selector
from ifkv.selectors.registry import names, register, resolve, selector_class

__all__ = [
    "AttentionNorm",
    "Budget",
    "Cost",
    "Layers",
    "Random",
    "Ranked",
    "Request",
    "Selection",
    "Selector",
    "describe",
    "names",
    "register",
    "resolve",
    "selector_class",
    "sentence_groups",
]
