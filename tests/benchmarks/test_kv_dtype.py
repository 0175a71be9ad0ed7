"""The measurement of 8-bit keys and values, on a tiny model."""

import pytest
import torch

import ifkv
import kv_dtype
from ifkv.testing import tiny_model, tiny_tokenizer


def test_it_measures_each_way_at_each_ratio():
    tokenizer = tiny_tokenizer()
    models = {
        dtype: tiny_model(
            vocab_size=len(tokenizer), max_position_embeddings=4096, dtype=dtype, eos_token_id=None
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    for model in models.values():
        ifkv.patch(model)
    rows = kv_dtype.measure(models, tokenizer, 1, 2, 3, ratios=(0.0, 0.15))
    assert [(row["ratio"], row["way"]) for row in rows] == [
        (ratio, name) for ratio in (0.0, 0.15) for name, _, _ in kv_dtype.WAYS
    ]
    assert all(0 < row["kl"] <= row["worst_kl"] < 1 for row in rows)
    table = kv_dtype.as_markdown(
        dict.fromkeys(("model", "date", "torch", "transformers", "questions", "passages", "new")),
        rows,
    )
    assert table.count("\n| 0.15 | ") == len(kv_dtype.WAYS)


def test_the_same_logits_differ_in_nothing_and_a_constant_does_not_count():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    same = kv_dtype.compared(logits + 3, logits)
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["logit_error"] == pytest.approx(0, abs=1e-6)
    assert same["same_top"] == 1
    p, q = logits.softmax(-1), (-logits).softmax(-1)
    other = kv_dtype.compared(-logits, logits)
    assert other["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert other["logit_error"] == pytest.approx(2)
    assert other["same_top"] == 0
