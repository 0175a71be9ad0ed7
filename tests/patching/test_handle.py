"""Life of a patch: what it changes, that it undoes all of it, and that patches do not meet."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

import ifkv
from ifkv.patching import handle_of
from ifkv.testing import FAMILIES, assert_bit_equal, tiny_model
from scenario import cache_of

IDS = torch.tensor([[5, 9, 33, 2, 71, 40]])
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def registered() -> tuple[set[str], set[str]]:
    """Names of all attention and mask functions that transformers knows."""
    return set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that a patch could have changed; values to compare by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in HOOKS:
                found[f"{name} {key}"] = tuple(value.items())
            elif key not in ("_parameters", "_buffers", "_modules"):
                found[f"{name} {key}"] = value
        found[f"{name} class"] = type(module)
        found[f"{name} forward"] = module.forward.__func__
    return found


def assert_same_state(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        same = got[key] == value if isinstance(value, tuple) else got[key] is value
        assert same, f"{key} has changed"


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_of_other_files() -> None:
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    before = registered()
    yield
    if registered() != before:
        gc.collect()
    assert registered() == before


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", num_layers=2)


def usable(model: PreTrainedModel) -> bool:
    """Whether ifkv's own passes run and ordinary calls do too."""
    documents = ifkv.prefill_documents(model, [[1, 2, 3], [4, 5]], prefix=[6])
    cache = ifkv.stitch(model, documents)
    return ifkv.generate(model, cache, [7, 8], max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_leaves_everything_as_it_was(family: str) -> None:
    model = tiny_model(family, num_layers=2)
    before, config, names = state(model), vars(model.config).copy(), registered()
    handle = ifkv.patch(model)
    assert usable(model)
    assert (handle.family.name, handle.backend.name) == (family, "reference")
    assert registered() != names
    ifkv.unpatch(model)
    assert_same_state(state(model), before)
    assert vars(model.config) == config
    assert registered() == names
    ifkv.unpatch(model)  # does nothing
    assert_same_state(state(model), before)


def test_a_patch_changes_configs_and_nothing_else(model: PreTrainedModel) -> None:
    before = state(model)
    with ifkv.patch(model):
        changed = {key for key, value in state(model).items() if value is not before.get(key)}
    assert {key.split()[-1] for key in changed if not key.endswith("_hooks")} == {"config"}
    assert " config" not in changed, "the model's own config object is the user's"


def test_patch_is_idempotent(model: PreTrainedModel) -> None:
    handle = ifkv.patch(model)
    during, names = state(model), registered()
    assert ifkv.patch(model) is handle
    assert ifkv.patch(model, backend="reference") is handle
    assert_same_state(state(model), during)
    assert registered() == names
    ifkv.unpatch(model)
    assert "undone" in repr(handle)
    again = ifkv.patch(model)
    assert again is not handle
    handle.unpatch()  # an old handle undoes nothing new
    assert handle_of(model) is again
    ifkv.unpatch(model)


def test_a_context_manager_undoes_the_patch_even_on_an_error(model: PreTrainedModel) -> None:
    before = state(model)
    with pytest.raises(RuntimeError, match="out"), ifkv.patch(model):
        raise RuntimeError("out")
    assert_same_state(state(model), before)
    with pytest.raises(ifkv.IfkvError, match="not patched"):
        handle_of(model)


def test_nested_blocks_are_undone_by_the_outermost(model: PreTrainedModel) -> None:
    with ifkv.patch(model) as handle:
        with ifkv.patch(model) as inner:
            assert inner is handle
        assert usable(model)
    with pytest.raises(ifkv.IfkvError, match="not patched"):
        handle_of(model)


def test_another_backend_makes_the_patch_anew(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, names = state(model), registered()
    first = ifkv.patch(model)
    other = copy.copy(first.backend)
    monkeypatch.setattr(type(other), "name", "other")
    monkeypatch.setattr(first, "backend", type("Old", (), {"name": "reference"})())
    monkeypatch.setattr("ifkv.backends.resolve_backend", lambda name, model: other)
    second = ifkv.patch(model, backend="other")
    assert (second is first, second.backend.name) == (False, "other")
    assert len(registered()[0]) == len(names[0]) + 1
    ifkv.unpatch(model)
    assert_same_state(state(model), before)


def test_an_unknown_backend_is_refused_and_nothing_changes(model: PreTrainedModel) -> None:
    before = state(model)
    with pytest.raises(ifkv.IfkvError, match="fast"):
        ifkv.patch(model, backend="fast")
    assert_same_state(state(model), before)


def test_set_attn_implementation_works_while_patched(model: PreTrainedModel) -> None:
    expected = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        expected[name] = model(IDS, output_attentions=name == "eager")
    with ifkv.patch(model):
        for part in (model, model.base_model):
            for name in ("eager", "sdpa"):
                part.set_attn_implementation(name)
                assert model.config._attn_implementation == name
                got = model(IDS, output_attentions=name == "eager")
                assert_bit_equal(got.logits, expected[name].logits, what=f"logits with {name}")
                assert usable(model)
        model.set_attn_implementation("eager")
        attentions = model(IDS, output_attentions=True).attentions
        assert_bit_equal(attentions[1], expected["eager"].attentions[1], what="attentions")
    assert model.config._attn_implementation == "eager", "a choice made while patched stays"
    assert model.base_model.config is model.config


def test_config_changes_are_seen_through_the_patch(model: PreTrainedModel) -> None:
    with ifkv.patch(model):
        model.config.use_cache = False
        assert model.base_model.config.use_cache is False
        assert cache_of(model(IDS)) is None
        model.base_model.config.use_cache = True
        assert model.config.use_cache is True
        assert cache_of(model(IDS)) is not None
        assert model.base_model.config.to_dict() == model.config.to_dict()
        assert isinstance(model.base_model.config, type(model.config))


def test_models_of_one_config_object_are_apart(model: PreTrainedModel) -> None:
    model.config._attn_implementation = "eager"
    twin = type(model)(model.config).eval()  # from_config() would copy it
    assert twin.config is model.config
    before, logits = state(twin), twin(IDS).logits
    with ifkv.patch(model):
        assert_same_state(state(twin), before)
        assert twin.base_model.config._attn_implementation == "eager"
        with pytest.raises(ifkv.IfkvError, match="not patched"):
            ifkv.prefill_documents(twin, [[1, 2]])
        with ifkv.patch(twin):
            assert handle_of(twin).name != handle_of(model).name
            assert usable(model)
            assert usable(twin)
        assert_same_state(state(twin), before)
        assert_bit_equal(twin(IDS).logits, logits, what="logits of the unpatched twin")
        assert usable(model)


def test_two_patched_models_in_two_threads() -> None:
    """Both run ifkv's passes and ordinary calls at once; each computes what it does alone."""
    models = [tiny_model("llama", seed=seed, num_layers=2) for seed in (0, 1)]
    models[1].config = models[0].config

    def work(model: PreTrainedModel) -> list[torch.Tensor]:
        documents = ifkv.prefill_documents(model, [[1, 2, 3], [4, 5]], prefix=[6])
        cache = ifkv.stitch(model, documents)
        scores = ifkv.score(model, cache, [7, 8])
        logits = ifkv.recompute(model, cache, [4, 5], prompt_ids=[7, 8])
        assert logits is not None
        ids = ifkv.generate(model, cache, [7, 8], max_new_tokens=3, do_sample=False)
        return [scores, logits, ids, model(IDS).logits]

    for model in models:
        ifkv.patch(model)
    expected = [work(model) for model in models]
    start, failures = threading.Barrier(2), []

    def loop(index: int) -> None:
        try:
            start.wait()
            for _ in range(5):
                for got, want in zip(work(models[index]), expected[index], strict=True):
                    assert_bit_equal(got, want, what=f"model {index}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        ifkv.unpatch(model)
    assert not failures, failures[0]


def test_a_model_collected_while_patched_is_unregistered() -> None:
    names = registered()
    model = tiny_model("llama", num_layers=1)
    gone = weakref.ref(model)
    handle = ifkv.patch(model)
    assert usable(model)
    del model
    gc.collect()
    assert gone() is None
    assert registered() == names
    handle.unpatch()  # does nothing


def test_a_stack_that_outlives_its_patched_head_is_restored() -> None:
    model = tiny_model("llama", num_layers=1)
    base: Any = model.base_model
    before, expected = state(base), base(IDS).last_hidden_state
    ifkv.patch(model)
    del model
    gc.collect()
    assert_same_state(state(base), before)
    assert_bit_equal(base(IDS).last_hidden_state, expected, what="hidden states")


def through_pickle(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def through_torch(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
def test_copies_of_a_patched_model_are_unpatched(
    model: PreTrainedModel, duplicate: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    """A copy is an ordinary model, with one config as before, that can be patched by itself."""
    logits = model(IDS).logits
    ifkv.patch(model)
    twin = duplicate(model)
    assert type(twin.base_model.config) is type(model.config)
    assert twin.base_model.config is twin.config
    assert twin.config is not model.config
    with pytest.raises(ifkv.IfkvError, match="not patched"):
        handle_of(twin)
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    with ifkv.patch(twin):
        assert usable(twin)
    ifkv.unpatch(model)
    twin.set_attn_implementation("sdpa")
    assert_bit_equal(twin(IDS).logits, logits, what="logits of the copy")


def test_copies_of_a_patched_models_config_are_plain(model: PreTrainedModel) -> None:
    with ifkv.patch(model):
        config = model.base_model.config
        for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert type(twin) is type(model.config)
            assert twin is not model.config
            assert twin._attn_implementation == "sdpa"
            assert twin.to_dict() == model.config.to_dict()


def test_a_patched_model_is_saved_as_an_ordinary_one(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "plain")
    with ifkv.patch(model):
        model.save_pretrained(tmp_path / "patched")
        model.base_model.save_pretrained(tmp_path / "stack")
    for name in ("config.json", "model.safetensors"):
        plain, patched = (tmp_path / folder / name for folder in ("plain", "patched"))
        assert patched.read_bytes() == plain.read_bytes()
    assert "ifkv" not in (tmp_path / "stack" / "config.json").read_text()


def test_importing_ifkv_is_light_and_registers_nothing() -> None:
    script = """if True:
        import sys, time
        start = time.perf_counter()
        import ifkv
        seconds = time.perf_counter() - start
        heavy = {"torch", "transformers", "numpy", "rich", "typer"} & set(sys.modules)
        assert not heavy, f"import ifkv loads {heavy}"
        assert seconds < 1, f"import ifkv takes {seconds} s"
        assert "patch" in dir(ifkv)
        try:
            ifkv.nonsense
        except AttributeError as error:
            assert "nonsense" in str(error)
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
        before = set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())
        import torch
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        for name in ifkv.__all__:
            getattr(ifkv, name)
        after = set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())
        assert after == before, "loading ifkv registers something"
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
    """
    source = str(Path(ifkv.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r})\n{script}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


COMPILED: dict[str, Callable[[PreTrainedModel], Any]] = {
    "wrapped": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: (model.compile(backend="eager"), model)[1],
}


def answer(model: Any) -> torch.Tensor:
    """Tokens that a patched model answers with."""
    documents = ifkv.prefill_documents(model, [[5, 9, 33], [2, 71]], prefix=[1])
    cache = ifkv.stitch(model, documents)
    ifkv.recompute(model, cache, [4], prompt_ids=[7, 8])
    return ifkv.generate(model, cache, [7, 8], max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("first", ["patch", "compile"])
@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_model_answers_alike(way: str, first: str) -> None:
    model = tiny_model("llama", num_layers=2)
    with ifkv.patch(model):
        expected = answer(model)
    if first == "patch":
        ifkv.patch(model)
    compiled = COMPILED[way](model)
    compiled(IDS)  # traced before the patch, if the patch comes second
    with ifkv.patch(compiled):
        assert torch.equal(answer(compiled), expected)
    ifkv.unpatch(model)
