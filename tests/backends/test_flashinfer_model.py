"""The method end to end through the FlashInfer backend, on the stand-in; choosing the backend."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ifkv
from flashinfer_standin import FlashInferStandIn
from ifkv.backends import _say_once, resolve_backend
from ifkv.backends.flashinfer import FlashInferBackend, availability
from ifkv.backends.spec import AttentionSpec
from ifkv.errors import BackendUnavailableError, InvalidInputError
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    dense_recompute,
    dense_scores,
    dense_stitched,
    shared_tiny_model,
)
from scenario import EXACT, Scenario, assert_rows_equal, cache_of, scenarios

PREFIX = [1, 2]
DOCUMENTS = [[3 + (7 * i) % 90 for i in range(40)], [5, 6, 7], [9] * 30]
PROMPT = [11, 12, 13, 14, 15]


def standin_backend(mask="split"):
    return FlashInferBackend(FlashInferStandIn(relaxed=True), mask=mask, workspace_bytes=2**20)


BACKENDS = {mask: standin_backend(mask) for mask in ("positions", "split")}


@given(s=scenarios(), mask=st.sampled_from(list(BACKENDS)))
def test_recompute_equals_the_oracle(s: Scenario, mask: str) -> None:
    with ifkv.patch(s.model, backend=BACKENDS[mask]):
        documents = ifkv.prefill_documents(s.model, s.request.documents, prefix=s.request.prefix)
        cache = ifkv.stitch(s.model, documents, order=s.order)
        logits = ifkv.recompute(s.model, cache, s.slots, prompt_ids=s.request.prompt)
    context = dense_stitched(s.model, s.request.prefix, s.request.documents, s.order)
    truth = dense_recompute(s.model, context, s.slots, s.request.prompt)
    assert_rows_equal(cache, truth, what="after recompute")
    assert_close(logits, truth.logits[-1], what="logits", tolerance=EXACT)


@given(s=scenarios(), reduction=st.sampled_from(["l2", "sum"]))
def test_scores_equal_the_oracle(s: Scenario, reduction: str) -> None:
    layers = [0, -1]
    with ifkv.patch(s.model, backend=BACKENDS["split"]):
        documents = ifkv.prefill_documents(s.model, s.request.documents, prefix=s.request.prefix)
        cache = ifkv.stitch(s.model, documents, order=s.order)
        scores = ifkv.score(s.model, cache, s.request.query, layers=layers, reduction=reduction)
    context = dense_stitched(s.model, s.request.prefix, s.request.documents, s.order)
    want = dense_scores(s.model, context, s.request.query, layers=layers, reduction=reduction)
    assert_close(scores, want.float(), what="scores", tolerance=1e-6)


def answered(model, backend, **kwargs):
    """Generate behind two documents of three recomputed halfway; token ids, and the plans made."""
    with ifkv.patch(model, backend=backend) as handle:
        module = getattr(handle.backend, "_module", None)
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        ifkv.recompute(model, cache, range(45, 70, 2))
        before = module.plans if module else 0
        out = ifkv.generate(model, cache, PROMPT, **kwargs)
        return out, (module.plans if module else 0) - before


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "beams returned", "samples"],
)
def test_decoding_runs_on_the_backend_and_gives_the_same_answer(family, how):
    model = shared_tiny_model(family)
    how = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None, **how}
    torch.manual_seed(0)
    want, _ = answered(model, "reference", **how)
    torch.manual_seed(0)
    got, plans = answered(model, standin_backend(), **how)
    assert got.tolist() == want.tolist()
    assert plans == 8, "one plan a decoding step, for all layers together"


def test_decoding_logits_are_those_of_the_models_own_attention():
    model = shared_tiny_model("qwen2")
    logits = []
    for backend in ("reference", standin_backend()):
        with ifkv.patch(model, backend=backend):
            cache = ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX))
            ids = torch.tensor([[8]])
            with torch.no_grad():
                logits.append(model(ids, past_key_values=cache).logits)
    assert_close(logits[1], logits[0], what="logits", tolerance=EXACT, axes=("a", "b", "c"))


def test_a_mask_or_another_cache_is_left_to_the_models_own_attention():
    model = shared_tiny_model("llama")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = model(ids)
        plain_step = model(torch.tensor([[8]]), past_key_values=cache_of(plain)).logits
    backend = standin_backend()
    with ifkv.patch(model, backend=backend), torch.no_grad():
        again = model(ids)
        step = model(torch.tensor([[8]]), past_key_values=cache_of(again)).logits
        assert backend._module.plans == 0
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX))
        planned = backend._module.plans
        padding = torch.ones(1, cache.context_length + 1, dtype=torch.long)
        padding[0, 3:6] = 0
        model(torch.tensor([[8]]), past_key_values=cache, attention_mask=padding)
        assert backend._module.plans == planned, "a padding mask must not be dropped"
    assert_bit_equal(step, plain_step, what="logits", axes=("a", "b", "c"))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_windows_in_decoding_are_left_to_the_models_own_attention():
    model = shared_tiny_model("mistral", sliding_window=5)
    how = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    want, _ = answered(model, "reference", **how)
    got, plans = answered(model, standin_backend(), **how)
    assert got.tolist() == want.tolist()
    assert plans == 0


def test_one_plan_serves_all_layers_of_a_forward():
    model = shared_tiny_model("llama")
    backend = standin_backend()
    module = backend._module
    with ifkv.patch(model, backend=backend):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        assert module.plans == 2, "the prefix, and the documents behind it"
        cache = ifkv.stitch(model, documents)
        ifkv.score(model, cache, PROMPT, layers=[-1])
        assert module.plans == 4, "the context, and the query's own tokens"
        ifkv.recompute(model, cache, [4, 9, 50], prompt_ids=PROMPT)
        assert module.plans <= 8, "masked, unmasked and causal rows, and the answering row"


@pytest.mark.parametrize("geometry", ["global", "hl-tp"])
def test_several_requests_are_scored_in_the_calls_of_one(geometry):
    """Over the contexts, and over the queries themselves; the results are those of one by one."""
    model = shared_tiny_model("mistral", sliding_window=9)
    backend = standin_backend()
    queries = [PROMPT, [4, 5], [6] * 7]
    with ifkv.patch(model, backend=backend):
        a, b, c = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        caches = ifkv.stitch_many(model, [[a, b], [c], [b, a, c]], geometry=geometry)
        want = [ifkv.score(model, *pair) for pair in zip(caches, queries, strict=True)]
        before = backend._module.plans
        got = ifkv.score_many(model, caches, queries)
        assert backend._module.plans - before == 2
        apart = [cache.clone() for cache in caches]
        alone = ifkv.score_many(model, apart, queries)
    for one, other, expected in zip(got, alone, want, strict=True):
        assert_close(one, expected, what="scores together", tolerance=1e-6)
        assert_close(other, expected, what="scores of caches apart", tolerance=1e-6)


def test_more_rows_than_a_mask_can_address_are_refused(monkeypatch):
    monkeypatch.setattr("ifkv.backends.flashinfer.calls.MASK_LIMIT", 100)
    backend = standin_backend("split")
    slots = torch.tensor([1, 3, 60])
    x = torch.zeros(1, 2, 64, 8, dtype=torch.float64)
    plan = backend.plan_requests([slots], [64], torch.device("cpu"))
    with pytest.raises(InvalidInputError, match="mask of 183 elements"):
        backend.attend_requests(x[:, :, :3], [x], [x], plan, AttentionSpec(1.0))


# --- choosing the backend ------------------------------------------------------------------------


def test_auto_takes_the_reference_on_a_cpu_and_says_why_once(caplog):
    _say_once.cache_clear()
    model = shared_tiny_model("llama")
    with caplog.at_level(logging.INFO, logger="ifkv"):
        assert resolve_backend("auto", model).name == "reference"
        assert resolve_backend("auto", model).name == "reference"
    assert len(caplog.records) == 1
    assert "'reference' on cpu" in caplog.text
    assert "FlashInfer runs on CUDA only" in caplog.text


def test_flashinfer_on_a_cpu_is_refused_with_the_reason_and_the_install_line():
    with pytest.raises(BackendUnavailableError, match="runs on CUDA only") as caught:
        ifkv.patch(shared_tiny_model("llama"), backend="flashinfer")
    assert "pip install -e '.[flashinfer]' in the clone of ifkv" in str(caught.value)


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(BackendUnavailableError, match="reference, flashinfer or 'auto'"):
        ifkv.patch(shared_tiny_model("llama"), backend="flash")


@pytest.mark.parametrize(
    ("dtype", "head_dims", "heads", "reason"),
    [
        (torch.float32, {128}, 32, "float32"),
        (torch.float64, {128}, 32, "float64"),
        (torch.bfloat16, {64, 96}, 32, "head_dim is 96"),
        (torch.bfloat16, {128}, 128, "128 query heads of 128, and FlashInfer merges at most 64"),
        (torch.bfloat16, {256}, 33, "merges at most 32"),
        (torch.bfloat16, {128}, 64, None),
        (torch.float16, {64, 256}, 32, None),
        (torch.float16, {64}, 128, None),
    ],
)
def test_models_without_kernels_are_refused(dtype, head_dims, heads, reason):
    refusal = availability.refusal_of_model(dtype, head_dims, heads)
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in refusal


@pytest.mark.parametrize(
    ("version", "fine"),
    [
        ("0.6.17", False),
        ("0.6.18", True),
        ("0.6.18.post1", True),
        ("0.7.2.post1", True),
        ("0.7.0rc1", True),
        ("0.8.0", False),
        ("1.0", False),
    ],
)
def test_versions_out_of_range_are_refused(version, fine):
    refusal = availability.refusal_of_version(version)
    assert (refusal is None) == fine
    assert fine or f"{version} is installed" in refusal


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise availability.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(BackendUnavailableError, match="not installed: pip install"):
        FlashInferBackend()


def test_a_package_that_breaks_on_import_is_a_refusal(monkeypatch):
    """With nvidia-cutlass-dsl beside it, FlashInfer asserts that there is a CUDA driver."""

    def broken(name):
        raise AssertionError("no driver")

    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.18.post1")
    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(BackendUnavailableError, match="AssertionError: no driver"):
        FlashInferBackend()


def test_a_package_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.3")
    with pytest.raises(BackendUnavailableError, match=r"0\.6\.3 is installed"):
        FlashInferBackend()


def test_all_that_ifkv_calls_is_there_in_the_standin():
    assert availability.refusal_of_module(FlashInferStandIn()) is None


@pytest.mark.parametrize("name", [name for name in availability.USED if "." not in name])
def test_a_module_without_a_function_is_refused_by_its_name(name):
    module = FlashInferStandIn()
    setattr(module, name, None)
    with pytest.raises(BackendUnavailableError, match=rf"has no {name}.*pip install"):
        FlashInferBackend(module)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, arguments in availability.USED.items()
        if name.endswith((".plan", ".run"))
        for argument in arguments
    ],
)
def test_a_module_without_an_argument_is_refused_by_its_name(name, argument):
    """As a release would be that renamed one: everything else is there."""
    import inspect

    module = FlashInferStandIn()
    wrapper, method = name.split(".")
    cls = getattr(module, wrapper)
    whole = inspect.signature(getattr(cls, method))

    def renamed(self, *args, **kwargs):
        raise AssertionError("called")

    renamed.__signature__ = whole.replace(
        parameters=[p for p in whole.parameters.values() if p.name != argument]
    )
    setattr(cls, method, renamed)
    with pytest.raises(BackendUnavailableError) as caught:
        FlashInferBackend(module)
    assert f"has no {name}({argument}=), which ifkv calls" in str(caught.value)


def test_every_argument_that_ifkv_hands_over_is_looked_for():
    """What the backend really calls with, caught on the way, is in the list."""
    module = FlashInferStandIn(relaxed=True)
    seen = set()

    def listening(inner, name):
        def listener(self, *args, **kwargs):
            seen.update((name, key) for key in kwargs)
            return inner(self, *args, **kwargs)

        return listener

    for name in availability.USED:
        if "." not in name:
            continue
        wrapper, method = name.split(".")
        cls = getattr(module, wrapper)
        setattr(cls, method, listening(getattr(cls, method), name))
    model = shared_tiny_model("llama")
    for mask in ("split", "positions"):
        backend = FlashInferBackend(module, mask=mask, workspace_bytes=2**20)
        answered(model, backend, max_new_tokens=2, do_sample=False)
    looked_for = {(name, key) for name, keys in availability.USED.items() for key in keys}
    assert seen
    assert seen <= looked_for, sorted(seen - looked_for)
