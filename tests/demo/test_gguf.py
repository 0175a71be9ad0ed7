"""A tiny Llama model written as GGUF comes back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ifkv.demo.gguf as conversion
from ifkv.demo.gguf import convert
from ifkv.errors import InvalidInputError
from ifkv.testing import tiny_model, tiny_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def as_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put rows i and i + head_dim / 2 of each head side by side, as llama.cpp keeps q and k."""
    rows = []
    for head in weight.chunk(heads):
        half = len(head) // 2
        rows += [row for i in range(half) for row in (head[i], head[half + i])]
    return torch.stack(rows)


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> None:
    config = model.config
    tokenizer = tiny_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "in"]
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    )
    writer.add_token_merges(["i n"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_pad_token_id(3)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {theirs: ours for ours, theirs in conversion._LAYER.items()}
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if found := stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{inner[rest]}"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if found and (count := heads.get(stem.split(".")[-1])):
            weight = as_llama_cpp(weight, count)
        data = weight.numpy()
        if data.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(
                outer.get(stem, stem) + ".weight", quantize(data, kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(outer.get(stem, stem) + ".weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small(**options: Any) -> Any:
    return tiny_model("llama", dtype=torch.float32, vocab_size=len(tiny_tokenizer()) + 1, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_with_every_weight_and_its_logits(tmp_path: Path, tied: bool) -> None:
    model = small(tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", model)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.generation_config.eos_token_id == 3


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    model = small(hidden_size=64, intermediate_size=64)
    kind = GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "m.gguf", model, kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = dequantize(quantize(model.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(loaded.state_dict()[name], torch.from_numpy(expected))


def test_the_tokenizer_keeps_its_template_and_adds_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", small())
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == small().config.max_position_embeddings
    for text in ("naïve 漢字, 1987  4", "<|im_start|>user<|im_end|>", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("in 12") == ["in", "Ġ", "1", "2"]
    assert tokenizer("<|im_start|>a").input_ids[0] == 2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("change", [{"architecture": "gemma"}, {"pre": "llama-bpe"}])
def test_another_architecture_or_tokenizer_is_refused(
    tmp_path: Path, change: dict[str, str]
) -> None:
    write_gguf(tmp_path / "m.gguf", small(), **change)
    with pytest.raises(InvalidInputError, match=r"only .* is converted"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="attn_q_norm"):
        conversion._name("blk.0.attn_q_norm.weight")
