"""The method in bfloat16 through FlashInfer, within the floor of what plain attention loses.

On the stand-in everywhere, on FlashInfer itself under `pytest -m gpu`. Requests are long enough
for every kind of call, and for a Hopper GPU's own kernels.
"""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ifkv
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.testing import (
    assert_within_floor,
    tiny_model,
    truth_model,
)
from scenario import keys_of, values_of

PREFIX = [1, 2, 3, 4, 5]
PROMPT = list(range(20, 60))
FAMILIES = ["llama", "qwen3"]
FORMS = ("positions", "split")


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(97, (count,), generator=generator).tolist() for count in (190, 200, 130, 380)
    ]


def scattered(total: int) -> list[int]:
    """Most slots, with gaps, and a run of more than a tile."""
    return sorted({*range(7, total, 2), *range(300, 440), *range(620, total, 3)})


@functools.cache
def half_model(family: str, num_layers: int = 2) -> PreTrainedModel:
    return tiny_model(
        family,
        dtype=torch.bfloat16,
        num_layers=num_layers,
        hidden_size=64,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
    )


@functools.cache
def exact_model(family: str) -> PreTrainedModel:
    return truth_model(half_model(family))


@dataclass(frozen=True)
class Engine:
    """FlashInfer or its stand-in."""

    backends: dict[str, FlashInferBackend]
    device: str

    @functools.cache  # noqa: B019  # as long as the module's tests
    def model(self, family: str, num_layers: int = 2) -> PreTrainedModel:
        return copy.deepcopy(half_model(family, num_layers)).to(self.device)

    def __hash__(self) -> int:
        return id(self)


@pytest.fixture(scope="module", params=["standin", pytest.param("real", marks=pytest.mark.gpu)])
def engine(request: pytest.FixtureRequest) -> Engine:
    module, device = FlashInferStandIn(), "cpu"
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        module, device = pytest.importorskip("flashinfer"), "cuda"
    return Engine({mask: FlashInferBackend(module, mask=mask) for mask in FORMS}, device)


@dataclass(frozen=True)
class Outcome:
    """What a request led to, on the CPU."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    logits: Tensor


def outcome(
    model: PreTrainedModel, backend: str | FlashInferBackend, slots: Sequence[int]
) -> Outcome:
    """Documents prefilled, stitched, scored in all layers and recomputed with the prompt."""
    with ifkv.patch(model, backend=backend):
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, documents(), prefix=PREFIX))
        scores = ifkv.score(model, cache, PROMPT, layers=[0, 1])
        logits = ifkv.recompute(model, cache, slots, prompt_ids=PROMPT)
    assert logits is not None
    found = keys_of(cache), values_of(cache), scores, logits
    return Outcome(*(x.cpu() for x in found))


@functools.cache
def wanted(family: str, every_slot: bool) -> tuple[Outcome, Outcome]:
    """By the reference backend, which other tests prove: in bfloat16, and the truth."""
    slots = range(905) if every_slot else scattered(905)
    return tuple(outcome(m, "reference", slots) for m in (half_model(family), exact_model(family)))


def assert_floor(got: Outcome, plain: Outcome, truth: Outcome) -> None:
    for name in ("keys", "values", "scores", "logits"):
        measure = "max" if name in ("keys", "values") else "rms"
        trio = (getattr(x, name) for x in (got, plain, truth))
        assert_within_floor(*trio, what=name, measure=measure)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every_slot", [True, False])
def test_the_method_is_within_the_floor(
    engine: Engine, family: str, form: str, every_slot: bool
) -> None:
    slots = range(905) if every_slot else scattered(905)
    got = outcome(engine.model(family), engine.backends[form], slots)
    assert_floor(got, *wanted(family, every_slot))


def test_ratio_one_equals_full_prefill(engine: Engine) -> None:
    """By transformers' own forward."""
    model = engine.model("llama")
    got = outcome(model, engine.backends["positions"], range(905))
    ids = torch.tensor([[*PREFIX, *itertools.chain(*documents()), *PROMPT]])
    with torch.no_grad():
        plain = model(ids.to(engine.device)).logits[0, -1].cpu()
        truth = exact_model("llama")(ids).logits[0, -1]
    assert_within_floor(got.logits, plain, truth, what="logits", measure="rms")


