"""Rows stored in 8 bits: how far they are off, and what they cannot hold."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ifkv.errors import (
    InvalidInputError,
)
from ifkv.store import DiskStore
from ifkv.testing import assert_bit_equal, random_document
from stored_documents import same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("codec", "bound"), [("fp8", 2**-4), ("int8", 1 / 254)])
def test_eight_bit_storage(tmp_path: Path, dtype: torch.dtype, codec: str, bound: float) -> None:
    """fp8 rounds relative to the value, int8 relative to the head's peak."""
    document = random_document(0, dtype=dtype, head_dim=64, length=32)
    with DiskStore(tmp_path, codec=codec) as store:
        key = store.put(document)
        found = store.get(key)
        assert found.keys.dtype == dtype
        size = store.folder.file_of(key).stat().st_size
        assert size < document.nbytes / dtype.itemsize + 3000
        for got, wanted in ((found.keys, document.keys), (found.values, document.values)):
            error = (got.double() - wanted.double()).abs()
            peak = wanted.double().abs().amax(dim=(2, 3), keepdim=True)
            slack = peak * (2**-9 if dtype == torch.bfloat16 else 2**-12)
            tiny = peak / 448 * 2**-9  # the smallest fp8 step
            limit = bound * (peak if codec == "int8" else wanted.double().abs()) + slack + tiny
            assert bool((error <= limit).all())
        lazily = store.get(key, lazy=True)
        assert_bit_equal(lazily.keys, found.keys, what="keys")
    with DiskStore(tmp_path) as exact:  # asked for exact rows: what is there does not count
        assert key not in exact
        exact.put(document)
        same(exact.get(key), document)
    with DiskStore(tmp_path, codec=codec) as store:
        same(store.get(key), document)


def test_eight_bits_cannot_hold_everything(tmp_path: Path) -> None:
    document = random_document(0)
    document.keys[0, 0, 0, 0] = torch.inf
    with pytest.raises(InvalidInputError, match="infinities"):
        DiskStore(tmp_path, codec="int8").put(document)
    with pytest.raises(InvalidInputError, match="choose one of exact, fp8, int8"):
        DiskStore(tmp_path, codec="int4")
    zeros = random_document(1)
    zeros.values.zero_()
    store = DiskStore(tmp_path, codec="int8")
    assert np.all(store.get(store.put(zeros)).values.numpy() == 0)
