"""Measured rates: what lies between points, what is kept, and what a damaged file does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ifkv.cost import ModelShape
from ifkv.errors import CalibrationWarning
from ifkv.planning import Planner, calibration
from ifkv.planning.calibration import Curve, Grid, Rates, kept
from ifkv.planning.calibration.timing import Clock, Probe, grow, run_in_passes, run_in_turns
from ifkv.testing import tiny_model
from rates import ROWS_COST, never_measured

MODEL = tiny_model("llama", dtype=torch.float32, max_position_embeddings=512)


SHAPE = ModelShape.of(MODEL)


CPU = torch.device("cpu")


positive = st.floats(0.01, 100.0)


@given(
    st.dictionaries(st.integers(1, 10**5), positive, min_size=1, max_size=6), st.floats(0.5, 2e5)
)
def test_curves_meet_their_points_and_stay_positive(points, size) -> None:
    sizes = sorted(points)
    curve = Curve(tuple(map(float, sizes)), tuple(points[each] for each in sizes))
    assert [curve.at(each) for each in sizes] == pytest.approx([points[each] for each in sizes])
    assert curve.at(size) > 0
    if size > sizes[-1]:
        assert curve.at(size) >= curve.at(sizes[-1])


@given(st.floats(0.1, 1e5), st.floats(0.001, 10), st.lists(positive, min_size=4, max_size=4))
def test_grids_stay_between_their_rates(row, column, rates) -> None:
    grid = Grid((10.0, 100.0), (0.1, 1.0), ((rates[0], rates[1]), (rates[2], rates[3])))
    assert min(rates) * (1 - 1e-9) <= grid.at(row, column) <= max(rates) * (1 + 1e-9)
    assert grid.at(100, 0.1) == pytest.approx(rates[2])


class Told(Clock):
    """Runs take what they return, longer while a neighbour is busy, on a clock of its own."""

    def __init__(self, busy: tuple[float, float] = (0, 0)):
        super().__init__(CPU)
        self.now, self.busy = 0.0, busy

    def time(self, run):
        took = float(run()) * (30 if self.busy[0] <= self.now < self.busy[1] else 1)
        self.now += took
        return took


def test_probes_grow_until_they_are_too_long_and_no_shorter_than_least() -> None:
    def reached(clock: Clock, **options) -> list[int]:
        sizes = [1, 2, 4, 8, 16]
        return list(grow(sizes, lambda n: [Probe(lambda: n)], clock, limit=4, power=1, **options))

    assert reached(Told()) == [1, 2, 4]
    assert reached(Told(), least=4) == [1, 2, 4, 8]
    # A burst over one of a probe's two runs leaves no size out.
    assert reached(Told(busy=(3, 4))) == [1, 2, 4]


def test_a_pass_gives_short_probes_more_turns() -> None:
    probes = [Probe(lambda: 1), Probe(lambda: 2), Probe(lambda: 50)]
    ran: list[int] = []

    class Noting(Told):
        def time(self, run):
            ran.append(run())
            return super().time(run)

    run_in_turns(probes, Noting(), seconds=12, most=3)
    assert ran == [1, 2, 50, 1, 2, 50, 1, 2]
    assert [probe.passes for probe in probes] == [[1], [2], [50]]


def passes(clock: Told, works: list[float], **options) -> list[Probe]:
    probes = [Probe(lambda work=work: work) for work in works]
    run_in_passes(probes, clock, **{"pass_seconds": 0, "more_seconds": 0, **options})
    return probes


def test_a_burst_of_other_work_hits_no_probe_twice() -> None:
    works = [1, 2, 3, 4]
    for start in range(0, 20):
        for length in (1, 5, 9):
            probes = passes(Told(busy=(start, start + length)), works)
            assert [probe.seconds for probe in probes] == works
            assert {probe.disagreement for probe in probes} <= {1, 30}


def test_two_passes_do_at_rest_and_a_disputed_probe_runs_again() -> None:
    probes = passes(Told(), [1, 2], more_seconds=5)
    assert [probe.passes for probe in probes] == [[1, 1], [2, 2]]
    probes = passes(Told(busy=(0, 100)), [1, 2], more_seconds=5)
    assert [probe.passes for probe in probes] == [[30, 1, 1], [2, 2]]
    assert [probe.disagreement for probe in probes] == [1, 1]
    # No time for more: what is known is kept, and that it is in dispute.
    probes = passes(Told(busy=(0, 100)), [1, 2])
    assert [probe.seconds for probe in probes] == [1, 2]
    assert [probe.disagreement for probe in probes] == [30, 1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3"])
def test_a_machine_is_measured(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, max_position_embeddings=512)
    shape = ModelShape.of(model)
    before = torch.get_rng_state()
    rates = calibration.measure(
        model.config,
        shape,
        dtype=torch.float32,
        device=CPU,
        probe_seconds=0.01,
        pass_seconds=0.0,
        more_seconds=0.0,
        disk=tmp_path,
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
    assert Rates.from_json(json.loads(json.dumps(rates.to_json()))) == rates
    assert rates.disagreement >= 1
    assert rates.warm_bytes
    assert rates.cold_bytes
    plan = Planner(shape, rates).plan(300, documents=3, prompt=9)
    assert 0 < plan.forecasts[0].hot < plan.forecasts[0].warm
    assert plan.prefill > 0


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """How often the machine was to be measured; and the folder is empty."""
    return never_measured(monkeypatch, tmp_path / "cache")


def rates(**options) -> Rates:
    given = {"dtype": torch.float32, "device": CPU, **options}
    return calibration.rates_for(MODEL.config, SHAPE, **given)


def the_file() -> Path:
    (file,) = calibration.calibration_folder().iterdir()
    return file


def test_rates_are_measured_once_and_kept(measured, recwarn) -> None:
    assert rates() == rates() == ROWS_COST
    assert len(measured) == 1
    assert [warning.category for warning in recwarn] == [CalibrationWarning]
    assert rates(again=True) == ROWS_COST
    assert len(measured) == 2
    the_file()


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_other_settings_are_measured_for_themselves(measured, monkeypatch) -> None:
    rates()
    rates(dtype=torch.bfloat16)
    rates(backend="reference")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    rates()
    monkeypatch.setattr(torch, "__version__", "99.0")
    rates()
    assert len(measured) == 5
    assert len(list(calibration.calibration_folder().iterdir())) == 5


def damage(text: str) -> list[str]:
    found = json.loads(text)

    def changed(**values) -> str:
        return json.dumps({**found, "rates": {**found["rates"], **values}})

    layer = found["rates"]["layer"]
    return [
        "",
        text[: len(text) // 2],
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({**found, "about": {**found["about"], "threads": 999}}),
        json.dumps({"about": found["about"]}),
        changed(more=1),
        changed(date=7),
        changed(weight_bytes=0),
        changed(weight_bytes=-1),
        changed(weight_bytes=True),
        changed(weight_bytes="fast"),
        changed(weight_bytes=float("inf")),
        changed(stitch_document=float("nan")),
        changed(warm_bytes=0),
        changed(disagreement=0.5),
        changed(disagreement=None),
        changed(layer=[]),
        changed(layer={**layer, "sizes": layer["sizes"][::-1]}),
        changed(layer={**layer, "seconds": layer["seconds"][:1]}),
        changed(norms={"rows": [1.0], "columns": [1.0], "rates": [[1.0, 2.0]]}),
        changed(norms={"rows": [1.0], "columns": [1.0], "rates": 3}),
    ]


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_damaged_and_foreign_files_are_measured_again_and_say_so(measured) -> None:
    rates()
    sound = the_file().read_text()
    for number, text in enumerate(damage(sound), 2):
        the_file().write_text(text)
        with pytest.warns(CalibrationWarning, match="cannot be used"):
            assert rates() == ROWS_COST
        assert len(measured) == number, text[:80]
        assert the_file().read_text() == sound


def test_bytes_that_are_no_text_are_measured_again(measured) -> None:
    with pytest.warns(CalibrationWarning):
        rates()
    the_file().write_bytes(b"\xff\xfe\x00")
    with pytest.warns(CalibrationWarning, match="cannot be used"):
        rates()


@pytest.mark.filterwarnings("ignore:measuring")
def test_a_folder_that_cannot_be_written_costs_only_the_keeping(
    measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IFKV_CACHE", str(tmp_path / "file"))
    with pytest.warns(CalibrationWarning, match="cannot be written"):
        assert rates() == ROWS_COST
    assert measured == [None]


def test_an_interrupted_write_leaves_what_was_there(measured, monkeypatch) -> None:
    with pytest.warns(CalibrationWarning):
        rates()
    before = the_file().read_text()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(kept.os, "replace", interrupted)
    with pytest.warns(CalibrationWarning), pytest.raises(KeyboardInterrupt):
        rates(again=True)
    assert the_file().read_text() == before


def test_rates_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROWS_COST.date = "2027-01-01"  # type: ignore[misc]
