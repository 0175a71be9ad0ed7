"""Documents that a store lacks are made, once, behind the prefix as it was computed."""

from pathlib import Path

import ifkv
from ifkv.store import DiskStore, MemoryStore, encode_documents
from ifkv.testing import assert_close, tiny_model


class Counting(MemoryStore):
    """Store that counts how often it is asked whether it has a document."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)


def test_each_document_is_looked_for_once() -> None:
    """A store may be far away, and each look a request."""
    model, store = tiny_model("llama"), Counting()
    with ifkv.patch(model):
        for made in (2, 0):
            store.looks = 0
            found = encode_documents(model, store, [[5, 6, 7], [8, 9]], prefix=[1, 2])
            assert (found.made, store.looks) == (made, 2)


def test_a_rounded_prefix_is_read_and_never_computed_with(tmp_path: Path) -> None:
    """Documents added later are those added at once, whatever the store's codec did."""
    model = tiny_model("llama")
    with ifkv.patch(model):
        exact = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1, 2])
        store = DiskStore(tmp_path / "fp8", codec="fp8")
        made: list[ifkv.DocumentCache] = []
        put = store.put
        store.put = (  # type: ignore
            lambda document, **how: made.append(document) or put(document, **how)
        )
        for ids in ([5, 6, 7], [8, 9]):
            encode_documents(model, store, [ids], prefix=[1, 2])
        for one, other in zip(made, exact, strict=True):
            assert_close(one.values, other.values, what="values", tolerance=1e-12)
