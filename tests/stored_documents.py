"""Documents for the tests of stores, and when two are the same."""

import dataclasses

import torch

import ifkv
from ifkv.testing import assert_bit_equal, random_document

PREFIX = random_document(1000, length=3)
DOCUMENT = random_document(0, prefix=PREFIX, sensitivity=True)
SURROGATE = ifkv.SurrogateContext((torch.tensor([4, 5]), torch.tensor([6])))
OTHER_SURROGATE = ifkv.SurrogateContext((torch.tensor([4, 5]),))
# The same tokens as DOCUMENT's, with other rows.
BEHIND = random_document(0, prefix=PREFIX, sensitivity=True, surrogate=SURROGATE).rebuilt(
    keys=-DOCUMENT.keys
)


def same(found: ifkv.DocumentCache, wanted: ifkv.DocumentCache) -> None:
    """Equal in every field, bit for bit, and of the same prefix."""
    compared = {"token_ids", "prefix_ids", "keys", "values", "fingerprint", "sensitivity", "prefix"}
    assert {field.name for field in dataclasses.fields(ifkv.DocumentCache)} == compared | {
        "surrogate",
        "extent",
        "images",
    }
    assert found.images is None  # stores refuse pictures
    assert wanted.images is None
    assert (found.surrogate is None) == (wanted.surrogate is None)
    if found.surrogate is not None and wanted.surrogate is not None:
        assert found.surrogate.identity == wanted.surrogate.identity
    assert found.positions_taken == wanted.positions_taken
    assert_bit_equal(found.token_ids, wanted.token_ids, what="tokens")
    assert_bit_equal(found.prefix_ids, wanted.prefix_ids, what="prefix")
    assert_bit_equal(found.keys, wanted.keys, what="keys")
    assert_bit_equal(found.values, wanted.values, what="values")
    assert found.fingerprint == wanted.fingerprint
    assert (found.sensitivity is None) == (wanted.sensitivity is None)
    if found.sensitivity is not None and wanted.sensitivity is not None:
        assert_bit_equal(found.sensitivity, wanted.sensitivity, what="sensitivity")
    assert (found.prefix is None) == (wanted.prefix is None)
    if found.prefix is not None and wanted.prefix is not None:
        same(found.prefix, wanted.prefix)
