"""Predictions of times to first token on this machine, and the recompute ratio they recommend.

Belongs here: the planner, its plans, and the calibration that measures the machine.
Not here: counting operations (`ifkv.cost`) and timing of requests (`ifkv.session`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.utils.lazy import lazily

if TYPE_CHECKING:
    from ifkv.planning.plan import Plan
    from ifkv.planning.planner import Planner, planner_for, shape_of_config

__all__ = ["Plan", "Planner", "planner_for", "shape_of_config"]

__getattr__ = lazily(
    __name__,
    {
        "Plan": "plan",
        "Planner": "planner",
        "planner_for": "planner",
        "shape_of_config": "planner",
    },
)
