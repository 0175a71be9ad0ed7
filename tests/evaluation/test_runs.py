"""Runs: every selector's end points, resumption, and settings that must not be mixed."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ifkv
from ifkv import selectors
from ifkv.cli import app
from ifkv.errors import InvalidInputError
from ifkv.evaluation import Bench, Ledger, Passage, Question, Trial, Way, matrix, run
from ifkv.evaluation import runner as runner_module
from ifkv.evaluation.budgets import parse_budgets
from ifkv.evaluation.decoding import greedy, teacher_forced
from ifkv.evaluation.publishing import publish
from ifkv.evaluation.questions import Dataset
from ifkv.evaluation.results_log import only_run
from ifkv.evaluation.runner import settings_of
from ifkv.evaluation.summary import Summary
from ifkv.testing import tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]


QUESTIONS = [
    Question(name, f"Which is {name}?", (answer,), tuple(Passage(t, "T") for t in TEXTS))
    for name, answer in (("one", "red"), ("two", "green"), ("three", "rain"))
]


DATASET = Dataset("made up", QUESTIONS)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    yield Bench(model, tokenizer, max_new_tokens=5)
    ifkv.unpatch(model)


@pytest.fixture(scope="module")
def trial(bench: Bench) -> Trial:
    return Trial(bench, QUESTIONS[0])


def evaluate(bench: Bench, folder: Path, ways: list[Way], **options: Any) -> Any:
    questions = options.pop("questions", QUESTIONS)
    settings = settings_of(bench, DATASET, seed=0)
    return run(bench, questions, ways, folder, settings=settings, **options)


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("name", selectors.names())
def test_every_selector_ends_at_stitching_and_at_full_prefill(
    trial: Trial, name: str, reorder: bool
) -> None:
    stitched, nothing, everything = trial.measure(
        matrix([name], [0, 1], reorder=reorder)[:1]
        + [Way(selectors.resolve(name), ratio, reorder) for ratio in (0.0, 1.0)]
    )
    assert stitched.kl > 1e-6, "there is a gap to recover"
    assert (nothing.kl, nothing.nll, nothing.answer) == (
        stitched.kl,
        stitched.nll,
        stitched.answer,
    )
    assert nothing.rows == 0
    assert everything.kl < 1e-12
    assert everything.top1 == 1
    assert everything.nll == pytest.approx(trial.reference.nll, abs=1e-10)
    assert everything.answer == trial.reference.answer


def test_ways_are_what_a_session_does(bench: Bench) -> None:
    """Same ids, same slots, same first token's row: through another door."""
    trial = Trial(bench, QUESTIONS[1])
    session = ifkv.Session(bench.model, bench.tokenizer)
    keys = session.add([passage.document for passage in QUESTIONS[1].passages])
    text = f"{QUESTIONS[1].text}\n{bench.short_answer}"
    ready = session.prepare(text, documents=keys, ratio=0.3)
    [result] = trial.measure([Way(selectors.resolve("attention-norm"), 0.3)])
    answer = session.complete(ready, max_new_tokens=5)
    assert result.rows == len(ready.slots)
    assert result.answer == answer.text
    assert trial.reference.context + trial.reference.prompt == len(answer.context_ids) + len(
        ready.prompt_ids
    )


