"""Mistakes seen in other implementations of the method; each test is named after one."""

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

import ifkv
import ifkv.session.prepare
from ifkv.testing import assert_bit_equal, assert_close, dense_prefill, tiny_model, tiny_tokenizer

PREFIX = [1, 2]
DOCUMENTS = [[3, 14, 15, 92, 6], [53], [79, 32, 38]]
PROMPT = [26, 43, 38]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_head_dim_is_not_hidden_size_over_heads(family: str) -> None:
    """As in Qwen3-0.6B, 4B and 32B."""
    model = tiny_model(family, hidden_size=32, num_heads=4, head_dim=12)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        logits = ifkv.recompute(model, cache, range(cache.context_length), prompt_ids=PROMPT)
    assert documents[0].keys.shape == (3, 2, 5, 12)
    full = dense_prefill(model, [*cache.token_ids.tolist(), *PROMPT])
    assert logits is not None
    assert_close(logits, full.logits[-1], what="logits")


@pytest.mark.parametrize(("family", "rope"), [("llama", "yarn"), ("phi3", "longrope")])
def test_attention_scaling_is_applied_once(family: str, rope: str) -> None:
    """Applied again when keys move, it would inflate them without changing any shape."""
    model = tiny_model(family, dtype=torch.float32, rope=rope)
    scaling = model.base_model.rotary_emb.attention_scaling
    assert scaling > 1.05, "this model would not tell"
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        for order in ([0, 1, 2], [2, 0, 1]):
            cache = ifkv.stitch(model, documents, order=order)
            native = DynamicCache()
            model(cache.token_ids[None], past_key_values=native)
            assert_close(cache.layers[0].keys, native.layers[0].keys, what="layer 0 keys")
            prefix = documents[0].prefix
            assert prefix is not None
            stored = torch.cat([prefix.keys, *(documents[i].keys for i in order)], dim=2)
            for layer, before in zip(cache.layers, stored, strict=True):
                inflated = layer.keys[0].norm() / before.norm()
                assert 1 <= inflated <= scaling * 1.001  # partly rotated heads grow less


def session(**options: Any) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    return ifkv.Session(model, tokenizer, **options)


def test_documents_are_not_decoded_and_tokenised_again() -> None:
    """Ids that no tokenizer would give for their own text survive to the model."""
    tokenizer = tiny_tokenizer()
    space, a = tokenizer.encode(" a", add_special_tokens=False)
    odd = [space, space, a, tokenizer.eos_token_id, a, space]  # strip() and decode() would differ
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with ifkv.patch(model):
        document = ifkv.prefill_documents(model, [odd], prefix=[0])[0]
        cache = ifkv.stitch(model, [document])
    assert document.token_ids.tolist() == odd
    assert cache.token_ids.tolist() == [0, *odd]


def test_bos_appears_once_and_in_front() -> None:
    ask = session()
    ask.add(["one fish", "two fish", "red fish"])
    answer = ask.ask("how many?", ratio=1, max_new_tokens=2)
    request = [*answer.context_ids.tolist(), *answer.prompt_ids.tolist()]
    bos = ask.tokenizer.bos_token_id
    assert request[0] == bos
    assert request.count(bos) == 1


def test_separators_are_tokenised_once_and_not_in_context() -> None:
    """The request's ids are the parts' ids, one after another, however text would merge there."""
    ask = session()
    keys = ask.add(["one\n", "two", " three "])
    answer = ask.ask(" why? ", ratio=0, max_new_tokens=1)
    parts = [ask.prefix_ids, *(ask.store.get(key).token_ids.tolist() for key in keys)]
    assert answer.context_ids.tolist() == [token for part in parts for token in part]
    text = ask.tokenizer.decode([*answer.context_ids.tolist(), *answer.prompt_ids.tolist()])
    assert "one\n\ntwo\n\n three \n\n" in text
    assert text.endswith(" why? <|im_end|>\n<|im_start|>assistant\n")


def test_nothing_global_is_patched() -> None:
    names = ("apply_rotary_pos_emb", "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS")
    classes = (
        modeling_llama.LlamaAttention,
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaModel,
        modeling_llama.LlamaForCausalLM,
    )
    before = [getattr(modeling_llama, name) for name in names] + [dict(vars(c)) for c in classes]
    with ifkv.patch(tiny_model("llama")):
        during = [getattr(modeling_llama, n) for n in names] + [dict(vars(c)) for c in classes]
    assert during == before


def test_documents_are_cached_without_their_neighbours() -> None:
    """Not a bit of a document depends on who is prefilled beside it: else one could poison all."""
    model = tiny_model("llama", dtype=torch.float32)
    with ifkv.patch(model):
        for stranger in ([5, 5, 5, 5], [90, 1, 33, 7]):
            batch = [[10, 11, 12], stranger, [20, 21]]
            beside = ifkv.prefill_documents(model, batch, prefix=PREFIX)
            if stranger == [5, 5, 5, 5]:
                expected = beside
            for index in (0, 2):
                assert_bit_equal(beside[index].keys, expected[index].keys, what="keys")
                assert_bit_equal(beside[index].values, expected[index].values, what="values")


