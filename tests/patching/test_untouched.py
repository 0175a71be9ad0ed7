"""A patched model's ``model(...)`` and ``model.generate(...)`` are bit for bit what they were."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import ifkv
from ifkv.testing import assert_bit_equal, tiny_model

IDS = torch.tensor([[5, 9, 33, 2, 71, 40, 8], [11, 60, 3, 3, 22, 90, 17]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1]])
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
BANDED = (CAUSAL & ~torch.ones(7, 7, dtype=torch.bool).tril(-3))[None, None].expand(2, 1, 7, 7)
ADDED = torch.zeros(2, 1, 7, 7).masked_fill(~BANDED, torch.finfo(torch.float32).min)


def continued(model: PreTrainedModel, cache: Any) -> list[Any]:
    """Prefill, a chunk of several rows behind it, and one row behind that."""
    return [
        model(IDS[:, part], past_key_values=cache, attention_mask=torch.ones(2, part.stop).long())
        for part in (slice(0, 3), slice(3, 6), slice(6, 7))
    ] + [cache]


def generated(model: PreTrainedModel, **options: Any) -> Any:
    torch.manual_seed(0)
    options = dict(max_new_tokens=5, attention_mask=LEFT, pad_token_id=0) | options
    return model.generate(IDS, return_dict_in_generate=True, output_logits=True, **options)


CALLS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "plain": lambda m: m(IDS),
    "padded left": lambda m: m(IDS, attention_mask=LEFT),
    "padded right": lambda m: m(IDS, attention_mask=RIGHT),
    "padded within": lambda m: m(IDS, attention_mask=HOLES),
    "mask of four dimensions, boolean": lambda m: m(IDS, attention_mask=BANDED),
    "mask of four dimensions, added": lambda m: m(IDS, attention_mask=ADDED),
    "packed positions": lambda m: m(
        IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2), use_cache=False
    ),
    "hidden states": lambda m: m(IDS, attention_mask=LEFT, output_hidden_states=True),
    "embeddings": lambda m: m(inputs_embeds=m.get_input_embeddings()(IDS), attention_mask=LEFT),
    "without cache": lambda m: m(IDS, attention_mask=LEFT, use_cache=False),
    "last logits only": lambda m: m(IDS, logits_to_keep=1),
    "dynamic cache": lambda m: continued(m, DynamicCache()),
    "dynamic cache of the config": lambda m: continued(m, DynamicCache(config=m.config)),
    "static cache": lambda m: continued(m, StaticCache(config=m.config, max_cache_len=16)),
    "the stack alone": lambda m: m.base_model(IDS, attention_mask=LEFT),
    "generate": generated,
    "generate, sampled": lambda m: generated(m, do_sample=True, temperature=0.7, top_k=9),
    "generate, beams": lambda m: generated(m, num_beams=3, do_sample=False),
    "generate, without cache": lambda m: generated(m, use_cache=False),
    "generate, static cache": lambda m: generated(m, cache_implementation="static"),
    "generate, prompt lookup": lambda m: m.generate(
        IDS[:1], max_new_tokens=5, prompt_lookup_num_tokens=2, do_sample=False
    ),
}
EAGER_CALLS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "attentions": lambda m: m(IDS, attention_mask=LEFT, output_attentions=True),
    "generate, attentions": lambda m: generated(m, output_attentions=True),
}


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an output, a cache's rows included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
    elif hasattr(value, "layers"):
        for layer in value.layers:
            yield from (layer.keys.clone(), layer.values.clone())


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["llama", "qwen3, window 3"])
def model(request: pytest.FixtureRequest, implementation: str) -> PreTrainedModel:
    family, _, window = request.param.partition(", window ")
    built = tiny_model(
        family, dtype=torch.float32, sliding_window=int(window) if window else None, num_layers=2
    )
    built.set_attn_implementation(implementation)
    return built


def assert_same(got: Any, expected: Any, when: str) -> None:
    parts, wanted = list(tensors(got)), list(tensors(expected))
    assert len(parts) == len(wanted) > 0
    for index, (part, want) in enumerate(zip(parts, wanted, strict=True)):
        assert_bit_equal(part, want, what=f"tensor {index} {when}")


@pytest.mark.parametrize("call", CALLS | EAGER_CALLS)
def test_calls_are_bit_identical_before_during_and_after(
    model: PreTrainedModel, implementation: str, call: str
) -> None:
    run = (CALLS | EAGER_CALLS)[call]
    if call in EAGER_CALLS and implementation != "eager":
        model.set_attn_implementation("eager")  # only eager has weights to give
    with torch.no_grad():
        before = run(model)
        with ifkv.patch(model):
            ifkv.prefill_documents(model, [[1, 2, 3]])  # a pass of ifkv's own leaves nothing behind
            during = run(model)
        after = run(model)
    model.set_attn_implementation(implementation)
    assert_same(during, before, "while patched")
    assert_same(after, before, "after unpatching")


def test_attentions_come_out_while_patched() -> None:
    """Not an empty tuple, which transformers gives without a word where weights are missing."""
    model = tiny_model("llama", num_layers=2)
    model.set_attn_implementation("eager")
    with ifkv.patch(model):
        attentions = model(IDS, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 4, 7, 7)] * 2


def test_gradients_flow_as_before() -> None:
    """Nobody trains through a patch on purpose; saliency maps, though, are taken in eval mode."""
    model = tiny_model("llama", num_layers=2)
    embeddings = model.get_input_embeddings()(IDS).clone().requires_grad_()

    def gradient() -> Tensor:
        out = model(inputs_embeds=embeddings, use_cache=False).logits.square().sum()
        return torch.autograd.grad(out, embeddings)[0]

    before = gradient()
    with ifkv.patch(model):
        during = gradient()
    assert_bit_equal(during, before, what="gradient while patched")
