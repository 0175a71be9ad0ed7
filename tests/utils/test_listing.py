"""What can be looped over and is no list of texts, of questions, of keys or of token ids."""

from __future__ import annotations

import io
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ifkv
from ifkv.documents.sensitivity import with_sensitivities
from ifkv.errors import InvalidInputError, StoreFullError
from ifkv.store import MemoryStore, encode_documents
from ifkv.testing import tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green."]


class Frame:
    """As a table of pandas is: two dimensions, and a loop goes over the columns' names."""

    ndim = 2

    def __iter__(self) -> Iterator[str]:
        return iter(["title", "text"])

    def keys(self) -> list[str]:
        return ["title", "text"]


class Column:
    """As one column of it is: it has keys, too, but a loop goes over its texts."""

    ndim = 1

    def __iter__(self) -> Iterator[str]:
        return iter(TEXTS)

    def keys(self) -> list[int]:
        return [0, 1]


NO_LISTS: dict[str, tuple[Any, str]] = {
    "mapping": ({"a.md": TEXTS[0]}, r"of type dict, of which only the names.*\.values\(\)"),
    "mapping of a library": (UserDict(a=TEXTS[0]), "of type UserDict, of which only the names"),
    "set": (set(TEXTS), "of type set, which has no order.*sorted"),
    "frozenset": (frozenset(TEXTS), "of type frozenset, which has no order"),
    "table": (Frame(), "of type Frame, with 2 dimensions.*one column"),
    "array of rows": (np.array([TEXTS]), "of type ndarray, with 2 dimensions"),
    "bytes": (b"The lamp is red.", "of type bytes, which holds numbers"),
    "file": (io.StringIO("\n".join(TEXTS)), "an open file.*each line"),
    "text": (TEXTS[0], "is one string"),
    "number": (3, "is 3; give"),
}


@pytest.fixture(scope="module")
def session() -> Iterator[ifkv.Session]:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), dtype=torch.float32)
    made = ifkv.Session(model, tokenizer, store=MemoryStore())
    made.add(TEXTS)
    yield made
    ifkv.unpatch(model)


@pytest.mark.parametrize("name", NO_LISTS)
def test_what_is_no_list_is_refused_wherever_one_is_wanted(
    session: ifkv.Session, name: str
) -> None:
    value, message = NO_LISTS[name]
    for what, call in (
        ("texts", lambda: session.add(value)),
        ("questions", lambda: session.ask_many(value)),
        ("documents", lambda: session.ask("Which?", documents=value)),
        ("documents", lambda: session.ask_many(["Which?"], documents=value)),
    ):
        if isinstance(value, io.IOBase):
            value.seek(0)
        with pytest.raises(InvalidInputError, match=rf"{what}.*{message}"):
            call()
    assert len(session.keys) == 2
    assert session.prefilled == 2


def test_whatever_has_texts_in_an_order_is_a_list(session: ifkv.Session) -> None:
    keys = session.keys
    for texts in (
        tuple(TEXTS),
        iter(TEXTS),
        (text for text in TEXTS),
        dict(enumerate(TEXTS)).values(),
        np.array(TEXTS),
        Column(),
    ):
        assert session.add(texts) == keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"bytes", "of type bytes, not str.*decode"),
        (float("nan"), "of type float, not str"),
        (None, "of type NoneType, not str"),
        (" ", "empty or blank"),
        ("caf\udc80", "half of a surrogate pair"),
        ("Rain. " * 200, "with its prefix"),
    ],
)
def test_a_bad_text_is_named_by_its_place(
    session: ifkv.Session, text: object, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=rf"document 2\b.*{message}"):
        session.add([*TEXTS, text, *TEXTS])


def test_a_text_that_is_cut_keeps_its_place_in_the_list(session: ifkv.Session) -> None:
    with pytest.raises(InvalidInputError, match=r"document 1, piece 1 \(\d+ tokens\) with its"):
        session.add(["Rain. " * 60, "Rain. " * 230], split=600)


PADDED = [[5, 6, 7, 1, 1], [8, 9, 10, 11, 12], [13, 14, 15, 16, 1]]
MASK = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
PLAIN = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16]]


@pytest.fixture(scope="module")
def padding() -> Iterator[Any]:
    """A model that ends texts with the token 1."""
    model = tiny_model(dtype=torch.float32, eos_token_id=1)
    with ifkv.patch(model):
        yield model


