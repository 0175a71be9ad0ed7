"""Tell rates that were measured on a busy machine, by themselves and by what they predict.

A neighbour on the same cores makes some rates too low and others not. What then tells: passes of
measuring that disagree; times that are later than plain prefill's where the operations are far
fewer; times that are far sooner than the count of operations allows.
"""

from __future__ import annotations

from ifkv.planning.calibration import Rates
from ifkv.planning.plan import Plan

# Passes of measuring that are further apart leave their rates in doubt.
DISAGREEMENT = 1.5
# A ratio that saves so much, in operations, is not slower than plain prefill.
CLEARLY_SOONER = 1.5
# Plain prefill may reach a lower rate than the pieces do, but hardly by more than this.
BEYOND_BOUND = 1.25


def doubt_about(plan: Plan, rates: Rates, layers: int) -> str | None:
    """Why a plan's times may be far off, and what to do; None if nothing is known against them.

    Args:
        plan: The plan.
        rates: What it was made from.
        layers: Layers of the model.
    """
    found = _contradiction(plan, rates, layers)
    if found is None and rates.disagreement > DISAGREEMENT:
        found = (
            f"the passes of measuring it differ by a factor of {rates.disagreement:.1f}, where "
            f"{DISAGREEMENT:g} is the most that is trusted"
        )
    if found is None:
        return None
    return (
        f"this machine was probably busy when it was measured on {rates.date}: {found}. Predicted "
        "times may be far off: give it rest and run ifkv plan with --recalibrate."
    )


def _contradiction(plan: Plan, rates: Rates, layers: int) -> str | None:
    """What counting operations says against a prediction."""
    # A request goes through the layers twice, to score and to recompute, and plain prefill once.
    # What a pass costs whatever its rows, and stitching, is no matter of operations.
    further_pass = layers * rates.layer.at(1)
    # S(r) counts neither plain prefill's prompt nor that a request runs one row in the last layer.
    prompt_too = (1 + plan.prompt / plan.tokens) ** 2
    for each in plan.forecasts:
        allowed = BEYOND_BOUND * each.bound * prompt_too * each.hot
        sooner = plan.prefill * (layers - 1) > allowed * layers
        later = each.select + each.recompute - further_pass > plan.prefill
        if sooner or (later and each.ratio < 1 and each.bound > CLEARLY_SOONER):
            return (
                f"r = {each.ratio:g} is predicted to take {each.hot:.3g} s and plain prefill "
                f"{plan.prefill:.3g} s, where the latter needs about {each.bound:.3g} times the "
                "operations"
            )
    return None
