"""Family files: what they say is true of upstream, and what is wrong with one is said."""

import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ifkv.errors import UnsupportedModelError
from ifkv.models.families import Family, families, parse_family, resolve_family
from ifkv.models.source_hash import source_hash
from ifkv.models.wrappers import Wrapper, wrappers
from ifkv.testing import FAMILIES, SLIDING_FAMILIES, tiny_model
from ifkv.testing.vision_models import VISION_FAMILIES, vision_families

ROOT = Path(__file__).resolve().parents[2]
CLASSES = [
    pytest.param(family, path, id=f"{family.name}-{path.rpartition('.')[2]}")
    for family in families().values()
    for path in family.upstream_paths
    if family.name not in VISION_FAMILIES or family.name in vision_families()
]
AROUND = [
    pytest.param(wrapper, path, id=f"{wrapper.name}-{path.rpartition('.')[2]}")
    for wrapper in wrappers().values()
    for path in wrapper.upstream_paths
    if wrapper.name in vision_families()
]


@pytest.mark.parametrize(("family", "path"), CLASSES)
def test_canary_upstream_code_is_what_was_read(family: Family, path: str) -> None:
    found = source_hash(path)
    assert found in family.upstream_hashes[path], (
        f"{path} has changed in transformers {transformers.__version__}: its hash is "
        f"{found}, patches/{family.name}.toml knows {', '.join(family.upstream_hashes[path])}. "
        "Read what changed and compare it with ifkv.forward.layers and ifkv.patching.functions, "
        "run the tests on it, and only then add the hash (see patches/README.md)."
    )


@pytest.mark.parametrize(("wrapper", "path"), AROUND)
def test_canary_code_around_decoders_is_what_was_read(wrapper: Wrapper, path: str) -> None:
    found = source_hash(path)
    assert found in wrapper.upstream_hashes[path], (
        f"{path} has changed in transformers {transformers.__version__}: its hash is {found}. "
        "Read what changed and compare it with ifkv.documents.pictures and "
        "ifkv.models.picture_positions before adding the hash."
    )


def test_the_canary_sees_code_and_not_its_clothes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = {
        "plain": "def forward(self, x, y=1):\n        return x * y",
        "dressed": "def forward(self, x: int, y: int = 1) -> int:\n"
        '        """Multiply."""\n        # a comment\n        return (x\n                * y)',
        "changed": "def forward(self, x, y=1):\n        return x + y",
        "default": "def forward(self, x, y=2):\n        return x * y",
        "nothing": "def forward(self, x, y=None):\n        return x * y",
    }
    monkeypatch.syspath_prepend(str(tmp_path))
    hashes = {}
    for name, body in bodies.items():
        (tmp_path / f"canary_{name}.py").write_text(f"class Layer:\n    {body}\n")
        hashes[name] = source_hash(f"canary_{name}.Layer")
    assert hashes["plain"] == hashes["dressed"]
    assert len(set(hashes.values())) == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_hold_of_a_model(name: str) -> None:
    model = tiny_model(name, num_layers=2)
    family = resolve_family(model)
    assert family is families()[name]
    base: Any = model.base_model
    attention = base.layers[1].self_attn
    for path, part in (
        (family.attention_class, attention),
        (family.layer_class, base.layers[1]),
        (family.model_class, base),
        (family.causal_lm_class, model),
        (family.rotary_class, base.rotary_emb),
    ):
        module, _, class_name = path.rpartition(".")
        assert type(part) is getattr(importlib.import_module(module), class_name)
    assert (family.qk_norm != "none") == hasattr(attention, "q_norm")
    assert family.fused_qkv == hasattr(attention, "qkv_proj") == (not hasattr(attention, "q_proj"))
    x = torch.arange(8.0)
    rotate_half = importlib.import_module(family.attention_class.rpartition(".")[0]).rotate_half
    assert rotate_half(x).tolist() == [-4, -5, -6, -7, 0, 1, 2, 3], "the layout is half-split"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_window_rule_holds_of_a_model(name: str) -> None:
    rule = families()[name].sliding_window
    assert (rule == "none") == (name not in SLIDING_FAMILIES)
    if rule == "none":
        return
    model = tiny_model(name, num_layers=3, sliding_window=4)
    base: Any = model.base_model
    windows = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        own = getattr(module, "sliding_window", None)
        windows.append(own if rule == "layer-types" else model.config.sliding_window)

    for layer in base.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    model(torch.tensor([[1, 2, 3]]))
    assert windows == ([None, 4, 4] if rule == "layer-types" else [4, 4, 4])