def flipped(rows: list[list[int]]) -> list[list[int]]:
    return [row[::-1] for row in rows]


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_text(padding: Any, left: bool) -> None:
    rows, mask, plain = (flipped(each) if left else each for each in (PADDED, MASK, PLAIN))
    wanted = ifkv.prefill_documents(padding, plain)
    for documents, given in (
        (torch.tensor(rows), torch.tensor(mask)),
        (np.array(rows), np.array(mask)),
        (rows, mask),
        ({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}, None),
        (UserDict(input_ids=rows, attention_mask=mask), None),
    ):
        made = ifkv.prefill_documents(padding, documents, attention_mask=given)
        for one, other in zip(made, wanted, strict=True):
            assert torch.equal(one.token_ids, other.token_ids)
            assert torch.equal(one.keys, other.keys)
        store = MemoryStore()
        keys = encode_documents(padding, store, documents, attention_mask=given).keys
        assert [store.get(key).token_ids.tolist() for key in keys] == plain


def test_a_tokenizers_padded_output_is_taken_with_its_mask(session: ifkv.Session) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    plain = [tokenizer(text)["input_ids"] for text in TEXTS]
    padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    made = ifkv.prefill_documents(session.model, padded)
    assert [one.token_ids.tolist() for one in made] == plain


@pytest.mark.parametrize(
    ("documents", "mask", "message"),
    [
        (torch.tensor(PADDED), None, r"shape \(3, 5\).*attention_mask"),
        (np.array(PLAIN[1:2] * 2), None, r"shape \(2, 5\).*attention_mask"),
        (PADDED, None, "document 0 ends with 2 times the id 1.*attention_mask"),
        (flipped(PADDED), None, "document 0 begins with 2 times the id 1"),
        ({"input_ids": PADDED}, None, "document 0 ends with 2 times the id 1"),
        ({"input_ids": [5, 6, 7]}, None, "returned for one text"),
        ([{"input_ids": [5, 6, 7]}], None, r"document 0 is of type dict.*\['input_ids'\]"),
        ({"ids": PLAIN}, None, "of type dict, of which only the names"),
        ([[5], b"abc"], None, "document 1 is of type bytes"),
        ([[5], {6, 7}], None, "document 1 is of type set"),
        (PADDED, MASK[:2], "attention_mask has 2 rows for 3 documents"),
        (PADDED, [MASK[0], MASK[1], [1, 1]], r"document 2 has the shape \(5,\)"),
        (PADDED, [MASK[0], MASK[1], [1, 0, 1, 1, 0]], "document 2 has a gap"),
        (PADDED, [MASK[0], MASK[1], [0] * 5], "document 2 is empty"),
        (PADDED, [MASK[0], [2] * 5, MASK[2]], "document 1 holds other numbers"),
    ],
)
def test_padding_that_nothing_tells_from_text_is_refused(
    padding: Any, documents: Any, mask: Any, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ifkv.prefill_documents(padding, documents, attention_mask=mask)
    with pytest.raises(InvalidInputError, match=message):
        encode_documents(padding, MemoryStore(), documents, attention_mask=mask)


def test_what_only_a_batch_has_in_common_is_no_padding(padding: Any) -> None:
    documents = [[5, 6, 1], [7, 8, 9], [10, 11, 12, 13]]  # of one length are the first two
    store = MemoryStore()
    encode_documents(padding, store, documents, batch_tokens=6)
    documents = [[5, 6, 1], [7, 8, 9]]
    made = ifkv.prefill_documents(padding, documents, attention_mask=[[1] * 3] * 2)
    assert [len(one) for one in with_sensitivities(padding, made)] == [3, 3]


def test_a_full_store_says_at_which_document(session: ifkv.Session) -> None:
    with pytest.raises(StoreFullError, match=r"^document 0: a document of"):
        encode_documents(session.model, MemoryStore(10), [[5, 6], [7]])
    named = ["lamp.txt", "door.txt"]
    with pytest.raises(StoreFullError, match=r"^lamp\.txt: a document of"):
        encode_documents(session.model, MemoryStore(10), [[5, 6], [7]], names=named)
    with pytest.raises(InvalidInputError, match=r"^door\.txt holds token id"):
        encode_documents(session.model, MemoryStore(), [[5, 6], [10**6]], names=named)
    small = ifkv.Session(session.model, session.tokenizer, store=MemoryStore(60_000))
    with pytest.raises(StoreFullError, match=r"^document 1, piece \d: a document of"):
        small.add(["Rain.", "The lamp is red. " * 20], split=200)


def test_documents_of_one_length_that_all_end_alike_are_text(padding: Any) -> None:
    documents = [[5, 6, 1], [7, 8, 1]]
    made = ifkv.prefill_documents(padding, documents)
    assert [one.token_ids.tolist() for one in made] == documents