def test_several_requests_are_those_of_one_by_one(engine: Engine) -> None:
    asked, slots = [PROMPT, PROMPT[:7]], [scattered(905), scattered(575)]
    found = []
    for model, backend in (
        (engine.model("llama"), engine.backends["positions"]),
        (half_model("llama"), "reference"),
        (exact_model("llama"), "reference"),
    ):
        with ifkv.patch(model, backend=backend):
            a, b, c, d = ifkv.prefill_documents(model, documents(), prefix=PREFIX)
            caches = ifkv.stitch_many(model, [[a, b, c, d], [d, a]])
            found.append(ifkv.recompute_many(model, caches, slots, prompts=asked))
    for index, trio in enumerate(zip(*found, strict=True)):
        trio = (x.cpu() for x in trio)
        assert_within_floor(*trio, what=f"logits of request {index}", measure="rms")


def test_decoding_steps_are_within_the_floor(engine: Engine) -> None:
    """Of three sequences that share a stitched context, as beams do."""
    steps = torch.tensor([[8, 9], [11, 60], [70, 2]])
    found = []
    for model, backend in (
        (engine.model("qwen3"), engine.backends["positions"]),
        (half_model("qwen3"), "reference"),
        (exact_model("qwen3"), "reference"),
    ):
        with ifkv.patch(model, backend=backend), torch.no_grad():
            cache = ifkv.stitch(model, ifkv.prefill_documents(model, documents(), prefix=PREFIX))
            ifkv.recompute(model, cache, scattered(905), prompt_ids=PROMPT)
            cache.batch_repeat_interleave(3)
            for step in steps.to(model.device).T:
                logits = model(step[:, None], past_key_values=cache).logits[:, -1]
        found.append(logits.cpu())
    assert_within_floor(*found, what="logits", measure="rms")


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generate_runs_to_its_end(engine: Engine, how: dict[str, int]) -> None:
    model = engine.model("llama")
    with ifkv.patch(model, backend=engine.backends["positions"]):
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, documents(), prefix=PREFIX))
        kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = ifkv.generate(model, cache, PROMPT, **kwargs, **how)
    assert out.shape == (how.get("num_return_sequences", 1), len(PROMPT) + 6)


@pytest.mark.parametrize("form", FORMS)
def test_eight_bit_caches_stay_near_the_wide_ones(engine: Engine, form: str) -> None:
    """A few per cent: what e4m3 costs, and far from what a lost scale would."""
    model = engine.model("llama")
    logits = []
    with ifkv.patch(model, backend=engine.backends[form]):
        made = ifkv.prefill_documents(model, documents(), prefix=PREFIX)
        for dtype in (None, torch.float8_e4m3fn):
            cache = ifkv.stitch(model, made, kv_dtype=dtype)
            found = ifkv.recompute(model, cache, scattered(905), prompt_ids=PROMPT)
            assert found is not None
            logits.append(found.double())
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.1


def waits(step: Callable[[], Any]) -> tuple[int, Any]:
    """How often torch waits for the GPU in a step, and what the step returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught), result


def waits_of_a_request(num_layers: int) -> list[int]:
    """In stitching, scoring and recomputing, once everything has been compiled."""
    model = copy.deepcopy(half_model("llama", num_layers)).to("cuda")
    slots = scattered(905)
    with ifkv.patch(model, backend="flashinfer"):
        made = ifkv.prefill_documents(model, documents(), prefix=PREFIX)
        for _ in range(2):
            stitching, cache = waits(lambda: ifkv.stitch(model, made))
            scoring, _ = waits(lambda c=cache: ifkv.score(model, c, PROMPT, layers=[0, -1]))
            recomputing, _ = waits(
                lambda c=cache: ifkv.recompute(model, c, slots, prompt_ids=PROMPT)
            )
    return [stitching, scoring, recomputing]


@pytest.mark.gpu
def test_no_layer_waits_for_the_host() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("flashinfer")
    noticed, _ = waits(lambda: torch.ones(1, device="cuda").item())
    assert noticed, "torch no longer warns of waiting"
    few, many = (waits_of_a_request(num_layers) for num_layers in (2, 6))
    assert few == many, "stitching, scoring and recomputing"
