"""Models that do something else than what was read: refused where it shows, named where it may."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import CohereForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import ifkv
from ifkv.backends.reference import ReferenceBackend
from ifkv.backends.spec import AttentionSpec
from ifkv.errors import UnsupportedModelError, UpstreamWarning
from ifkv.models.families import families
from ifkv.patching import functions
from ifkv.patching.attention_keywords import strange_keywords
from ifkv.testing import assert_bit_equal, tiny_model
from tried import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PREFIX = [1, 2]
DOCUMENTS = [[3, 14, 15, 92, 6], [53, 58, 9]]
IDS = torch.tensor([[5, 9, 33, 2]])


def asking(**asked: Any) -> type[nn.Module]:
    """An attention of the name that the family expects, which asks for something more."""

    class LlamaAttention(modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs | asked)

    return LlamaAttention


class Lonely(modeling_llama.LlamaDecoderLayer):
    """A layer that keeps to itself."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        return hidden_states + self.mlp(self.input_layernorm(hidden_states))


class LlamaAttention(modeling_llama.LlamaAttention):
    """An attention that takes the cache and attends by itself."""

    def forward(self, hidden_states: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        keys = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        values = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cache = kwargs.get("cache") or kwargs["past_key_values"]
        cache.update(keys, values, self.layer_idx)
        return self.o_proj(self.q_proj(hidden_states)), None


def llama(**options: Any) -> Any:
    return tiny_model("llama", num_layers=2, **options)


def become(modules: Any, kind: type[nn.Module]) -> None:
    for module in modules:
        module.__class__ = kind


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def refused(model: Any, message: str) -> None:
    """Have a patch that warns, and a first pass that is refused."""
    with pytest.warns(UpstreamWarning):
        ifkv.patch(model)
    with pytest.raises(UnsupportedModelError, match=message):
        ifkv.prefill_documents(model, DOCUMENTS)
    ifkv.unpatch(model)


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "no softcap": (dict(softcap=0.0), r"softcap=0\.0"),
    "a softcap in words": (dict(softcap="small"), "softcap='small'"),
    "sinks of another shape": (dict(s_aux=torch.zeros(4, 1)), "s_aux=a Tensor"),
    "sinks in words": (dict(s_aux="none"), "s_aux='none'"),
    "a flag": (dict(is_causal=False), "is_causal=False"),
    "dropout": (dict(dropout=0.1), r"dropout=0\.1"),
    "a name nobody has heard of": (dict(temperature=2), "temperature=2"),
    "no window": (dict(sliding_window=0), "sliding_window=0"),
    "a window in words": (dict(sliding_window="wide"), "sliding_window='wide'"),
    "attentions": (dict(output_attentions=True), "output_attentions=True"),
}


@pytest.mark.parametrize("what", ASKED)
def test_an_attention_s_keyword_that_is_not_known_is_refused(what: str) -> None:
    asked, message = ASKED[what]
    if "dropout" in asked:  # the class gives it by itself

        class LlamaAttention(modeling_llama.LlamaAttention):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                self.training = True
                return super().forward(*args, **kwargs)

        kind: Any = LlamaAttention
    else:
        kind = asking(**asked)
    model = llama(attention_dropout=0.1)
    become(attentions(model), kind)
    with pytest.warns(UpstreamWarning, match=r"LlamaAttention.*ifkv verify"):
        ifkv.patch(model)
    with pytest.raises(
        UnsupportedModelError, match=rf"LlamaAttention of layer 0 asks .*{message}.*not leave out"
    ):
        ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
    ifkv.unpatch(model)


