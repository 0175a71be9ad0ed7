"""Encodings that an evaluation compares: documents alone, or behind a surrogate context."""

from pathlib import Path

import pytest
import torch

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.evaluation import Bench, Passage, Question, Trial, Way, matrix
from ifkv.evaluation.encodings import Encoding, encodings_of
from ifkv.testing import tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = Question("one", "Which is one?", ("red",), tuple(Passage(t, "T") for t in TEXTS))
ONE = Encoding("one", ("A bridge of stone.",))
TWO = Encoding("two", ("A bridge of stone.", "A song and a river."))


@pytest.fixture(scope="module")
def trial() -> Trial:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    return Trial(Bench(model, tokenizer, max_new_tokens=5), QUESTION)


def files(folder: Path, **texts: str) -> list[str]:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return [str(folder / f"{name}.txt") for name in texts]


def test_a_name_says_which_texts_they_are(tmp_path: Path) -> None:
    one, two = files(tmp_path, notes="Some notes.", song="A song.")
    plain, alone, mean = encodings_of(["none", one, f"{one}+{two}"])
    assert plain is None
    assert alone is not None
    assert alone.texts == ("Some notes.",)
    assert mean is not None
    assert mean.texts == ("Some notes.", "A song.")
    assert mean.name.startswith("notes+song-")
    files(tmp_path, notes="Other notes.")
    (other,) = encodings_of([one])
    assert other is not None
    assert other.name != alone.name


def test_the_text_that_is_shipped_has_a_name(tmp_path: Path) -> None:
    (note,) = files(tmp_path, note="A note.")
    own, mean = encodings_of(["default", f"default+{note}"])
    assert own is not None
    assert mean is not None
    assert own.texts == (ifkv.SURROGATE_TEXT,)
    assert mean.texts == (ifkv.SURROGATE_TEXT, "A note.")
    assert own.name.startswith("default-")


def test_bad_surrogates_are_refused(tmp_path: Path) -> None:
    empty, good = files(tmp_path, empty=" \n", good="Text.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for bad, reason in (
        ([str(tmp_path / "missing.txt")], "cannot be read"),
        ([str(tmp_path / "bytes.txt")], "not UTF-8"),
        ([empty], "has no text"),
        ([good, good], "given twice"),
        ([f"{good}+"], "cannot be read"),
    ):
        with pytest.raises(InvalidInputError, match=reason):
            encodings_of(bad)


def test_a_matrix_has_every_selector_behind_every_surrogate() -> None:
    keys = [way.key for way in matrix(["epic"], [0.1], encodings=[None, ONE])]
    assert keys == [
        "stitch only @0",
        "epic @0.1",
        "stitch only behind one @0",
        "epic behind one @0.1",
    ]
    assert [way.key for way in matrix(["epic"], [0.1], encodings=[ONE])] == [
        "stitch only @0",
        "stitch only behind one @0",
        "epic behind one @0.1",
    ]


@pytest.mark.parametrize("encoding", [ONE, TWO], ids=str)
@pytest.mark.parametrize("name", ["sink-aware", "epic", "cacheblend", "sensitivity-aware"])
def test_behind_a_surrogate_everything_is_still_full_prefill(
    trial: Trial, name: str, encoding: Encoding
) -> None:
    plain, stitched, everything = trial.measure(
        [
            Way(),
            Way(encoding=encoding),
            Way(ifkv.selectors.resolve(name), 1.0, encoding=encoding),
        ],
        answers=False,
    )
    assert stitched.kl > 1e-6
    assert stitched.kl != plain.kl
    assert everything.kl < 1e-6
    assert everything.top1 == 1
    # The first document was not alone, either, so it is recomputed with the others.
    assert everything.rows == sum(len(part) for part in trial._parts)


def test_documents_of_a_trial_are_those_of_the_library(trial: Trial) -> None:
    bench = trial._bench
    behind = bench.documents(QUESTION, TWO)
    wanted = ifkv.prefill_documents(
        bench.model,
        bench.parts(QUESTION),
        attention_mask=[[1] * len(part) for part in bench.parts(QUESTION)],
        prefix=bench.format.prefix_ids(),
        surrogate=[bench.format.document_ids(text) for text in TWO.texts],
    )
    for mine, its in zip(behind, wanted, strict=True):
        assert torch.equal(mine.keys, its.keys)
        assert torch.equal(mine.values, its.values)
        assert mine.surrogate is not None
        assert its.surrogate is not None
        assert mine.surrogate.identity == its.surrogate.identity