def test_one_ranking_serves_every_ratio(
    bench: Bench, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[str] = []
    real = selectors.CacheBlend.rank

    def counted(self: Any, *args: Any) -> Any:
        ranked.append(str(self))
        return real(self, *args)

    monkeypatch.setattr(selectors.CacheBlend, "rank", counted)
    fresh = Trial(bench, QUESTIONS[0])
    results = list(fresh.measure(matrix(["cacheblend"], [0.1, 0.2, 0.4])))
    assert len(ranked) == 1
    assert [r.rows for r in results] == sorted(r.rows for r in results)
    assert results[1].flops - results[1].selecting_flops < results[3].flops


@pytest.mark.parametrize("draft", [True, False])
def test_a_draft_changes_nothing_about_an_answer(bench: Bench, draft: bool) -> None:
    model: Any = bench.model
    prompt = bench.prompt(QUESTIONS[0])
    cache = ifkv.stitch(bench.model, bench.documents(QUESTIONS[0]))
    first = ifkv.recompute(bench.model, cache, [], prompt_ids=prompt)
    assert first is not None
    before = cache.get_seq_length()
    plain, logits = greedy(model, cache, first, max_new_tokens=6)
    assert cache.get_seq_length() == before
    assert torch.equal(plain, logits.argmax(dim=-1))
    for agreed in range(6):
        proposed = plain.clone()
        if agreed < 5:
            proposed[agreed] = (proposed[agreed] + 1) % 50
        told = teacher_forced(model, cache, first, proposed)
        again, _ = greedy(model, cache, first, max_new_tokens=6, draft=proposed, draft_logits=told)
        assert again.tolist() == plain.tolist()
        assert cache.get_seq_length() == before
    stop = int(plain[2])
    stopped, _ = greedy(model, cache, first, max_new_tokens=6, stop=[stop])
    assert stopped.tolist() == plain.tolist()[: plain.tolist().index(stop) + 1]


def test_an_interrupted_run_goes_on_to_the_same_files(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = matrix(["epic", "random"], [0.1, 0.3])
    whole = evaluate(bench, tmp_path / "whole", ways)
    publish(whole.ledger)

    class Interrupted(Trial):
        def measure(self, *args: Any, **options: Any) -> Any:
            if self._question.id == "two":
                raise KeyboardInterrupt
            yield from super().measure(*args, **options)

    monkeypatch.setattr(runner_module, "Trial", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(bench, tmp_path / "parts", ways)
    monkeypatch.undo()
    results = tmp_path / "parts" / "results.jsonl"
    assert len(results.read_text().splitlines()) == 1
    with results.open("ab") as file:  # and the power went while a line was written
        file.write(b'{"question": "two", "full": {"cont')
    again = evaluate(bench, tmp_path / "parts", ways)
    assert len(again.seconds) == 2
    _, written = publish(again.ledger)
    names = ["settings.json", "results.jsonl", *(path.name for path in written)]
    assert "summary.html" in names
    for name in names:
        one, two = ((tmp_path / part / name).read_bytes() for part in ("whole", "parts"))
        assert one == two, name
    assert evaluate(bench, tmp_path / "parts", ways).seconds == []


def test_selectors_and_answers_are_added_to_what_is_there(bench: Bench, tmp_path: Path) -> None:
    evaluate(bench, tmp_path, matrix(["epic"], [0.1]), answers=False)
    assert Summary(Ledger(tmp_path)).rows[-1].f1 is None
    evaluate(bench, tmp_path, matrix(["epic", "random"], [0.1]), answers=False)
    assert Summary(Ledger(tmp_path)).ways == ["epic", "random"]
    done = evaluate(bench, tmp_path, matrix(["epic"], [0.1]), answers=True)
    assert len(done.seconds) == 3
    rows = {row.way: row for row in Summary(Ledger(tmp_path)).rows}
    assert rows["epic"].f1 is not None
    assert rows["random"].f1 is None


def test_other_settings_are_refused(bench: Bench, tmp_path: Path) -> None:
    ways = matrix(["epic"], [0.1])
    evaluate(bench, tmp_path, ways, questions=QUESTIONS[:1])
    settings = settings_of(bench, DATASET, seed=1)
    with pytest.raises(InvalidInputError, match="seed: 0 there, 1 now"):
        run(bench, QUESTIONS, ways, tmp_path, settings=settings)


def test_one_run_writes_into_a_folder_at_a_time(bench: Bench, tmp_path: Path) -> None:
    ways = matrix(["epic"], [0.1])
    evaluate(bench, tmp_path, ways, questions=QUESTIONS[:1])
    with only_run(tmp_path), pytest.raises(InvalidInputError, match="another evaluation is writ"):
        evaluate(bench, tmp_path, ways)
    assert len(evaluate(bench, tmp_path, ways).seconds) == 2


def test_reading_does_not_touch_the_line_that_a_run_is_writing(
    bench: Bench, tmp_path: Path
) -> None:
    evaluate(bench, tmp_path, matrix(["epic"], [0.1]), questions=QUESTIONS[:1])
    results = tmp_path / "results.jsonl"
    with results.open("ab") as file:
        file.write(b'{"question": "two", "full": {"cont')
    before = results.read_bytes()
    assert Summary(Ledger(tmp_path)).count == 1
    assert results.read_bytes() == before


def test_a_question_that_fails_is_named_and_the_others_go_on(bench: Bench, tmp_path: Path) -> None:
    long = Question("long", "?", ("a",), tuple(Passage("word " * 400) for _ in range(2)))
    ways = matrix(["epic"], [0.1])
    done = evaluate(bench, tmp_path, ways, questions=[long, *QUESTIONS])
    assert list(done.failures) == ["long"]
    assert len(done.seconds) == 3
    with pytest.raises(InvalidInputError, match="'long'"):
        evaluate(bench, tmp_path / "other", ways, questions=[long])
    single = Question("single", "?", ("a",), (Passage("Alone."),))
    with pytest.raises(InvalidInputError, match="nothing to recompute"):
        Trial(bench, single)


def test_a_summary_has_full_prefill_at_one_and_stitching_at_zero(
    bench: Bench, tmp_path: Path
) -> None:
    done = evaluate(bench, tmp_path, matrix(["epic", "random"], [0.1, 1]))
    summary, written = publish(done.ledger)
    full, stitched, *rest = summary.rows
    assert (full.gap.value, stitched.gap.value) == (1, 0)
    assert all(row.gap.value == pytest.approx(1) for row in rest if row.ratio == 1)
    assert all(stitched.flops < row.flops for row in rest)
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows][:2] == ["full prefill", "stitch only"]
    assert float(rows[2]["gap_low"]) <= float(rows[2]["gap"]) <= float(rows[2]["gap_high"])
    pairs = {(one.first, one.second): one.gap.value for one in summary.differences()}
    assert pairs["epic", "random"] == pytest.approx(-pairs["random", "epic"])
    factors = {(one.first, one.second): one.kl_ratio.value for one in summary.differences()}
    assert factors["epic", "random"] == pytest.approx(1 / factors["random", "epic"])
    assert all(path.is_file() for path in written)


def test_an_empty_or_broken_folder_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no evaluation"):
        Ledger(tmp_path)
    ledger = Ledger(tmp_path, settings_of(bench, DATASET))
    with pytest.raises(InvalidInputError, match="no finished question"):
        Summary(ledger)
    (tmp_path / "results.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(InvalidInputError, match="line 1 is no result"):
        Ledger(tmp_path)


def test_other_budgets_run_resume_and_are_summarised_apart(bench: Bench, tmp_path: Path) -> None:
    text = ".2+sentences,.2+window=3,number=4,mass=.5+cap=.4,.1"
    ways = matrix(["attention-norm"], [0.2], budgets=parse_budgets(text))
    keys = [way.key for way in ways]
    assert keys == [
        "stitch only @0",
        "attention-norm @0.1",
        "attention-norm @0.2",
        "attention-norm @0.2+sentences",
        "attention-norm @0.2+window=3",
        "attention-norm @number=4",
        "attention-norm @mass=0.5+cap=0.4",
    ]
    done = evaluate(bench, tmp_path, ways)
    assert evaluate(bench, tmp_path, ways).seconds == [], "all are found again"
    results = done.ledger.results["one"]
    assert list(results) == keys
    assert results["attention-norm @number=4"]["rows"] == 4
    assert results["attention-norm @0.2+window=3"]["rows"] == results["attention-norm @0.2"]["rows"]
    assert "budget" not in results["attention-norm @0.2"], "as earlier versions wrote it"
    summary, _ = publish(Ledger(tmp_path))
    assert summary.ways == [
        "attention-norm",
        "attention-norm (sentences)",
        "attention-norm (window=3)",
        "attention-norm (number)",
        "attention-norm (mass+cap=0.4)",
    ]
    assert [row.ratio for row in summary.rows[2:]] == [0.1, 0.2, 0.2, 0.2, None, None]
    equal = {(one.first, one.second) for one in summary.differences()}
    assert ("attention-norm", "attention-norm (sentences)") in equal
    assert not any("number" in name or "mass" in name for pair in equal for name in pair)
    assert "number=4" in (tmp_path / "summary.md").read_text()


def test_a_budget_of_a_run_is_what_a_session_recomputes(bench: Bench) -> None:
    question = QUESTIONS[0]
    session = ifkv.Session(bench.model, bench.tokenizer)
    documents = session.add([passage.document for passage in question.passages])
    trial = Trial(bench, question)
    for budget in parse_budgets("number=5,mass=.6,.3+sentences"):
        way = Way(selectors.resolve("attention-norm:query=prompt"), other=budget)
        [result] = trial.measure([way])
        ready = session.prepare(
            f"{question.text}\n{bench.short_answer}",
            documents=documents,
            ratio=budget,
            selector="attention-norm:query=prompt",
        )
        assert result.rows == len(ready.slots) > 0
        assert result.answer == session.complete(ready, max_new_tokens=5).text


def test_the_command_runs_resumes_and_summarises(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    context = "Passage 1:\nThe lamp is red.\nPassage 2:\nThe door is green."
    lines = [
        {"_id": f"q{n}", "input": f"Question {n}?", "context": context, "answers": ["red"]}
        for n in range(2)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    command = ["eval", "--model", str(tmp_path / "model"), "--data", str(data), "--out", str(out)]
    command += ["--selectors", "epic,random:seed=1", "--ratios", ".2", "--max-new-tokens", "3"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "random:seed=1" in (out / "summary.md").read_text()
    results = (out / "results.jsonl").read_bytes()
    (out / "summary.md").unlink()
    again = CliRunner().invoke(app, ["eval", "--summarize-only", "--out", str(out)])
    assert again.exit_code == 0, again.output
    assert (out / "summary.md").is_file()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (out / "results.jsonl").read_bytes() == results
    with only_run(out):
        second = CliRunner().invoke(app, [*command, "--model", str(tmp_path)])  # not looked at yet
    assert "another evaluation is writing" in str(second.exception)
    mixed = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert isinstance(mixed.exception, InvalidInputError)
