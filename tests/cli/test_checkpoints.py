"""Folders of models that are damaged, incomplete, or contradict themselves."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import ifkv
from ifkv.cli import app
from ifkv.cli.load_model import check_model, load_model
from ifkv.errors import InvalidInputError, UnloadedWeightsWarning
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, in a folder to work in that has a text."""
    monkeypatch.chdir(tmp_path)
    Path("lamp.txt").write_text("The lamp is red.")
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def with_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def drop(*names: str) -> Callable[[Path], None]:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if any(part in name for part in names)]:
            del weights[name]

    return lambda folder: with_weights(folder, edit)


def put(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: with_weights(
        folder, lambda weights: weights.update({name: torch.zeros(shape)})
    )


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def in_shards(content: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(content)

    return edit


def older(content: str | bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        write("pytorch_model.bin", content)(folder)

    return edit


def newer_tokenizer(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    change(folder / "tokenizer.json", model=found["model"] | {"type": "TheNextBPE"})


def no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")


LACKING = {
    "an MLP is missing": (
        drop("model.layers.1.mlp."),
        r"lacks weights.*model\.layers\.1\.mlp\.down_proj\.weight.*random numbers",
    ),
    "a norm is missing": (drop("model.norm"), r"lacks weights.*model\.norm\.weight"),
    "all layers lack a matrix": (drop("up_proj"), r"layers\.\*\.mlp\.up_proj\.weight \(3\)"),
    "the head is missing": (drop("lm_head"), r"lacks weights.*lm_head\.weight"),
    "sizes contradict the config": (
        lambda folder: change(folder / "config.json", intermediate_size=64),
        r"config\.json of .* contradicts.*\(32, 48\).*\(32, 64\).*9 such weights",
    ),
    "a matrix has another shape": (
        put("model.norm.weight", 5),
        r"model\.norm\.weight has .*\(5,\)",
    ),
    "more layers than the config counts": (
        lambda folder: change(folder / "config.json", num_hidden_layers=2),
        r"no place for: model\.layers\.2\.",
    ),
    "a bias that the config denies": (
        put("model.layers.0.self_attn.q_proj.bias", 32),
        r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "an older file is a page of HTML": (older("<html>not found</html>"), "cannot be loaded"),
    "an older file is cut short": (older(b"\x80\x02abc"), "cannot be loaded"),
}
DAMAGED = {
    "weights are a pointer": (write(WEIGHTS, POINTER), r"model\.safetensors only stands.*git lfs"),
    "an older file is a pointer": (older(POINTER), r"pytorch_model\.bin only stands.*git lfs pull"),
    "the tokenizer is a pointer": (write("tokenizer.json", POINTER), "tokenizer.json only stands"),
    "weights are empty": (write(WEIGHTS, b""), r"model\.safetensors is empty"),
    "weights are cut short": (cut_short, r"model\.safetensors is damaged or was not fetched whole"),
    "weights are a page of HTML": (write(WEIGHTS, "<html>not found</html>"), "is damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"but no weights"),
    "a shard is missing": (
        in_shards('{"weight_map": {"lm_head.weight": "model-2-of-2.safetensors"}}'),
        r"weights' file .*model-2-of-2\.safetensors is missing",
    ),
    "an index without weights": (in_shards('{"weight_map": {}}'), "no 'weight_map'"),
    "an index that is none": (in_shards("["), r"index\.json cannot be used: it is not JSON"),
}
BAD_CONFIGS = {
    "the config is a pointer": (write("config.json", POINTER), r"config\.json only stands.*lfs"),
    "the config is no JSON": (
        write("config.json", "{"),
        r"config\.json cannot be used: it is not JSON",
    ),
    "the config is a list": (write("config.json", "[]"), r"config\.json holds no JSON object"),
    "a number is a word": (
        lambda folder: change(folder / "config.json", hidden_size="wide"),
        r"config\.json in .* cannot be used",
    ),
    "heads do not divide": (
        lambda folder: change(folder / "config.json", hidden_size=33),
        r"config\.json in .* cannot be used",
    ),
    "generation settings are no JSON": (
        write("generation_config.json", "{"),
        r"generation_config\.json cannot be used: it is not JSON",
    ),
}
BAD_TOKENIZERS = {
    "none": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer that can be"),
    "of a newer release": (newer_tokenizer, r"no tokenizer that can be.*newer release.*upgrade"),
    "empty": (write("tokenizer.json", ""), "no tokenizer that can be loaded"),
    "without a vocabulary": (no_vocabulary, r"Qwen2Tokenizer has no vocabulary.*tokenizer\.json"),
}
COMMANDS = {
    "ask": ["ask", "Which?", "lamp.txt", "--model", "model"],
    "encode": ["encode", "lamp.txt", "--model", "model", "--store", "kept"],
    "eval": ["eval", "--data", "needle", "--limit", "1", "--model", "model", "--out", "results"],
    "verify": ["verify", "model"],
    "plan": ["plan", "model", "--tokens", "100"],
}


def refused(command: list[str], message: str) -> str:
    """The refusal, which is one sentence and leaves nothing behind."""
    before = set(Path().iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InvalidInputError), result.output
    with pytest.raises(InvalidInputError, match=message):
        raise result.exception
    assert len(str(result.exception).splitlines()) == 1
    assert set(Path().iterdir()) - before <= {Path("kept")}
    assert not list(Path().glob("kept/documents/*"))
    return str(result.output)


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize("command", ["ask", "encode", "eval", "verify"])
def test_weights_that_are_not_all_the_checkpoints_are_refused(
    folder: Path, command: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = LACKING[name]
    damage(folder)
    said = refused(COMMANDS[command], message) + capfd.readouterr().err
    assert "LOAD REPORT" not in said, "transformers printed its table beside it"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, name)
        for command in COMMANDS
        for name in DAMAGED | BAD_CONFIGS
        if command != "plan" or name in BAD_CONFIGS or "pointer" in name  # it reads no weights
    ],
)
def test_damaged_folders_are_refused_before_any_weights(
    folder: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    damage, message = (DAMAGED | BAD_CONFIGS)[name]
    damage(folder)
    assert not refused(COMMANDS[command], message), "something was printed before the refusal"


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
@pytest.mark.parametrize("command", ["ask", "encode", "eval"])
def test_damaged_tokenizers_are_refused_before_any_weights(
    folder: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    damage, message = BAD_TOKENIZERS[name]
    damage(folder)
    assert not refused(COMMANDS[command], message)


@pytest.mark.parametrize(
    "edit",
    [
        drop("lm_head"),  # tied
        put("score.weight", 2, 32),  # another task's head
        put("model.layers.0.self_attn.rotary_emb.inv_freq", 4),  # older releases kept it
        put("model.layers.0.self_attn.k_proj.k_scale", 1),  # of a quantized cache
    ],
)
def test_what_a_checkpoint_may_lack_or_have_beside_its_weights(
    tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    edit(tmp_path)
    loaded = load_model(check_model(str(tmp_path)))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.fixture
def lacking(folder: Path) -> Iterator[Any]:
    drop("model.layers.1.mlp.")(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    yield model
    ifkv.unpatch(model)


def test_a_patch_warns_of_weights_that_were_never_loaded(lacking: Any, folder: Path) -> None:
    words = r"model\.layers\.1\.mlp\.down_proj\.weight.* did not come from the checkpoint.*random"
    with pytest.warns(UnloadedWeightsWarning, match=words) as told:
        ifkv.patch(lacking)
    assert told[0].filename == __file__
    with pytest.warns(UnloadedWeightsWarning, match=words):
        ifkv.Session(lacking, AutoTokenizer.from_pretrained(folder), store=MemoryStore())


@pytest.mark.parametrize("tied", [False, True])
def test_no_word_about_models_that_are_whole(tmp_path: Path, tied: bool) -> None:
    made = tiny_model(dtype=torch.float32, tie_word_embeddings=tied)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (made, loaded, loaded.float()):
            with ifkv.patch(model):
                pass


def test_a_session_refuses_a_tokenizer_without_a_vocabulary(folder: Path) -> None:
    no_vocabulary(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = tiny_model(vocab_size=300)
    with pytest.raises(InvalidInputError, match="no vocabulary"):
        ifkv.Session(model, tokenizer, store=MemoryStore())
    ifkv.unpatch(model)
