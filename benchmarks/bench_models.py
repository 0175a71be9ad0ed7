"""Models that the benchmarks run on, and contexts of a given length for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ifkv.demo.corpus import load_corpus
from ifkv.demo.model import load_demo_model, prepare_demo_model
from ifkv.session.prompt_format import PromptFormat

# Qwen3-0.6B, from its published configuration.
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# Name on the command line: name in tables.
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "qwen3": "Qwen3-0.6B shape, random weights",
    "tiny": "tiny model of the tests",
}


def load(name: str, dtype: torch.dtype) -> tuple[Any, PromptFormat]:
    """Load an unpatched model and its prompt format.

    A model with random weights gives meaningless answers, but takes as long as a trained one. It
    uses the demo's tokenizer, whose ids are all in its vocabulary.
    """
    if name == "smollm2":
        model, tokenizer = load_demo_model(dtype=dtype)
        return model, PromptFormat(tokenizer)
    if name == "tiny":
        from ifkv.testing import tiny_model, tiny_tokenizer

        tokenizer = tiny_tokenizer()
        options = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
        return tiny_model("qwen3", dtype=dtype, **options), PromptFormat(tokenizer)
    if name != "qwen3":
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(MODELS)}.")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**QWEN3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(prepare_demo_model())
    return model.eval(), PromptFormat(tokenizer)


def context_of(model: Any, layout: PromptFormat, length: int) -> tuple[list[list[int]], list[int]]:
    """Return passages that fill a context of ``length`` tokens, prefix included, and a prompt.

    The last passage is cut. The context is shorter if the model has too few positions.
    """
    corpus = load_corpus()
    prompt = list(layout.prompt_ids(corpus.questions[0].text))
    room = min(length, model.config.max_position_embeddings - len(prompt))
    room -= len(layout.prefix_ids())
    if room <= 0:
        raise ValueError(
            f"a context of {length} tokens has no room for a document behind the prefix."
        )
    documents: list[list[int]] = []
    edition = 1
    while room > 0:
        # The corpus is shorter than 4k tokens: repeat it, with a heading that tells copies apart.
        heading = f"Edition {edition}. " if edition > 1 else ""
        for passage in corpus.passages:
            ids = list(layout.document_ids(heading + passage.text))[:room]
            documents.append(ids)
            room -= len(ids)
            if room <= 0:
                break
        edition += 1
    return documents, prompt
