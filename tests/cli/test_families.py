"""``ifkv families``."""

from typer.testing import CliRunner

from ifkv.cli import app
from ifkv.models.families import families, reasons
from ifkv.models.wrappers import wrappers


def test_every_model_type_is_listed_and_every_refusal_has_its_reason() -> None:
    shown = CliRunner().invoke(app, ["families"]).stdout
    assert all(name in shown for family in families().values() for name in family.model_types)
    refused = CliRunner().invoke(app, ["families", "--refused"]).stdout
    assert all(f"{name}, which" in refused for name in reasons())


def test_models_with_a_vision_tower_are_listed_and_described() -> None:
    shown = CliRunner().invoke(app, ["families"]).stdout
    for wrapper in wrappers().values():
        for name in wrapper.model_types:
            assert f"\n{name}: a vision tower beside" in shown
            alone = CliRunner().invoke(app, ["families", name])
            assert alone.exit_code == 0
            assert f"from transformers {wrapper.since} on" in alone.stdout


def test_one_type_is_described_or_refused() -> None:
    assert "Qwen/Qwen3-30B-A3B" in CliRunner().invoke(app, ["families", "qwen3_moe"]).stdout
    assert CliRunner().invoke(app, ["families", "bloom"]).exit_code != 0
