"""Silent traps of transformers' attention interfaces; each test is named after what goes wrong."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel

import ifkv
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    dense_prefill,
    dense_recompute,
    dense_scores,
    dense_stitched,
    tiny_model,
)

PREFIX = [1, 2]
DOCUMENTS = [[3, 14, 15, 92, 6], [53, 58, 9], [79, 32, 38, 46]]
PROMPT = [26, 43, 38, 32]
IDS = torch.tensor([[5, 9, 33, 2, 71, 40], [11, 60, 3, 3, 22, 90]])


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built = tiny_model("llama")
    built.set_attn_implementation(request.param)
    return built


def stitched(model: PreTrainedModel, geometry: str = "global") -> ifkv.StitchedCache:
    documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
    return ifkv.stitch(model, documents, geometry=geometry)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_t1_attention_without_mask_function_drops_the_padding_mask(implementation: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)  # eager masks float64 to NaN by itself
    model.set_attn_implementation(implementation)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = model(IDS, attention_mask=mask).logits
    unpadded = model(IDS).logits
    assert (expected - unpadded).abs().max() > 0.1, "this mask makes no difference"
    with ifkv.patch(model):
        logits = model(IDS, attention_mask=mask).logits
    assert_bit_equal(logits, expected, what="padded logits")


def test_t1_an_attention_registered_without_a_mask_keeps_getting_none() -> None:
    """What a user registered alone is delegated to as it was: with no mask."""
    seen = []

    def lonely(module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(attention_mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("lonely", lonely)
    try:
        model = tiny_model("llama", num_layers=1)
        model.set_attn_implementation("lonely")
        with ifkv.patch(model):
            model(IDS, attention_mask=torch.ones_like(IDS))
    finally:
        del AttentionInterface._global_mapping["lonely"]
    assert seen == [None]


def test_t2_several_rows_behind_a_cache_are_masked_from_the_top_left(
    model: PreTrainedModel,
) -> None:
    """Rows of a prompt over a stitched cache see all of the context, and one another causally."""
    with ifkv.patch(model):
        cache = stitched(model)
        at_once = model(torch.tensor([PROMPT]), past_key_values=cache.clone()).logits[0]
        one_by_one = [
            model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0] for token in PROMPT
        ]
    # Eager's softmax rounds to float32 even in a float64 model.
    assert_close(at_once, torch.stack(one_by_one), what="logits of several rows", tolerance=1e-5)
    oracle = dense_stitched(model, PREFIX, DOCUMENTS)
    expected = dense_recompute(model, oracle, [], PROMPT).logits
    assert_close(at_once, expected, what="logits over the stitched cache", tolerance=1e-5)


def test_t3_positions_that_jump_are_taken_for_packed_sequences(model: PreTrainedModel) -> None:
    """Scattered rows are no packed sequences: each sees everything before it."""
    slots = [5, 6, 9, 13]
    with ifkv.patch(model):
        cache = stitched(model)
        logits = ifkv.recompute(model, cache, slots, prompt_ids=PROMPT)
    assert logits is not None
    context = dense_stitched(model, PREFIX, DOCUMENTS)
    expected = dense_recompute(model, context, slots, PROMPT)
    assert_close(logits, expected.logits[-1], what="logits behind scattered rows")
    for index, layer in enumerate(cache.layers):
        assert_close(layer.values[0], expected.values[index], what=f"values of layer {index}")


@pytest.mark.parametrize("geometry", ["global", "hl-hp", "tl-tp", "hl-tp"])
def test_t4_masks_are_built_from_slots_whatever_the_positions(
    model: PreTrainedModel, geometry: str
) -> None:
    """Where positions overlap or equal the query's, the query still sees every slot."""
    with ifkv.patch(model):
        cache = stitched(model, geometry)
        scores = ifkv.score(model, cache, PROMPT, layers=[0, 1, 2])
    start = cache.query_position
    expected = dense_scores(
        model,
        dense_stitched(model, PREFIX, DOCUMENTS),
        PROMPT,
        layers=[0, 1, 2],
        key_positions=cache.positions,
        query_positions=range(start, start + len(PROMPT)),
    )
    assert_close(scores, expected.float(), what=f"scores in geometry {geometry}")
    assert (scores > 0).all()


def test_t4_windows_count_from_the_query_over_a_global_cache() -> None:
    """A windowed model's prompt over a fully recomputed cache equals its full prefill."""
    model = tiny_model("mistral", sliding_window=5)
    with ifkv.patch(model):
        cache = stitched(model)
        rows = range(7, cache.context_length)
        logits = ifkv.recompute(model, cache, rows, prompt_ids=PROMPT)
        by_hand = stitched(model)
        ifkv.recompute(model, by_hand, rows)
        native = model(torch.tensor([PROMPT]), past_key_values=by_hand).logits[0, -1]
    expected = dense_prefill(model, [*cache.token_ids.tolist(), *PROMPT]).logits[-1]
    assert logits is not None
    assert_close(logits, expected, what="logits of the fused forward")
    assert_close(native, expected, what="logits of the model's own forward")


HALVINGS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half()": lambda m: m.half(),
    "half().float()": lambda m: m.half().float(),
    "to(bfloat16).double()": lambda m: m.to(torch.bfloat16).double(),
}


@pytest.mark.parametrize("halving", HALVINGS)
@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_t5_casting_the_model_rounds_its_frequencies(halving: str, rope: str) -> None:
    model = HALVINGS[halving](tiny_model("llama", dtype=torch.float32, rope=rope))
    with pytest.raises(ifkv.IfkvError, match=r"inv_freq.*half precision.*from_pretrained"):
        ifkv.patch(model)


@pytest.mark.parametrize("halving", HALVINGS)
def test_t5_casting_a_patched_model_is_noticed(halving: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        HALVINGS[halving](model)
        for call in (
            lambda: ifkv.prefill_documents(model, DOCUMENTS),
            lambda: ifkv.stitch(model, documents),
            lambda: ifkv.score(model, cache, PROMPT),
            lambda: ifkv.recompute(model, cache, [3]),
            lambda: ifkv.generate(model, cache, PROMPT),
        ):
            with pytest.raises(ifkv.IfkvError, match=r"half precision|belongs to model"):
                call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_a_model_loaded_in_half_precision_is_welcome(dtype: torch.dtype) -> None:
    """from_config(dtype=) and from_pretrained(dtype=) keep the frequencies in float32."""
    with ifkv.patch(model := tiny_model("llama", dtype=dtype)):
        assert stitched(model).layers[0].keys.dtype == dtype


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_t6_gradient_checkpointing_in_training_mode_drops_the_cache() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    with ifkv.patch(model):
        cache = stitched(model)
        expected = copy.deepcopy(cache)
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        model.train()
        for call in (
            lambda: ifkv.prefill_documents(model, DOCUMENTS),
            lambda: ifkv.stitch(model, documents),
            lambda: ifkv.score(model, cache, PROMPT),
            lambda: ifkv.reorder(model, documents, PROMPT),
            lambda: ifkv.recompute(model, cache, [3]),
            lambda: ifkv.generate(model, cache, PROMPT),
            lambda: ifkv.patch(model),
        ):
            with pytest.raises(ifkv.IfkvError, match=r"training mode.*model\.eval\(\)"):
                call()
        for layer, before in zip(cache.layers, expected.layers, strict=True):
            assert_bit_equal(layer.keys, before.keys, what="keys after refusals")
        model.eval()  # checkpointing alone does no harm
        assert ifkv.score(model, cache, PROMPT).shape == (cache.context_length,)
