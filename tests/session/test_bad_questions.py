"""A session refuses bad texts, questions, keys and options, and keeps what it has."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def session() -> Iterator[ifkv.Session]:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    ask = ifkv.Session(model, tokenizer, store=MemoryStore())
    ask.add(["The lamp is red.", "The door is green."])
    yield ask
    ifkv.unpatch(ask.model)


SESSION_CASES: dict[str, tuple[str, Callable[[ifkv.Session], Any]]] = {
    "texts as one string": (r"texts is one string.*\[text\]", lambda s: s.add("text")),
    "no texts": (r"texts is None; give a list", lambda s: s.add(None)),
    "half a surrogate pair in a text": (
        r"document 1: .*'\\udc80', half of a surrogate pair.*replace",
        lambda s: s.add(["fine", "caf\udc80"]),
    ),
    "half a surrogate pair in a question": (
        r"'\\ud800', half of a surrogate pair",
        lambda s: s.ask("which \ud800?"),
    ),
    "a blank text": (r"document 1: the text is empty or blank", lambda s: s.add(["fine", " \n"])),
    "ids for text": (r"document 0: .* of type list.*texts", lambda s: s.add([[1, 2]])),
    "a blank question": (r"question is ' '", lambda s: s.ask(" ")),
    "no question": (r"question is None", lambda s: s.ask(None)),
    "ratio": (r"ratio is 1\.5", lambda s: s.ask("which?", ratio=1.5)),
    "ratio as text": (r"ratio is '0\.3', but must be a number", lambda s: s.ask("?", ratio="0.3")),
    "ratio true": (r"ratio is True", lambda s: s.ask("which?", ratio=True)),
    "max_new_tokens": (r"max_new_tokens is 0", lambda s: s.ask("which?", max_new_tokens=0)),
    "an unknown key": (
        r"'[0f]{64}' is not in the store.*add\(\)",
        lambda s: s.ask("?", documents=["0f" * 32]),
    ),
    "no key at all": (r"'lamp' is not in the store", lambda s: s.ask("?", documents=["lamp"])),
    "keys as one string": (r"documents is one string", lambda s: s.ask("?", documents="lamp")),
    "no documents": (r"empty list.*None for all 2", lambda s: s.ask("?", documents=[])),
    "an unknown option": (
        r"tempreature is no option .* did you mean temperature",
        lambda s: s.ask("which?", tempreature=0.5),
    ),
    "layers": (r"layers is \[9\]", lambda s: s.ask("which?", layers=[9])),
    "reserved": (r"past_key_values cannot", lambda s: s.ask("which?", past_key_values=None)),
    "prefix ids": (
        r"prefix holds token id 9999",
        lambda s: ifkv.Session(s.model, s.tokenizer, prefix=[9999]),
    ),
    "a store that is none": (
        r"store is of type dict; give a path, a URL, a store",
        lambda s: ifkv.Session(s.model, s.tokenizer, store={}),
    ),
    "a model with fewer ids than the tokenizer": (
        r"token id \d+.*0 to 96.*another model",
        lambda s: ifkv.Session(tiny_model(num_layers=1), s.tokenizer).add(["text"]),
    ),
}


@pytest.mark.parametrize("name", SESSION_CASES)
def test_a_session_refuses_bad_input(session: ifkv.Session, name: str) -> None:
    message, call = SESSION_CASES[name]
    keys, stored = list(session.keys), len(session.store)
    with pytest.raises(InvalidInputError, match=message):
        call(session)
    assert (session.keys, len(session.store)) == (keys, stored)
    assert len(session.ask("which?", max_new_tokens=1).token_ids) == 1