def test_every_family_can_be_tried_on_a_tiny_model() -> None:
    assert sorted(families()) == sorted((*FAMILIES, *VISION_FAMILIES))


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_files_agree_with_themselves(family: Family) -> None:
    assert sorted(family.upstream_hashes) == sorted(family.upstream_paths)
    assert all(len(h) == 16 for hashes in family.upstream_hashes.values() for h in hashes)
    assert "dynamic" not in family.rope_types
    assert "default" in family.rope_types
    assert len(family.verified_transformers) >= 2


def test_every_key_is_explained() -> None:
    text = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    fields = [f.name for f in dataclasses.fields(Family) if f.name != "name"]
    assert all(f"| `{field}` |" in text for field in fields)


GOOD = (ROOT / "patches" / "llama.toml").read_text(encoding="utf-8")
GOOD = re.sub(r"model_types = .*", 'model_types = ["llama"]', GOOD)
LAYER_HASHES = re.compile(r'(LlamaDecoderLayer" = )\[.*\]')
BROKEN = {
    "unknown key": (
        GOOD.replace("qk_norm", "qknorm"),
        r"unknown key 'qknorm'.*known keys.*qk_norm",
    ),
    "missing key": (GOOD.replace('qk_norm = "none"\n', ""), r"lacks the key 'qk_norm'.*README"),
    "string for list": (GOOD.replace('["llama"]', '"llama"'), r"model_types is 'llama' but must"),
    "number in list": (GOOD.replace('["llama"]', "[1]"), r"model_types is \[1\] but must"),
    "norm rule": (GOOD.replace('qk_norm = "none"', 'qk_norm = "no"'), r"qk_norm is 'no'.*per-head"),
    "string for boolean": (
        GOOD.replace("fused_qkv = false", 'fused_qkv = "no"'),
        r"fused_qkv is 'no' but must be bool",
    ),
    "layout": (GOOD.replace('"half-split"', '"interleaved"'), r"'interleaved'.*half-split"),
    "window rule": (
        GOOD.replace('sliding_window = "none"', 'sliding_window = "some"'),
        r"'some'.*layer-types",
    ),
    "experts rule": (GOOD.replace('experts = "none"', 'experts = "8"'), r"experts is '8'.*routed"),
    "hash no list": (LAYER_HASHES.sub(r'\1"40dc"', GOOD), r"upstream_hashes is"),
    "hash a number": (LAYER_HASHES.sub(r"\1[40]", GOOD), r"upstream_hashes is"),
    "code without a hash": (
        re.sub(r"\n.*rotate_half.*", "", GOOD),
        r"upstream_hashes lacks .*rotate_half; read that code",
    ),
    "no toml": (GOOD.replace("qk_norm =", "qk_norm"), r"is not TOML.*line"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name(name: str) -> None:
    text, message = BROKEN[name]
    assert text != GOOD
    with pytest.raises(UnsupportedModelError, match=rf"patches/mine\.toml.*{message}"):
        parse_family(text, "mine")


def test_a_good_file_is_read_as_it_stands() -> None:
    family = parse_family(GOOD, "mine")
    assert (family.name, family.model_types, family.qk_norm) == ("mine", ("llama",), "none")
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.name = "yours"  # type: ignore[misc]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of family files in place of the library's."""
    monkeypatch.setattr("ifkv.models.families._folder", lambda: tmp_path)
    families.cache_clear()
    yield tmp_path
    families.cache_clear()


def test_two_families_cannot_claim_one_model_type(folder: Path) -> None:
    (folder / "first.toml").write_text(GOOD)
    (folder / "second.toml").write_text(GOOD.replace('["llama"]', '["other", "llama"]'))
    with pytest.raises(
        UnsupportedModelError, match=r"'llama' is claimed by patches/first\.toml.*second\.toml"
    ):
        families()


def test_files_beside_the_families_are_left_alone(folder: Path) -> None:
    (folder / "first.toml").write_text(GOOD)
    (folder / "README.md").write_text("not a family")
    assert list(families()) == ["first"]
    model = tiny_model("qwen2", num_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"'qwen2'.*known are llama\."):
        resolve_family(model)
