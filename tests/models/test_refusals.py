"""Every text decoder that transformers knows is supported, or refused with a reason of its own."""

from types import SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ifkv
from ifkv.errors import UnsupportedModelError
from ifkv.models.families import families, family_of, reasons

SUPPORTED = {each for family in families().values() for each in family.model_types}
REFUSED = reasons()


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_no_decoder_of_transformers_is_unknown(model_type: str) -> None:
    config = SimpleNamespace(model_type=model_type)
    if model_type in SUPPORTED:
        assert model_type in family_of(config, "it").model_types
        return
    with pytest.raises(UnsupportedModelError, match=f"{model_type}', which ") as caught:
        family_of(config, "it")
    assert REFUSED[model_type].reason in str(caught.value)
    assert "no family covers" not in str(caught.value)


def test_nothing_is_both_supported_and_refused() -> None:
    assert not SUPPORTED & set(REFUSED)
    assert {refusal.kind for refusal in REFUSED.values()} == {"never", "not yet"}


KINDS = {
    "qwen3_next": "recurrent",
    "gpt2": "learned embeddings",
    "bloom": "ALiBi",
    "deepseek_v3": "not supported yet: it needs latents",
    "gemma3n_text": "keys of other layers",
    "llama4_text": "chunks",
    "glm_moe_dsa": "sparse",
    "hunyuan_v1_dense": "behind the rotation",
}


@pytest.mark.parametrize(("model_type", "word"), KINDS.items())
def test_the_reason_says_what_is_in_the_way(model_type: str, word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        family_of(SimpleNamespace(model_type=model_type), "it")


def test_a_refusal_comes_before_any_work() -> None:
    config = AutoConfig.for_model(
        "glm4",
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=32,
        vocab_size=50,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    before = dict(model.config.to_dict())
    with pytest.raises(UnsupportedModelError, match="interleaved rotation"):
        ifkv.patch(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("model_type", ["exaone", "internlm3", "iquestcoder"])
def test_further_names_of_llama(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this release of transformers does not know it")
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        vocab_size=50,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert family_of(model.config, "it").name == "llama"
    with ifkv.patch(model):
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, [[1, 2, 3], [4, 5]]))
        logits = ifkv.recompute(model, cache, range(5), prompt_ids=[6])
    assert logits is not None
