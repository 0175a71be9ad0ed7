"""``ifkv store`` and ``ifkv encode``, and filling a store from a corpus."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import ifkv
from ifkv.cli.encode import encode
from ifkv.cli.load_model import Checked
from ifkv.cli.read_files import read_corpus
from ifkv.cli.store import parse_bytes, store_app
from ifkv.errors import InvalidInputError, StoreFullError
from ifkv.store import (
    DiskStore,
    MemoryStore,
    RemoteStore,
    default_store_path,
    encode_documents,
    key_of,
    open_store,
)
from ifkv.testing import assert_close, random_document, tiny_model, tiny_tokenizer

PREFIX = random_document(1000, length=3)


def run(*arguments: object, app: typer.Typer = store_app) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with DiskStore(tmp_path / "store") as store:
        for i in range(3):
            store.put(random_document(i, prefix=PREFIX))
    return tmp_path / "store"


def test_ls_and_stats(folder: Path) -> None:
    lines = run("ls", "--store", folder).output.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith(key_of(random_document(2, prefix=PREFIX))[:16])
    output = run("stats", "--store", folder).output
    assert "documents    3" in output
    assert "prefixes     1" in output
    assert "tokens       18" in output


def test_to_look_needs_no_torch(folder: Path) -> None:
    """Importing it takes seconds; neither does `ifkv --version` or a refusal wait for it."""
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'numpy', 'safetensors'): sys.modules[name] = None\n"
        "from ifkv.cli import main\n"
        "main()\n"
    )
    for arguments, code, words in (
        (["store", "ls", "--store", folder], 0, key_of(PREFIX)[:16]),
        (["store", "stats", "--store", folder], 0, "documents    3"),
        (["store", "ls", "--store", folder / "none"], 2, "there is no store in"),
        (["store", "prune", "--store", folder, "--max-bytes", "7 apples"], 2, "is no size"),
        (["store", "--help"], 0, "Look into a store"),
        (["ask", "--help"], 0, "--store"),
        (["--version"], 0, ifkv.__version__),
    ):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert found.returncode == code, found.stderr
        assert words in found.stdout + found.stderr


def test_prune(folder: Path) -> None:
    with DiskStore(folder) as store:
        sizes = {entry.key: entry.nbytes for entry in store.entries()}
        prefix, newest = key_of(PREFIX), key_of(random_document(2, prefix=PREFIX))
    kept = sizes[prefix] + sizes[newest]
    result = run("prune", "--store", folder, "--max-bytes", kept)
    assert result.output.startswith("evicted 2 entries")
    with DiskStore(folder) as store:
        assert set(store.keys()) == {prefix, newest}


def test_verify_exits_with_1_when_something_is_wrong(folder: Path) -> None:
    assert run("verify", "--store", folder).exit_code == 0
    with DiskStore(folder) as store:
        file = store.folder.file_of(key_of(PREFIX))
    file.write_bytes(file.read_bytes()[:-1])
    result = run("verify", "--store", folder)
    assert result.exit_code == 1
    assert "4 entries checked, 1 set aside" in result.output
    assert key_of(PREFIX) in result.output


def test_rm(folder: Path) -> None:
    key = key_of(random_document(0, prefix=PREFIX))
    assert run("rm", key[:12], "--store", folder).output == f"removed {key}\n"
    for unclear in ("", "z", key[:12]):
        with pytest.raises(InvalidInputError, match="keys of this store"):
            run("rm", unclear, "--store", folder)
    run("rm", key_of(PREFIX), "--store", folder)
    with DiskStore(folder) as store:
        assert len(store) == 0


def test_a_url_is_not_taken_for_a_folder() -> None:
    with pytest.raises(InvalidInputError, match=r"is a URL \(s3://\), .*folder of a store"):
        run("ls", "--store", "s3://bucket/store")


def test_a_mistyped_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no store in"):
        run("ls", "--store", tmp_path / "sotre")
    assert not (tmp_path / "sotre").exists()


@pytest.mark.parametrize(
    ("text", "nbytes"), [("7", 7), ("500M", 500_000_000), ("2GiB", 2**31), ("1.5 kb", 1500)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes
    with pytest.raises(InvalidInputError, match="write 500M"):
        parse_bytes(f"{text} apples")


def test_where_stores_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFKV_STORE", str(tmp_path / "there"))
    assert default_store_path() == tmp_path / "there"
    assert isinstance(open_store(), DiskStore)
    assert isinstance(open_store("memory://there"), RemoteStore)
    monkeypatch.delenv("IFKV_STORE")
    monkeypatch.setenv("IFKV_CACHE", str(tmp_path / "all"))
    assert default_store_path() == tmp_path / "all" / "store"
    monkeypatch.delenv("IFKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "ifkv" in default_store_path().parts


def test_corpus_files(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    found = list(read_corpus([tmp_path / "a.md", tmp_path / "b.jsonl"], "text"))
    assert [text for _, text in found] == ["# A\n", "one", "two"]
    assert found[2][0].place.endswith("b.jsonl:3")
    for line in ("nonsense", "[]", "{}", '{"text": 3}', '{"text": " "}'):
        (tmp_path / "b.jsonl").write_text(line)
        with pytest.raises(InvalidInputError, match="line 1"):
            list(read_corpus([tmp_path / "b.jsonl"], "text"))


def test_encoding_skips_resumes_and_equals_prefill() -> None:
    model = tiny_model("llama")
    documents = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]
    with ifkv.patch(model):
        wanted = ifkv.prefill_documents(model, documents, prefix=[1, 2])
        store, seen = MemoryStore(), []

        def interrupt(done: int, total: int) -> None:
            seen.append((done, total))
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            encode_documents(
                model, store, documents, prefix=[1, 2], batch_tokens=5, on_progress=interrupt
            )
        assert seen == [(0, 9), (5, 9)]
        result = encode_documents(model, store, documents, prefix=[1, 2], batch_tokens=5)
        assert (result.made, result.present) == (1, 2)
        assert result.keys == [key_of(document) for document in wanted]
        for key, document in zip(result.keys, wanted, strict=True):
            assert_close(store.get(key).keys, document.keys, what="keys")
            assert_close(store.get(key).values, document.values, what="values")
        again = encode_documents(model, store, documents, prefix=[1, 2])
        assert (again.made, again.present) == (0, 3)
        with pytest.raises(StoreFullError):
            encode_documents(model, MemoryStore(10), documents)


def test_encode_builds_a_store_that_a_session_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    module = importlib.import_module("ifkv.cli.encode")
    monkeypatch.setattr(module, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(module, "load_tokenizer", lambda _: tokenizer)
    checked = Checked("any", model.config, "float64", "cpu", None)
    monkeypatch.setattr(module, "check_model", lambda *_, **__: checked)
    texts = ["The lamp is red.", "The door is green."]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": texts[1]}))
    app = typer.Typer()
    app.command()(encode)
    arguments = (tmp_path / "a.txt", tmp_path / "b.jsonl", "--model", "any", "--field", "body")
    folder = tmp_path / "store"
    first = run(*arguments, "--store", folder, app=app)
    assert "2 documents: 2 encoded, 0 already there" in first.output
    assert "0 encoded, 2 already there" in run(*arguments, "--store", folder, app=app).output
    measured = tmp_path / "measured"
    run(*arguments, "--store", measured, "--sensitivities", app=app)
    for made, there in ((folder, False), (measured, True)):
        with DiskStore(made) as store:
            documents = [store.get(key, lazy=True) for key in sorted(store.keys())]
        found = {each.sensitivity is not None for each in documents if each.prefix is not None}
        assert found == {there}
    again = run(*arguments, "--store", folder, "--sensitivities", app=app)
    assert "2 documents: 2 encoded, 0 already there" in again.output
    again = run(*arguments, "--store", folder, "--sensitivities", app=app)
    assert "0 encoded, 2 already there" in again.output
    small = run(*arguments, "--store", tmp_path / "small", "--max-bytes", "80k", app=app)
    assert "1 of them have been evicted again" in small.output
    with pytest.raises(InvalidInputError, match=r"behind a URL \(memory://far\) has no budget"):
        run(*arguments, "--store", "memory://far", "--max-bytes", "80k", app=app)
    with DiskStore(folder) as store:
        session = ifkv.Session(model, tokenizer, store=store)
        monkeypatch.setattr(store, "put", lambda _, **__: pytest.fail("nothing is missing"))
        assert all(key in store for key in session.add(texts))
        assert session.ask("Which colour is the door?", max_new_tokens=2).text is not None
    ifkv.unpatch(model)


def test_the_documentations_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "store-format.md"
    [block] = re.findall(r"^```py\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", vocab_size=len(tokenizer))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: tokenizer)
    monkeypatch.setenv("IFKV_STORE", str(tmp_path))
    names: dict[str, Any] = {}
    exec(block, names)
    with DiskStore(tmp_path) as store:
        assert all(key in store for key in names["keys"])
