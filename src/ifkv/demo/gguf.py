"""Conversion of a Llama model's GGUF file to a folder that transformers loads.

transformers reads GGUF too, but it needs a further package, and its versions disagree on the
tokenizer: 5.4 makes this one CodeLlama's. A conversion that is kept must not depend on the version
that made it, so the few facts are written down here. The `gguf` package dequantizes the weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifkv.errors import InvalidInputError

# Names of a Llama model's tensors, llama.cpp's and transformers'.
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Write weights in float32, config and tokenizer to a folder.

    Args:
        source: A GGUF file of a Llama model with a byte-level BPE tokenizer of SmolLM's kind.
        folder: Made if it does not exist.

    Raises:
        ImportError: The package `gguf` is not installed.
        InvalidInputError: The file holds another kind of model or tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    for name, expected in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if facts.get(name) != expected:
            raise InvalidInputError(
                f"{source} has {name} = {facts.get(name)!r}; only {expected!r} is converted."
            )
    folder.mkdir(parents=True, exist_ok=True)
    weights = read_weights(reader, facts)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _save_config(facts, folder, tied="lm_head.weight" not in weights)
    build_tokenizer(facts).save_pretrained(folder)


def read_weights(reader: Any, facts: dict[str, Any]) -> dict[str, Tensor]:
    """Dequantize all tensors.

    Args:
        reader: A `gguf.GGUFReader`.
        facts: Its metadata.

    Returns:
        Float32 tensors by their names in transformers.
    """
    from gguf import dequantize

    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = torch.from_numpy(np.ascontiguousarray(values))
        # The rows of a head in GGUF are pairs (0, 1), (2, 3), ... for an interleaved rotation;
        # transformers rotates the first half of a head's rows against the second.
        if found := re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", tensor.name):
            heads = facts["llama.attention.head_count" + ("_kv" if found[1] == "k" else "")]
            paired = weight.reshape(heads, -1, 2, weight.shape[1])  # [heads, head_dim / 2, 2, in]
            weight = paired.transpose(1, 2).reshape(weight.shape)
        weights[_name(tensor.name)] = weight
    return weights


def _name(name: str) -> str:
    """Return a tensor's name in transformers."""
    stem, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        if known := _LAYER.get(found[2]):
            return f"model.layers.{found[1]}.{known}.{kind}"
    elif known := _OUTER.get(stem):
        return f"{known}.{kind}"
    raise InvalidInputError(f"the tensor {name!r} belongs to no plain Llama model.")


def _save_config(facts: dict[str, Any], folder: Path, *, tied: bool) -> None:
    """Write config and generation config."""
    from transformers import GenerationConfig, LlamaConfig

    ends = {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **ends,
    )
    config.save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)


def build_tokenizer(facts: dict[str, Any]) -> Any:
    """Build the tokenizer that a GGUF file's metadata describes.

    Args:
        facts: Metadata of a file whose `tokenizer.ggml.pre` is "smollm": GPT-2's byte-level BPE,
            with every digit a token.

    Returns:
        A `PreTrainedTokenizerFast` with the file's chat template. It adds no special tokens.
    """
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    kinds: list[int] = facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[facts["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[facts["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[facts["tokenizer.ggml.unknown_token_id"]],
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    return tokenizer
