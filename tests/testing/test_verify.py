"""`verify`: right models pass in every dtype and quantization, wrong computations do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

import ifkv
from ifkv.errors import UnsupportedModelError
from ifkv.models.families import families
from ifkv.steps.rows_pass import RowsPass
from ifkv.testing import FAMILIES as ALL_FAMILIES
from ifkv.testing import ROUTED_FAMILIES, tiny_model
from ifkv.testing import SLIDING_FAMILIES as ALL_SLIDING
from ifkv.testing.verify import LawResult, verify
from quantized_layers import EightBitLinear, FourBitLinear, MetaLinear, with_layers
from tried import FAMILIES

HALVES = [torch.bfloat16, torch.float16]


class RoundedTogether(MetaLinear):
    """Activations in 8 bits by one scale for all rows, so that rows depend on their neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax() / 127
        return super().forward((x / scale).round() * scale)


def results(model: Any) -> dict[str, LawResult]:
    return {result.law: result for result in verify(model, length=16)}


def broken(model: Any) -> list[str]:
    return [law for law, result in results(model).items() if not result.holds]


def tiny(family: str = "llama", **options: Any) -> Any:
    return tiny_model(family, **({"dtype": torch.float32, "num_layers": 3} | options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_model_passes(family: str, dtype: torch.dtype) -> None:
    found = results(tiny(family, dtype=dtype))
    assert all(result.holds for result in found.values())
    assert any("scores" in law for law in found)
    tolerances = {result.tolerance for result in found.values()}
    if dtype == torch.float32 and family not in ROUTED_FAMILIES:
        assert tolerances == {0.0, 1e-5}
    if dtype == torch.float32:
        assert max(tolerances) < 5e-5


FLOAT32_ROUTERS = [name for name, f in families().items() if f.experts == "routed-in-float32"]


@pytest.mark.parametrize("family", FLOAT32_ROUTERS)
def test_a_router_in_float32_bounds_what_float64_can_be_asked(family: str) -> None:
    """The model's own prefill, cut in pieces, differs from itself by this much."""
    found = results(tiny(family, dtype=torch.float64, wide_norms=False))
    assert all(result.holds for result in found.values())
    assert max(result.tolerance for result in found.values()) < 2e-5


OTHERS = [family for family in ALL_FAMILIES if family not in FAMILIES]


@pytest.mark.parametrize("family", OTHERS)
def test_every_further_family_passes_in_float64(family: str) -> None:
    """One dtype, when the other tests run on one family of each arithmetic alone."""
    window = dict(sliding_window=9) if family in ALL_SLIDING else {}
    assert broken(tiny(family, dtype=torch.float64, **window)) == []


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tokens_that_are_as_good_as_equally_likely_break_no_law(dtype: torch.dtype) -> None:
    for seed in range(4):
        model = tiny(dtype=dtype, seed=seed)
        head = model.lm_head.weight.data
        head[1:] = head[0] * (1 + 1e-3 * torch.arange(1, len(head))[:, None] / len(head))
        assert broken(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [RoundedTogether, MetaLinear, FourBitLinear, EightBitLinear])
def test_a_quantized_model_is_measured_by_itself(kind: Any, dtype: torch.dtype) -> None:
    found = results(with_layers(tiny(dtype=dtype), kind))
    assert all(result.holds for result in found.values())
    if kind is RoundedTogether:
        worst = max(result.error for result in found.values())
        assert worst > 1e-3, "its rows depend on their neighbours"
        assert max(result.tolerance for result in found.values()) < 0.5


def forgetful(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return keys, values


@pytest.mark.parametrize("kind", [None, RoundedTogether, FourBitLinear])
def test_rows_that_are_not_written_are_noticed(
    kind: Callable[[nn.Linear], nn.Module] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny() if kind is None else with_layers(tiny(), kind)
    monkeypatch.setattr(RowsPass, "update", forgetful)
    assert "everything recomputed: logits equal full prefill's" in broken(model)


@pytest.mark.parametrize("change", [lambda s: s.flip(0), lambda s: s * 1.01])
def test_wrong_scores_are_noticed(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ifkv.testing.verify.score", lambda *args, **kwargs: change(ifkv.score(*args, **kwargs))
    )
    assert broken(tiny()) == [
        "scores are the norms of the attentions that the model itself computes"
    ]


@pytest.mark.parametrize("where", ["a layer", "all"])
def test_an_offloaded_model_is_refused_in_words(where: str) -> None:
    model = tiny()
    (model if where == "all" else model.base_model.layers[1]).to("meta")
    with pytest.raises(UnsupportedModelError, match=r"not in memory.*from_pretrained"):
        next(iter(verify(model)))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny()
    before = model.config._attn_implementation, set(AttentionInterface._global_mapping)
    list(verify(model, length=16))
    assert before == (model.config._attn_implementation, set(AttentionInterface._global_mapping))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ifkv.IfkvError, match="not patched"):
        ifkv.prefill_documents(model, [[1, 2]])
