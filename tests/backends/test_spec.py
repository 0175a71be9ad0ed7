"""How rows attend: one rule for the mask, and a refusal of what a backend has not been taught."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ifkv.backends.reference import ReferenceBackend
from ifkv.backends.spec import AttentionSpec
from ifkv.errors import UnsupportedModelError

POSITIONS = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@given(rows=POSITIONS, keys=POSITIONS, window=st.none() | st.integers(1, 70))
def test_a_row_sees_what_is_not_ahead_of_it_nor_a_window_behind(
    rows: list[int], keys: list[int], window: int | None
) -> None:
    spec = AttentionSpec(1.0, window)
    hidden = spec.hidden(torch.tensor(rows), torch.tensor(keys))
    for i, row in enumerate(rows):
        for j, key in enumerate(keys):
            sees = key <= row and (window is None or row - key < window)
            assert bool(hidden[i, j]) != sees
            assert bool(spec.visible(torch.tensor(row), torch.tensor(key))) == sees


class Untaught(ReferenceBackend):
    name = "untaught"
    features = frozenset()


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"sinks": torch.zeros(4)}])
def test_a_backend_refuses_what_it_has_not_been_taught(extra: dict[str, object]) -> None:
    backend = Untaught()
    backend.check_spec(AttentionSpec(0.5, window=4))
    [name] = extra
    ReferenceBackend().check_spec(AttentionSpec(0.5, **extra))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=f"{name} .*'untaught' cannot do"):
        backend.check_spec(AttentionSpec(0.5, **extra))  # type: ignore[arg-type]


def test_only_the_scaling_follows_the_scale_of_keys() -> None:
    spec = AttentionSpec(0.5, window=4, softcap=9.0)
    assert spec.scaled(1.0) is spec
    scaled = spec.scaled(0.25)
    assert (scaled.scaling, scaled.window, scaled.softcap) == (0.125, 4, 9.0)