@pytest.fixture
def facts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families of Gemma 2 and gpt-oss that somebody has written without reading their code."""
    written = (ROOT / "patches" / "qwen2.toml").read_text(encoding="utf-8")
    for model_type, kind in (("gemma2", "Gemma2"), ("gpt_oss", "GptOss")):
        text = written.replace("qwen2", model_type).replace("Qwen2", kind)
        (tmp_path / f"{model_type}.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr("ifkv.models.families._folder", lambda: tmp_path)
    families.cache_clear()
    yield
    families.cache_clear()


def foreign(model_type: str, **options: Any) -> Any:
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        sliding_window=4,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.usefixtures("facts_alone")
def test_a_family_of_facts_alone_is_not_enough() -> None:
    with pytest.raises(UnsupportedModelError, match=r"final_logit_softcapping = 30\.0, but"):
        ifkv.patch(foreign("gemma2"))
    uncapped = foreign("gemma2", final_logit_softcapping=None)
    with pytest.warns(UpstreamWarning):
        ifkv.patch(uncapped, backend=_Recorder())  # which has no features
    with pytest.raises(UnsupportedModelError, match=r"a layer attends with softcap \(50\.0\)"):
        ifkv.prefill_documents(uncapped, DOCUMENTS)
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(UnsupportedModelError, match="GptOssRotaryEmbedding turns dimensions"):
        ifkv.patch(foreign("gpt_oss", **experts))


@pytest.mark.parametrize(
    "asked", [dict(softcap=None), dict(s_aux=None), dict(output_attentions=False)]
)
def test_a_keyword_that_says_nothing_is_let_through(asked: dict[str, Any]) -> None:
    model = llama()
    become(attentions(model), asking(**asked))
    with pytest.warns(UpstreamWarning), ifkv.patch(model):
        assert len(ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)) == 2


def test_the_scaling_must_be_a_number() -> None:
    model = llama()
    for attention in attentions(model):
        attention.scaling = None
    with ifkv.patch(model), pytest.raises(UnsupportedModelError, match="scaling=None"):
        ifkv.prefill_documents(model, DOCUMENTS)


def test_a_later_layer_that_asks_for_more_is_refused_too() -> None:
    model = llama()
    attentions(model)[1].__class__ = asking(temperature=30.0)
    refused(model, r"layer 1.*temperature")


@pytest.fixture
def seen() -> Iterator[list[dict[str, Any]]]:
    """Keywords that an attention of the user's own has been given."""
    calls: list[dict[str, Any]] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        groups = module.num_key_value_groups
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * kwargs["scaling"]
        if softcap := kwargs.get("softcap"):
            logits = softcap * (logits / softcap).tanh()
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("capped", attention)
    yield calls
    del AttentionInterface._global_mapping["capped"]


@pytest.mark.parametrize("asked", [{}, dict(softcap=1.0), dict(s_aux=torch.zeros(4))])
def test_decoding_with_a_keyword_is_the_model_s_own(
    seen: list[dict[str, Any]], asked: dict[str, Any]
) -> None:
    """Over rows of 8 bits the backend decodes, unless a layer asks for what it cannot do."""
    model = llama(dtype=torch.float32)
    model.set_attn_implementation("capped")
    with pytest.warns(UpstreamWarning):
        ifkv.patch(model, backend=_Recorder())  # which has no features
    try:
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents, kv_dtype=torch.float8_e4m3fn)
        become(attentions(model), asking(**asked))
        seen.clear()
        model(IDS[:, :1], past_key_values=cache)
    finally:
        ifkv.unpatch(model)
    assert len(seen) == (2 if asked else 0)
    assert all(call.keys() >= asked.keys() for call in seen)


class _Recorder(ReferenceBackend):
    """Reference backend that records the specs of decoding steps."""

    def __init__(self, *features: str) -> None:
        self.features = frozenset(features)  # type: ignore[misc]
        self.decoded: list[AttentionSpec] = []

    def decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        spec: AttentionSpec,
        **options: Any,
    ) -> torch.Tensor | None:
        self.decoded.append(spec)
        return super().decode(query, keys, values, spec, **options)


@pytest.mark.parametrize("features", [(), ("softcap",)])
def test_decoding_hands_the_whole_spec_to_backends_that_support_it(
    features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, backend = llama(dtype=torch.float32), _Recorder(*features)
    with ifkv.patch(model, backend=backend):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents, kv_dtype=torch.float8_e4m3fn)
        # As if layers asked for a softcap and ifkv understood them.
        monkeypatch.setattr(functions, "spec_of", lambda _: AttentionSpec(0.5, 40, softcap=9.0))
        model(IDS[:, :1], past_key_values=cache)
    asked = [(each.scaling, each.window, each.softcap) for each in backend.decoded]
    assert asked == ([(0.5, None, 9.0)] * 2 if features else [])


def test_attentions_of_a_decoding_step_come_out() -> None:
    model = llama(dtype=torch.float32)
    model.set_attn_implementation("eager")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents, kv_dtype=torch.float8_e4m3fn)
        found = model(IDS[:, :1], past_key_values=cache, output_attentions=True).attentions
    assert [each.shape for each in found] == [(1, 4, 1, 11)] * 2


def test_ordinary_calls_keep_their_keywords(seen: list[dict[str, Any]]) -> None:
    model = llama()
    model.set_attn_implementation("capped")
    become(attentions(model), asking(softcap=1.0))
    expected = model(IDS).logits
    with pytest.warns(UpstreamWarning, match="the attention 'capped' of"), ifkv.patch(model):
        assert_bit_equal(model(IDS).logits, expected, what="logits while patched")
    assert all(call["softcap"] == 1.0 for call in seen)


def test_layers_without_the_protocol_are_refused() -> None:
    model = llama()
    become(model.model.layers, Lonely)
    refused(model, r"layer 0 \(Lonely\).*came with nothing")
    model = llama()
    become(attentions(model), LlamaAttention)
    refused(model, r"layer 0.*came with update\. ifkv")


