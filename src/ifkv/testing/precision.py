"""Assertions on tensors that say what differed, where, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Tolerance between two correct computations; half precision has only `assert_within_floor`."""

# Names of the axes by number of dimensions: scores [T]; logits [R, V]; one layer's keys or values
# [H_kv, N, D]; all layers' [L, H_kv, N, D].
_AXES: dict[int, tuple[str, ...]] = {
    1: ("slot",),
    2: ("row", "token"),
    3: ("head", "slot", "channel"),
    4: ("layer", "head", "slot", "channel"),
}


def _where(index: Sequence[int], axes: Sequence[str] | None) -> str:
    """Spell out an index: `layer 1, head 0, slot 17, channel 3`."""
    names = axes if axes is not None else _AXES.get(len(index), ())
    if len(names) != len(index):
        names = [f"axis {axis}" for axis in range(len(index))]
    return ", ".join(f"{name} {i}" for name, i in zip(names, index, strict=True)) or "the scalar"


def _summary(wrong: Tensor, axes: Sequence[str] | None) -> str:
    """List for each axis which of its indices hold a wrong element (at most eight of them)."""
    names = axes if axes is not None else _AXES.get(wrong.ndim, ())
    parts = []
    for axis, indices in enumerate(wrong.nonzero().T):
        hit = indices.unique().tolist()
        name = names[axis] if len(names) == wrong.ndim else f"axis {axis}"
        shown = ", ".join(map(str, hit[:8])) + (", ..." if len(hit) > 8 else "")
        parts.append(f"{name} {shown} ({len(hit)} of {wrong.shape[axis]})")
    return "; ".join(parts)


def _check_shape(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )


def _fail(
    what: str,
    problem: str,
    actual: Tensor,
    expected: Tensor,
    wrong: Tensor,
    axes: Sequence[str] | None,
) -> None:
    """Raise for the wrong elements, leading with the worst one (a NaN before anything else)."""
    error = (actual - expected).abs()
    ranked = torch.where(wrong, error.nan_to_num(nan=float("inf"), posinf=float("inf")), -1.0)
    worst = [int(i) for i in torch.unravel_index(ranked.argmax(), error.shape)]
    raise AssertionError(
        f"{what}: {problem} in {int(wrong.sum())} of {wrong.numel()} elements\n"
        f"  worst at {_where(worst, axes)}: {actual[tuple(worst)].item()!r}, "
        f"expected {expected[tuple(worst)].item()!r}, off by {error[tuple(worst)].item():.3e}\n"
        f"  wrong at {_summary(wrong, axes)}"
    )


def assert_bit_equal(
    actual: Tensor, expected: Tensor, *, what: str, axes: Sequence[str] | None = None
) -> None:
    """Assert same shape, same dtype and the same number in every element.

    Args:
        actual: The tensor that was computed.
        expected: The tensor it must equal.
        what: Name of the tensor for the message, such as "keys after stitching".
        axes: Names of its axes for the message; guessed from the number of dimensions if None.

    Raises:
        AssertionError: They differ; the message names the axes, the worst element and its index.
    """
    _check_shape(actual, expected, what)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: dtype is {actual.dtype}, expected {expected.dtype}")
    wrong = actual != expected
    if wrong.any():
        _fail(what, "not bit-equal", actual.double(), expected.double(), wrong, axes)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    what: str,
    tolerance: float | None = None,
    axes: Sequence[str] | None = None,
) -> None:
    """Assert `|actual - expected| <= tolerance · (1 + |expected|)` in every element.

    Dtypes may differ; NaN and infinity are never close to anything.

    Args:
        actual: The tensor that was computed.
        expected: The tensor it must equal, up to rounding.
        what: Name of the tensor for the message, such as "values after recompute".
        tolerance: None means that of `TOLERANCES` for the dtype of `actual`.
        axes: Names of its axes for the message; guessed from the number of dimensions if None.

    Raises:
        AssertionError: They differ; the message names the axes, the worst element and its index.
        ValueError: No tolerance was given, and the dtype has no default.
    """
    if tolerance is None:
        if actual.dtype not in TOLERANCES:
            raise ValueError(
                f"{what} is {actual.dtype}, which has no fixed tolerance; pass one, or compare "
                "with assert_within_floor"
            )
        tolerance = TOLERANCES[actual.dtype]
    _check_shape(actual, expected, what)
    got, want = actual.double(), expected.double()
    wrong = ~((got - want).abs() <= tolerance * (1 + want.abs()))  # negated, so that NaN is wrong
    if wrong.any():
        _fail(what, f"not within {tolerance:.1e}", got, want, wrong, axes)


def assert_within_floor(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    what: str,
    factor: float = 2.0,
    measure: Literal["max", "rms"] = "max",
    axes: Sequence[str] | None = None,
) -> None:
    """Assert that `actual` is at most `factor` times as far from the truth as `plain` is.

    This is the rule for half precision, from flash-attention's tests: the error of plain full
    prefill in a dtype is the floor that nothing can be asked to beat. Rounding the truth itself to
    the dtype is always accepted.

    Args:
        actual: Result of the library.
        plain: Result of the plain implementation in the same dtype.
        truth: Result in float32 or float64, for instance from `models.truth_model`.
        what: Name of the tensor for the message.
        factor: Multiple of the plain error that is allowed.
        measure: "max" compares largest errors, "rms" root mean squares (steadier on few elements).
        axes: Names of its axes for the message; guessed from the number of dimensions if None.

    Raises:
        AssertionError: The error is larger, or not finite; the message gives both errors.
        ValueError: `actual` and `plain` differ in dtype, so the comparison would say nothing.
    """
    if actual.dtype != plain.dtype:
        raise ValueError(f"{what}: actual is {actual.dtype} but plain is {plain.dtype}")
    _check_shape(actual, truth, what)
    _check_shape(plain, truth, f"{what} (plain)")
    want = truth.double()

    def size(error: Tensor) -> float:
        return float(error.abs().max() if measure == "max" else error.square().mean().sqrt())

    rounding = want.to(actual.dtype).double() - want
    floor = size(plain.double() - want)
    allowed = max(factor * floor, size(rounding))
    error = size(actual.double() - want)
    if not error <= allowed:  # negated, so that NaN fails
        wrong = ~((actual.double() - want).abs() <= allowed)
        problem = (
            f"{measure} error {error:.3e} is over {allowed:.3e} (plain error {floor:.3e}, allowed "
            f"{factor:g} times); beyond that"
        )
        if not wrong.any():  # an rms error can be too large without any single element being so
            wrong = torch.ones_like(wrong)
        _fail(what, problem, actual.double(), want, wrong, axes)
