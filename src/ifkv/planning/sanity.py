"""Detect calibration rates that were measured while the machine was busy.

Other work on the same cores makes some rates too low and others not. Three signs show it: passes of
measuring that disagree; predicted times above full prefill's where the operations are far fewer;
predicted times far below what the count of operations allows.
"""

from __future__ import annotations

from ifkv.planning.calibration import Rates
from ifkv.planning.plan import Plan

# Rates are in doubt if two passes of measuring differ by more than this factor.
DISAGREEMENT = 1.5
# A ratio with this bound S(r) or more cannot be slower than full prefill.
CLEARLY_FASTER = 1.5
# Full prefill may reach a lower rate than the measured pieces, but hardly by more than this factor.
BEYOND_BOUND = 1.25


def doubt_about(plan: Plan, rates: Rates, layers: int) -> str | None:
    """Return why a plan's times may be far off, and what to do; None if the rates look sound.

    Args:
        plan: The plan.
        rates: Rates it was made from.
        layers: Number of layers of the model.
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
        "times may be far off: stop other work and run ifkv plan with --recalibrate."
    )


def _contradiction(plan: Plan, rates: Rates, layers: int) -> str | None:
    """Return how a prediction contradicts the count of operations; None if it does not."""
    # A request goes through the layers twice, to score and to recompute, and full prefill once. The
    # fixed cost of a pass, and stitching, are not operations, so they are left out.
    further_pass = layers * rates.layer.at(1)
    # S(r) leaves out the prompt of full prefill, and that a request runs one row in the last layer.
    prompt_too = (1 + plan.prompt / plan.tokens) ** 2
    for each in plan.forecasts:
        allowed = BEYOND_BOUND * each.bound * prompt_too * each.hot
        faster = plan.prefill * (layers - 1) > allowed * layers
        slower = each.select + each.recompute - further_pass > plan.prefill
        if faster or (slower and each.ratio < 1 and each.bound > CLEARLY_FASTER):
            return (
                f"r = {each.ratio:g} is predicted to take {each.hot:.3g} s and full prefill "
                f"{plan.prefill:.3g} s, where the latter needs about {each.bound:.3g} times the "
                "operations"
            )
    return None
