"""Where a command loads a model by default, in which dtype, and whether there is room for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ifkv.cli import app, available_memory
from ifkv.cli.available_memory import free_in_memory, free_on_device
from ifkv.cli.load_model import check_model, load_model
from ifkv.cli.placement import chosen_device
from ifkv.errors import InvalidInputError
from ifkv.testing import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    save(made)
    return made


def save(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> int:
    """Save a tiny model with its tokenizer; how many numbers it holds."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), dtype=dtype, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(each.numel() for each in model.parameters())


def cpu_has(monkeypatch: pytest.MonkeyPatch, **instructions: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)


@pytest.mark.parametrize(
    ("own", "instructions", "dtype"),
    [
        (torch.float32, {}, "float32"),
        (torch.float64, {}, "float64"),
        (torch.bfloat16, {}, "float32"),
        (torch.float16, {"avx512_bf16": True}, "float32"),
        (torch.bfloat16, {"avx512_bf16": True}, "bfloat16"),
        (torch.bfloat16, {"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        (torch.bfloat16, {"bf16": True}, "bfloat16"),
        (torch.float16, {"fp16_arith": True}, "float16"),
    ],
)
def test_a_cpu_computes_in_the_checkpoints_dtype_if_it_can(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: torch.dtype,
    instructions: dict[str, bool],
    dtype: str,
) -> None:
    cpu_has(monkeypatch, **instructions)
    count = save(tmp_path, own)
    checked = check_model(str(tmp_path), device="cpu")
    assert checked.dtype == dtype
    assert checked.nbytes == count * getattr(torch, dtype).itemsize
    assert load_model(checked).dtype == getattr(torch, dtype)
    named = f"the checkpoint's dtype is {str(own).removeprefix('torch.')}"
    assert (named in checked.sentence) == (dtype != str(own).removeprefix("torch."))
    for asked in ("bfloat16", "float64"):
        assert check_model(str(tmp_path), dtype=asked, device="cpu").dtype == asked


def test_a_card_computes_in_the_checkpoints_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_has(monkeypatch)
    save(tmp_path, torch.bfloat16)
    monkeypatch.setattr("ifkv.cli.load_model.chosen_device", lambda device: "cuda")
    monkeypatch.setattr(available_memory, "free_on_device", lambda device: None)
    assert check_model(str(tmp_path)).dtype == "bfloat16"


def test_a_checkpoint_that_names_no_dtype_or_another(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert check_model(str(folder), device="cpu").dtype == "float32"
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    with pytest.raises(InvalidInputError, match=r"float8_e4m3fn, in which ifkv cannot.*--dtype"):
        check_model(str(folder), device="cpu")
    assert check_model(str(folder), device="cpu", dtype="float32").dtype == "float32"


@pytest.mark.parametrize("there", [True, False])
def test_the_card_is_taken_if_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    asked, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "zeros", lambda n, device: asked.append(device) or zeros(n))
    assert chosen_device("auto") == ("cuda" if there else "cpu")
    assert chosen_device("cpu") == "cpu"
    assert asked == ["cuda" if there else "cpu", "cpu"]


@pytest.mark.parametrize("command", ["ask", "encode", "verify", "plan"])
def test_what_is_loaded_is_said_before_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "lamp.txt").write_text("The lamp is red.")
    text = str(tmp_path / "lamp.txt")
    arguments = {
        "ask": ["ask", "Which?", text, "--model", str(folder), "--max-new-tokens", "1"],
        "encode": ["encode", text, "--model", str(folder)],
        "verify": ["verify", str(folder), "--length", "8"],
        "plan": ["plan", str(folder), "--tokens", "900"],  # refused: it loads nothing
    }[command]
    result = CliRunner().invoke(app, arguments)
    said = result.stderr.splitlines()
    if command == "plan":
        assert not said
        return
    assert result.exit_code == 0, result.output
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert said[0].startswith(f"loading {folder}: float32 on cpu, ")
    kilobytes = float(said[0].split(", ")[1].split(" kB of weights")[0])
    assert 0.9 * size < 1000 * kilobytes < size


@pytest.mark.parametrize("command", [["ask", "Which?"], ["encode"]])
def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    (tmp_path / "lamp.txt").write_text("The lamp is red.")
    arguments = [*command, str(tmp_path / "lamp.txt"), "--model", str(folder), "--device", "cpu"]
    monkeypatch.setattr(available_memory, "free_in_memory", lambda: 60_000)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InvalidInputError)
    with pytest.raises(
        InvalidInputError, match=r"kB in float32, but 60\.0 kB are free in memory.*--dtype bfloat16"
    ):
        raise result.exception
    monkeypatch.setattr(available_memory, "free_in_memory", lambda: None)
    monkeypatch.setattr(available_memory, "free_on_device", lambda device: -5)
    result = CliRunner().invoke(app, arguments)
    with pytest.raises(InvalidInputError, match=r"but 0 bytes are free on cpu"):
        raise result.exception


def test_memory_that_runs_out_all_the_same_is_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = check_model(str(folder), device="cpu")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried")):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(InvalidInputError, match=r"no room for the weights.*--dtype"):
            load_model(checked)


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    count = save(tmp_path, tie_word_embeddings=True)
    assert check_model(str(tmp_path), device="cpu").nbytes == 4 * count


def test_quantized_weights_stay_as_they_are(folder: Path) -> None:
    plain = check_model(str(folder), device="cpu", dtype="float64").nbytes
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    kept = check_model(str(folder), device="cpu", dtype="float64").nbytes
    assert plain == 2 * kept


def test_a_model_of_the_hub_is_asked_for_its_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr("ifkv.cli.load_model.load_config", lambda name: config)

    found = SimpleNamespace(parameter_count={"BF16": 1000, "I32": 10})
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", lambda *_: found)
    assert check_model("owner/name", device="cpu").nbytes == 4040
    monkeypatch.undo()
    monkeypatch.setattr("ifkv.cli.load_model.load_config", lambda name: config)
    unknown = check_model("owner/name", device="cpu")  # nothing can be asked here
    assert unknown.nbytes is None
    assert "of weights" not in unknown.sentence


MEMINFO = "MemTotal:  100 kB\nMemAvailable:   60 kB\nSwapFree:     20 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 80 * 1024),
        (  # the second version of control groups; an outer one is narrower
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                "sys/fs/cgroup/outer/inner/memory.max": "max\n",
                "sys/fs/cgroup/outer/inner/memory.current": "5000\n",
                "sys/fs/cgroup/outer/memory.max": "20000\n",
                "sys/fs/cgroup/outer/memory.current": "7000\n",
                "sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 1000\n",
            },
            14000,
        ),
        (  # the first version, in a container that does not see its own group's folder
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "30000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "29000\n",
            },
            1000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "29000\n",
            },
            80 * 1024,
        ),
    ],
)
def test_memory_is_what_is_available_and_what_control_groups_leave(
    tmp_path: Path, files: dict[str, str], free: int
) -> None:
    for name, content in ({"proc/meminfo": MEMINFO} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert free_in_memory(tmp_path) == free


def test_memory_elsewhere(tmp_path: Path) -> None:
    whole = free_in_memory(tmp_path)  # as on a system without /proc
    assert whole is None or whole > 2**28
    assert free_on_device("cpu") is None