def test_all_documents_known_already() -> None:
    ask = session()
    first = ask.add(["a lamp", "a door"])
    assert ask.add(["a lamp", "a door"]) == first
    assert ask.add([]) == []
    assert len(ask.ask("which?", max_new_tokens=2).token_ids) == 2


def test_documents_in_another_order_and_of_any_length() -> None:
    ask = session()
    keys = ask.add(["x", "a much longer document, with many more words in it", "yes"])
    for order in (keys, keys[::-1], keys[1:], [keys[2]], [keys[0], keys[0]]):
        answer = ask.ask("which?", documents=order, ratio=0.3, max_new_tokens=2)
        expected = [*ask.prefix_ids]
        for key in order:
            expected += ask.store.get(key).token_ids.tolist()
        assert answer.context_ids.tolist() == expected


class Made(TorchDispatchMode):
    """Records every operator that runs, and the tensors it makes (views and in-place left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        self.tensors += [
            t.detach()
            for t in tree_leaves(out)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in old
        ]
        return out


@contextmanager
def long_context(num_layers: int = 3) -> Iterator[tuple[PreTrainedModel, ifkv.StitchedCache]]:
    """A context of 602 slots: large against every weight of the model."""
    model = tiny_model("llama", num_layers=num_layers, max_position_embeddings=1024)
    documents = [[(i * j) % 97 for i in range(200)] for j in (3, 5, 7)]
    with ifkv.patch(model):
        yield model, ifkv.stitch(model, ifkv.prefill_documents(model, documents, prefix=PREFIX))


def test_no_mask_of_all_rows_by_all_slots() -> None:
    with long_context() as (model, cache):
        slots = list(range(202, 602, 2))
        with Made() as made:
            ifkv.recompute(model, cache, slots, prompt_ids=PROMPT)
        dense = len(slots) * cache.context_length
        assert max(t.numel() for t in made.tensors if t.dtype == torch.bool) < dense / 2
        assert max(t.numel() for t in made.tensors) < dense


def test_no_copy_of_the_cache_per_layer_or_request() -> None:
    with long_context() as (model, cache):
        buffers = [layer.key_buffer.data_ptr() for layer in cache.layers]
        whole = cache.layers[0].keys.numel()
        with Made() as made:
            ifkv.recompute(model, cache, [300, 400, 500], prompt_ids=PROMPT[:1])
        assert max(t.numel() for t in made.tensors) < whole
        ifkv.generate(model, cache, PROMPT[:1], max_new_tokens=3)
        assert [layer.key_buffer.data_ptr() for layer in cache.layers] == buffers


def test_no_attention_matrix_of_all_layers_while_scoring() -> None:
    """Not [heads, query, slots] for every layer: the norms are reduced layer by layer."""
    with long_context() as (model, cache):
        with Made() as made:
            ifkv.score(model, cache, list(range(40)), layers=[0, 1, 2])
        matrix = 4 * 40 * cache.context_length
        assert max(t.numel() for t in made.tensors) <= matrix


@pytest.mark.parametrize("step", ["score", "recompute"])
def test_no_synchronisation_with_the_host_per_layer(step: str) -> None:
    """What a device must be waited for is the same for two layers and for six."""
    waits = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}
    counts = []
    for depth in (2, 6):
        with long_context(depth) as (model, cache), Made() as made:
            if step == "score":
                ifkv.score(model, cache, PROMPT, layers=[-1])
            else:
                ifkv.recompute(model, cache, [300, 400, 500], prompt_ids=PROMPT)
        assert len(made.calls) > 20 * depth
        counts.append(sum(call in waits for call in made.calls))
    assert counts[0] == counts[1]


def test_select_sorts_where_the_scores_are() -> None:
    """One look at the scores decides that they are finite; the ranking never leaves the device."""
    with long_context(1) as (model, cache):
        scores = ifkv.score(model, cache, PROMPT)
        with Made() as made:
            ifkv.select(cache, scores)
    assert made.calls.count("aten._local_scalar_dense.default") <= 1
    assert not any("_to_copy" in call for call in made.calls)


@pytest.mark.parametrize(
    "step",
    [
        "session.prepare.stitch_many",
        "selectors.query_ranked.run_scorings",
        "session.prepare.recompute_many",
        "session.prepare.score_many",
    ],
)
def test_time_to_first_token_counts_every_step(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query pass, and all else between the question and the first token's logits."""
    ask = session()
    ask.add(["a lamp", "a door"])
    home, name = f"ifkv.{step}".rsplit(".", 1)
    real = getattr(importlib.import_module(home), name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return real(*args, **kwargs)

    monkeypatch.setattr(f"ifkv.{step}", slow)
    answer = ask.ask("which?", ratio=0.5, reorder=True, max_new_tokens=1)
    assert answer.ttft_seconds >= 0.2
    before = {name: t for name, t in answer.timings.items() if name != "decode"}
    assert set(before) == {"load", "reorder", "stitch", "select", "recompute and prompt"}
    assert max(before.values()) >= 0.2
    assert sum(before.values()) <= answer.ttft_seconds