def test_layers_that_are_renumbered_under_a_patch_are_refused() -> None:
    model = llama()
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        before = [layer.keys.clone() for layer in cache.layers]
        attentions(model)[0].layer_idx = 1
        with pytest.raises(UnsupportedModelError, match=r"in place 0 .*layer_idx 1"):
            ifkv.recompute(model, cache, [8])
        for layer, keys in zip(cache.layers, before, strict=True):
            assert_bit_equal(layer.keys, keys, what="keys after the refusal")


def with_norms(model: Any, names: str = "qk") -> Any:
    for attention in attentions(model):
        for name in names:
            setattr(attention, f"{name}_norm", nn.LayerNorm(8))
    return model


def without(model: Any, name: str) -> Any:
    for attention in attentions(model):
        delattr(attention, name)
    return model


def fused(model: Any) -> Any:
    for attention in attentions(model):
        attention.qkv_proj = nn.Linear(32, 64)
    return model


def configured(model: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


def windowed(family: str) -> Any:
    return tiny_model(family, num_layers=2, sliding_window=4)


def own_window(model: Any, window: int | None) -> Any:
    for attention in attentions(model):
        attention.sliding_window = window
    return model


def with_experts(model: Any) -> Any:
    model.model.layers[1].mlp.stacked = torch.nn.Parameter(torch.zeros(2, 3, 4))
    return model


def both_ways(model: Any) -> Any:
    attentions(model)[1].is_causal = False
    return model


def renamed_norm(model: Any) -> Any:
    layer = model.model.layers[1]
    layer.other_norm = layer.input_layernorm
    del layer.input_layernorm
    return model


CONTRADICTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "no norm in front of the attention": (
        lambda: renamed_norm(llama()),
        r"layer 1 has no norm in front of its attention.*attention_norm = 'input_layernorm'",
    ),
    "logits that are scaled": (
        lambda: configured(llama(), logits_scaling=0.5),
        r"has config\.logits_scaling = 0\.5, but family 'llama' names no such scalar",
    ),
    "embeddings that are scaled": (
        lambda: configured(llama(), embedding_multiplier=12.0),
        r"has config\.embedding_multiplier = 12\.0",
    ),
    "norms": (lambda: with_norms(llama()), r"layer 0 has q_norm.*qk_norm = 'none'"),
    "one norm": (lambda: with_norms(llama(), "k"), r"layer 0 has k_norm.*qk_norm = 'none'"),
    "no norm": (
        lambda: without(tiny_model("qwen3", num_layers=2), "k_norm"),
        r"lacks k_norm.*qk_norm = 'per-head'",
    ),
    "experts": (lambda: with_experts(llama()), r"has layers with experts.*experts = 'none'"),
    "fused": (lambda: fused(llama()), r"separate projections.*fused_qkv = false"),
    "not fused": (
        lambda: without(tiny_model("phi3", num_layers=2), "qkv_proj"),
        r"no separate projections.*fused_qkv = true",
    ),
    "a window of the config": (
        lambda: configured(llama(), sliding_window=4),
        r"sliding window of 4.*sliding_window = 'none'",
    ),
    "a window of the layer": (lambda: own_window(llama(), 4), r"window of 4.*'none'"),
    "no window where one is due": (
        lambda: own_window(windowed("qwen2"), None),
        r"layer 1 attends with a window of None.*sliding_attention.*ask for 4",
    ),
    "a window everywhere": (
        lambda: own_window(windowed("qwen3"), 4),
        r"layer 0 attends with a window of 4.*full_attention.*ask for None",
    ),
    "a window of another size": (
        lambda: configured(windowed("qwen2"), sliding_window=3),
        r"layer 1 attends with a window of 4.*\(3\)",
    ),
    "layers of another kind": (
        lambda: configured(windowed("qwen2"), layer_types=["full_attention", "linear_attention"]),
        r"layer 1 is of type 'linear_attention'",
    ),
    "windows that take turns": (
        lambda: configured(
            windowed("mistral"), layer_types=["full_attention", "sliding_attention"]
        ),
        r"layer 0 is among layers of types.*'all-layers'",
    ),
    "both directions, by the config": (
        lambda: configured(llama(), is_causal=False),
        r"config\.is_causal is False",
    ),
    "both directions, in a layer": (
        lambda: both_ways(llama()),
        r"layer 1 has is_causal = False",
    ),
    "a window of its own": (
        lambda: own_window(windowed("phi3"), 3),
        r"own sliding window of 3",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_model_that_contradicts_its_family_is_refused(what: str) -> None:
    build, message = CONTRADICTIONS[what]
    model = build()
    with pytest.raises(UnsupportedModelError, match=rf"{message}.*whatever its model_type says"):
        ifkv.patch(model)
    assert type(model.model.config) is type(model.config)


def test_an_attention_without_an_eager_one_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    monkeypatch.setattr("ifkv.patching.functions.attention_function", lambda *_: None)
    with ifkv.patch(model):
        model(IDS)  # by SDPA
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedModelError, match=r"LlamaAttention calls no eager_att.*sdpa"):
            model(IDS)


def test_a_patched_model_that_contradicts_its_family_stays_patched() -> None:
    model = llama()
    with ifkv.patch(model) as handle:
        attentions(model)[1].is_causal = False
        with pytest.raises(UnsupportedModelError, match="layer 1 has is_causal = False"):
            ifkv.patch(model)
        attentions(model)[1].is_causal = True
        assert ifkv.patch(model) is handle


def interleaved(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    def turn(x: Any) -> Any:
        half = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        order = torch.arange(x.shape[-1]) // 2
        return x * cos.unsqueeze(unsqueeze_dim)[..., order] + half * sin.unsqueeze(1)[..., order]

    return turn(q), turn(k)


def test_another_pairing_of_dimensions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(UnsupportedModelError, match=r"apply_rotary_pos_emb pairs.*half-split"):
        ifkv.patch(llama())


class Slower(modeling_llama.LlamaRotaryEmbedding):
    def forward(self, x: Any, position_ids: Any) -> Any:
        return super().forward(x, position_ids / 2)


def test_other_angles_are_refused() -> None:
    model = llama()
    become([model.model.rotary_emb], Slower)
    with pytest.raises(UnsupportedModelError, match=r"Slower turns dimensions by other angles"):
        ifkv.patch(model)


class Renamed(modeling_llama.LlamaForCausalLM):
    """A subclass that computes what it inherits."""


def rotate_half(x: Any) -> Any:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


UNREAD: dict[str, Callable[[pytest.MonkeyPatch], tuple[Any, str]]] = {
    "a head": lambda patch: (
        replaced(patch, modeling_llama.LlamaForCausalLM, "forward", CohereForCausalLM.forward),
        "LlamaForCausalLM",
    ),
    "a function": lambda patch: (
        replaced(patch, modeling_llama, "rotate_half", rotate_half),
        r"test_upstream_code\.rotate_half",
    ),
    "a class without source": lambda _: (with_unsourced_layers(), "Unsourced"),
    "an attention's arithmetic": lambda patch: (
        replaced(patch, modeling_llama, "eager_attention_forward", lambda *_, **__: None),
        "lambda>",
    ),
}


def replaced(patch: pytest.MonkeyPatch, module: Any, name: str, value: Any) -> Any:
    patch.setattr(module, name, value)
    return llama()


def with_unsourced_layers() -> Any:
    space: dict[str, Any] = {"base": modeling_llama.LlamaDecoderLayer, "__name__": __name__}
    exec(
        "class Unsourced(base):\n    def forward(self, *a, **k): return super().forward(*a, **k)",
        space,
    )
    model = llama()
    become(model.model.layers, space["Unsourced"])
    return model


@pytest.mark.parametrize("what", UNREAD)
def test_code_that_nobody_has_read_is_named_once(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = UNREAD[what](monkeypatch)
    with pytest.warns(UpstreamWarning, match=rf"{name}: not the code.*ifkv verify") as caught:
        ifkv.patch(model)
    assert [each.filename for each in caught] == [__file__], "it is about the call of patch()"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ifkv.patch(model)  # which is patched
    ifkv.unpatch(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_read_is_not_warned_of(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ifkv.patch(tiny_model(family, num_layers=1)):
            pass
        renamed = tiny_model("llama", num_layers=1)
        become([renamed], Renamed)
        with ifkv.patch(renamed):
            pass


def test_all_of_it_is_told_in_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_qwen3, "rotate_half", rotate_half)
    model: Any = tiny_model("qwen3", num_layers=2)
    kind = type("Qwen3DecoderLayer", (type(model.model.layers[0]),), {"forward": _forward})
    become(model.model.layers, kind)
    with pytest.warns(UpstreamWarning, match=r"Qwen3DecoderLayer, .*rotate_half: not"):
        ifkv.patch(model)
    ifkv.unpatch(model)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return modeling_qwen3.Qwen3DecoderLayer.forward(self, *args, **kwargs)


def test_keywords_are_strange_unless_they_are_known() -> None:
    known = dict(scaling=0.5, sliding_window=4, dropout=0.0, position_ids=IDS, use_cache=True)
    known |= dict(softcap=1.0, s_aux=torch.zeros(4))
    assert strange_keywords(known) == []
    assert strange_keywords(known | dict(dropout=0.5, cap=1.0)) == ["dropout", "cap"]
