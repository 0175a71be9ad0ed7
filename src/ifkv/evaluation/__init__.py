"""Comparison of ways of answering over many questions: data sets, metrics, runs and summaries.

The command ``ifkv eval`` consists of these parts:

    >>> from ifkv.evaluation import draw, load, matrix
    >>> questions = draw(load("needle"), limit=2, passages=4)
    >>> [len(question.passages) for question in questions]
    [4, 4]
    >>> [way.key for way in matrix(["epic"], [0.15])]
    ['stitch only @0', 'epic @0.15']

Belongs here: data sets, ways of answering, metrics, tables and pages that compare them.
Not here: the timing of benchmarks, which lie beside the package.
"""

from ifkv.evaluation.bootstrap import Bootstrap, Estimate
from ifkv.evaluation.datasets import load, names
from ifkv.evaluation.questions import Dataset, Passage, Question, draw
from ifkv.evaluation.results_log import Ledger
from ifkv.evaluation.runner import Run, run, settings_of
from ifkv.evaluation.setup import Bench
from ifkv.evaluation.trial import Trial
from ifkv.evaluation.ways import Reference, Result, Way, matrix

__all__ = [
    "Bench",
    "Bootstrap",
    "Dataset",
    "Estimate",
    "Ledger",
    "Passage",
    "Question",
    "Reference",
    "Result",
    "Run",
    "Trial",
    "Way",
    "draw",
    "load",
    "matrix",
    "names",
    "run",
    "settings_of",
]
