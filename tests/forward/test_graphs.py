"""Few rows that run in CUDA graphs: as without them, or not in them at all.

On the stand-in everywhere, on a GPU under `pytest -m gpu`.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import ifkv
from graph_standin import RecorderStandIn
from ifkv.forward.graphs import KEPT, SIZES, Captures
from ifkv.forward.recorder import CudaRecorder
from ifkv.selectors import Request, names, resolve
from ifkv.steps.query_pass import QueryView
from ifkv.steps.score import attention_norm, mean_over_layers, measure_query, score_many
from ifkv.store import MemoryStore
from ifkv.testing import assert_close, shared_tiny_model, tiny_model, tiny_tokenizer
from scenario import EXACT, Scenario, keys_of, prepared, scenarios, values_of

PREFIX, DOCUMENTS = [1, 2], [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
CPU = torch.device("cpu")


class Counted(Captures):
    """Counts the runs in graphs, and the captures."""

    def __init__(self, device: torch.device):
        self.runs = self.captures = 0
        super().__init__(device, self._counting)

    def _counting(self, device: torch.device) -> Any:
        self.captures += 1
        return CudaRecorder(device) if device.type == "cuda" else RecorderStandIn(device)

    def run(self, *args: Any) -> Tensor | None:
        entering = super().run(*args)
        self.runs += entering is not None
        return entering


class Bench:
    """A patched model with a stitched cache."""

    def __init__(self, model: PreTrainedModel, **how: Any):
        self.model = model
        self.handle = ifkv.patch(model, **how)
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        self.cache = ifkv.stitch(model, documents)
        self.graphs = Counted(model.device)

    def scores(self, query: list[int], *, graphs: bool) -> Tensor:
        self.handle.captures = self.graphs if graphs else None
        return ifkv.score(self.model, self.cache, query, layers=[0, 2]).cpu()


@pytest.fixture(params=["standin", pytest.param("gpu", marks=pytest.mark.gpu)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    model = tiny_model("qwen3", dtype=torch.float32, max_position_embeddings=1024)
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        model = model.to("cuda")
    made = Bench(model, backend="reference")
    with made.handle:
        yield made


@pytest.mark.parametrize("layers", [[0], [2], [0, 1, 2]])
@given(s=scenarios())
def test_scores_are_those_of_the_modules(s: Scenario, layers: list[int]) -> None:
    with prepared(s.model, s.request) as ready:
        handle = ifkv.patch(s.model)
        cache = ready.stitch(s.order)
        want = ifkv.score(s.model, cache, s.request.query, layers=layers)
        handle.captures = graphs = Counted(CPU)
        for _ in range(2):  # captured and replayed, then replayed
            got = ifkv.score(s.model, cache, s.request.query, layers=layers)
            assert_close(got, want, what="scores", tolerance=1e-6)
    assert (graphs.runs, graphs.captures) == (2, 1)


@given(
    lengths=st.lists(st.integers(1, max(SIZES)), min_size=2, max_size=5),
    s=scenarios(),
)
def test_one_capture_serves_every_number_of_rows_up_to_its_size(
    lengths: list[int], s: Scenario
) -> None:
    """Whatever the rows before them were, and whichever cache they looked at."""
    with prepared(s.model, s.request) as ready:
        handle = ifkv.patch(s.model)
        room = handle.rope.limit - s.total
        lengths = [min(length, room) for length in lengths]
        sizes = {min(size for size in SIZES if length <= size) for length in lengths}
        graphs = Counted(CPU)
        for index, length in enumerate(lengths):
            query = [1 + (index + at) % 50 for at in range(length)]
            cache = ready.stitch(s.order if index % 2 else None)
            handle.captures = None
            want = ifkv.score(s.model, cache, query, layers=[1])
            handle.captures = graphs
            got = ifkv.score(s.model, cache, query, layers=[1])
            assert_close(got, want, what=f"scores of {length} rows", tolerance=1e-6)
    assert (graphs.runs, graphs.captures) == (len(lengths), len(sizes))


@pytest.mark.parametrize("length", [1, 16, 17, 40, 128, 300, 512])
def test_on_any_number_of_rows(bench: Bench, length: int) -> None:
    query = [1 + at % 50 for at in range(length)]
    want = bench.scores(query, graphs=False)
    for _ in range(2):
        assert_close(bench.scores(query, graphs=True), want, what="scores", tolerance=1e-5)
    assert (bench.graphs.runs, bench.graphs.captures) == (2, 1)


def test_more_rows_than_any_capture_has_are_launched(bench: Bench) -> None:
    query = [1 + at % 50 for at in range(max(SIZES) + 1)]
    want = bench.scores(query, graphs=False)
    assert torch.equal(bench.scores(query, graphs=True), want)
    assert bench.graphs.runs == 0


@pytest.mark.parametrize("name", names())
def test_every_rule_chooses_as_without(bench: Bench, name: str) -> None:
    documents = ifkv.prefill_documents(bench.model, DOCUMENTS, prefix=PREFIX)
    rule = resolve(name)
    found = []
    for graphs in (None, bench.graphs, bench.graphs):
        bench.handle.captures = graphs
        cache = ifkv.stitch(bench.model, documents)
        asked = Request([20, 21, 22, 23], [21, 22], documents)
        found.append(rule.select(bench.model, cache, asked, 0.4))
    for selection in found[1:]:
        assert selection.slots.tolist() == found[0].slots.tolist()
        if found[0].scores is not None:
            assert selection.scores is not None
            assert_close(selection.scores.cpu(), found[0].scores.cpu(), what=name, tolerance=1e-5)


@given(s=scenarios(min_slots=1))
def test_recomputed_rows_and_logits_are_those_of_the_modules(s: Scenario) -> None:
    with prepared(s.model, s.request) as ready:
        handle = ifkv.patch(s.model)
        want = ready.stitch(s.order)
        expected = ifkv.recompute(s.model, want, s.slots, prompt_ids=s.request.prompt)
        assert expected is not None
        handle.captures = graphs = Counted(CPU)
        for _ in range(2):
            cache = ready.stitch(s.order)
            got = ifkv.recompute(s.model, cache, s.slots, prompt_ids=s.request.prompt)
            assert got is not None
            assert_close(got, expected, what="logits", tolerance=EXACT)
            for side in (keys_of, values_of):
                assert_close(side(cache), side(want), what="rows", tolerance=EXACT)
    assert (graphs.runs, graphs.captures) == (2, 1)


def test_a_question_and_its_recomputation_share_a_capture(bench: Bench) -> None:
    bench.handle.captures = bench.graphs
    ifkv.score(bench.model, bench.cache, [20, 21], layers=[0, 1, 2])
    ifkv.recompute(bench.model, bench.cache, [5, 8], prompt_ids=[20, 21])
    assert (bench.graphs.runs, bench.graphs.captures) == (2, 1)


def test_answers_of_a_batch_are_those_of_the_modules(bench: Bench) -> None:
    documents = ifkv.prefill_documents(bench.model, DOCUMENTS, prefix=PREFIX)
    prompts = [[20, 21, 22], [30], [31, 32]]
    answers = []
    for graphs in (None, bench.graphs):
        bench.handle.captures = graphs
        caches = ifkv.stitch_many(bench.model, [documents, documents[:2], documents[1:]])
        made = ifkv.generate_many(bench.model, caches, prompts, max_new_tokens=6)
        answers.append([answer.tolist() for answer in made])
    assert answers[0] == answers[1]
    assert bench.graphs.runs > 1


def test_turns_with_new_documents_are_those_of_the_modules(bench: Bench) -> None:
    """Pending tokens of the turn before join the pass of the question, then the recompute."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048
    ).to(bench.model.device)
    session = ifkv.Session(model, tokenizer, store=MemoryStore(), backend="reference")
    keys = session.add(["The lamp is red.", "The door is green and old.", "It rains."])
    handle = ifkv.patch(model)
    found = []
    for graphs in (None, Counted(model.device)):
        handle.captures = graphs
        talk = session.conversation(documents=keys[:2])
        first = talk.ask("Which colour is the door?", max_new_tokens=4)
        talk.add([keys[2]])
        second = talk.ask("Why?", max_new_tokens=4)
        found.append((first.first_logits, second.first_logits, second.slots))
    for got, want in zip(found[1], found[0], strict=True):
        assert_close(got.double(), want.double(), what="turn", tolerance=1e-6)
    assert handle.captures is not None
    assert handle.captures.runs >= 3


def test_a_batch_runs_in_graphs_too(bench: Bench) -> None:
    queries = [[20, 21, 22], [30], [31, 32]]
    caches = [bench.cache] * 3
    bench.handle.captures = None
    want = score_many(bench.model, caches, queries)
    bench.handle.captures = bench.graphs
    for got, expected in zip(score_many(bench.model, caches, queries), want, strict=True):
        assert_close(got.cpu(), expected.cpu(), what="scores", tolerance=1e-5)
    assert bench.graphs.runs == 1


def test_new_weights_in_place_count_at_once(bench: Bench) -> None:
    before = bench.scores([20, 21], graphs=True)
    layer: Any = bench.model.base_model
    with torch.no_grad():
        layer.layers[0].mlp.down_proj.weight.mul_(-2)
    documents = ifkv.prefill_documents(bench.model, DOCUMENTS, prefix=PREFIX)
    bench.cache = ifkv.stitch(bench.model, documents)
    want = bench.scores([20, 21], graphs=False)
    assert (want - before).abs().max() > 1e-4
    assert_close(bench.scores([20, 21], graphs=True), want, what="scores", tolerance=1e-5)
    assert bench.graphs.captures == 1  # they lie where they lay


def _move_a_weight(layer: Any) -> None:
    layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.detach() * -2)


def _replace_a_module(layer: Any) -> None:
    class Doubled(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = -2 * super().forward(x)
            return out

    layer.mlp.__class__ = Doubled


def _change_a_factor(layer: Any) -> None:
    layer.self_attn.scaling *= 2


@pytest.mark.parametrize("change", [_move_a_weight, _replace_a_module, _change_a_factor])
def test_what_has_changed_is_captured_anew(bench: Bench, change: Callable[[Any], None]) -> None:
    before = bench.scores([20, 21], graphs=True)
    base: Any = bench.model.base_model
    change(base.layers[0])
    documents = ifkv.prefill_documents(bench.model, DOCUMENTS, prefix=PREFIX)
    bench.cache = ifkv.stitch(bench.model, documents)
    want = bench.scores([20, 21], graphs=False)
    assert (want - before).abs().max() > 1e-4
    assert_close(bench.scores([20, 21], graphs=True), want, what="scores", tolerance=1e-5)
    assert (bench.graphs.runs, bench.graphs.captures) == (2, 2)


def _hook(layer: Any, seen: list[int]) -> Callable[[], None]:
    hook = layer.mlp.register_forward_hook(ifkv.observer(lambda *_: seen.append(1)))
    return lambda: hook.remove()


def _pre_hook(layer: Any, seen: list[int]) -> Callable[[], None]:
    hook = layer.mlp.register_forward_pre_hook(ifkv.observer(lambda *_: seen.append(1)))
    return lambda: hook.remove()


def _global_hook(layer: Any, seen: list[int]) -> Callable[[], None]:
    def noticed(module: nn.Module, *_: Any) -> None:
        if module is layer.mlp:
            seen.append(1)

    hook = nn.modules.module.register_module_forward_hook(ifkv.observer(noticed))
    return lambda: hook.remove()


@pytest.mark.parametrize("hang", [_hook, _pre_hook, _global_hook])
def test_what_hangs_on_a_module_is_called(
    bench: Bench, hang: Callable[[Any, list[int]], Callable[[], None]]
) -> None:
    bench.scores([20, 21], graphs=True)
    base: Any = bench.model.base_model
    seen: list[int] = []
    take_off = hang(base.layers[0], seen)
    try:
        bench.scores([20, 21], graphs=True)
    finally:
        take_off()
    assert seen == [1]
    bench.scores([20, 21], graphs=True)
    assert (bench.graphs.runs, bench.graphs.captures, seen) == (2, 1, [1])


def test_a_forward_that_was_put_back_is_called(bench: Bench) -> None:
    """As accelerate and torch.compile leave them on a module: what its class says, and yet."""
    base: Any = bench.model.base_model
    base.layers[0].mlp.forward = base.layers[0].mlp.forward
    bench.scores([20, 21], graphs=True)
    assert bench.graphs.runs == 0


def test_quantized_layers_are_called(bench: Bench) -> None:
    base: Any = bench.model.base_model
    base.layers[1].mlp.up_proj.register_buffer("scales", torch.ones(1))
    documents = ifkv.prefill_documents(bench.model, DOCUMENTS, prefix=PREFIX)
    bench.cache = ifkv.stitch(bench.model, documents)
    bench.scores([20, 21], graphs=True)
    assert bench.graphs.runs == 0


def test_layers_with_experts_are_called() -> None:
    """Which experts run depends on the rows, so no graph may hold them."""
    bench = Bench(tiny_model("qwen3_moe", dtype=torch.float32), backend="reference")
    with bench.handle:
        bench.scores([20, 21], graphs=True)
    assert bench.graphs.runs == bench.graphs.captures == 0


def test_layers_that_cannot_be_captured_are_called_and_that_is_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = bench.model.base_model
    kind = type(base.layers[0].mlp)
    usual = kind.forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = usual(self, x)
        return out * max(1, int(out.flatten()[0].item() < -1e9))  # waits for the host

    monkeypatch.setattr(kind, "forward", forward)
    want = bench.scores([20, 21], graphs=False)
    with caplog.at_level(logging.WARNING, "ifkv"):
        for _ in range(3):
            assert torch.equal(bench.scores([20, 21], graphs=True), want)
    assert bench.graphs.runs == 0
    [record] = caplog.records
    assert "Qwen3ForCausalLM cannot be captured" in record.getMessage()
    monkeypatch.undo()
    bench.scores([20, 21], graphs=True)
    assert bench.graphs.runs == 1, "other modules are tried anew"


def test_threads_do_not_meet(bench: Bench) -> None:
    want = {query: bench.scores([query, 21], graphs=False) for query in range(20, 24)}
    bench.handle.captures = bench.graphs
    wrong: list[int] = []

    def ask(query: int) -> None:
        for _ in range(10):
            scores = ifkv.score(bench.model, bench.cache, [query, 21], layers=[0, 2]).cpu()
            if (scores - want[query]).abs().max() > 1e-5:
                wrong.append(query)

    threads = [threading.Thread(target=ask, args=(query,)) for query in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert bench.graphs.runs == 10 * len(want)


def test_a_pass_within_a_pass_is_launched(bench: Bench) -> None:
    want = bench.scores([20, 21], graphs=False)
    bench.handle.captures = bench.graphs
    inner: list[Tensor] = []

    def measure(view: QueryView) -> Tensor:
        inner.append(ifkv.score(bench.model, bench.cache, [20, 21], layers=[0, 2]).cpu())
        return attention_norm("l2")(view)

    norms = measure_query(bench.model, bench.cache, [20, 21], [0, 2], measure)
    assert len(inner) == 2
    for got in (*inner, mean_over_layers(norms).cpu()):
        assert_close(got, want, what="scores", tolerance=1e-5)
    assert bench.graphs.runs == 1


def test_captured_without_gradients_replayed_with_or_without(bench: Bench) -> None:
    want = bench.scores([20, 21], graphs=False)
    with torch.inference_mode():
        first = bench.scores([20, 21], graphs=True).clone()
    second = bench.scores([20, 21], graphs=True)
    with torch.inference_mode():
        third = bench.scores([20, 21], graphs=True).clone()
    for got in (first, second, third):
        assert_close(got, want, what="scores", tolerance=1e-5)
    assert (bench.graphs.runs, bench.graphs.captures) == (3, 1)


def test_so_many_captures_are_kept(bench: Bench) -> None:
    bench.handle.captures = bench.graphs
    for size in SIZES:
        for layer in range(3):
            ifkv.score(bench.model, bench.cache, [20] * size, layers=[layer])
    assert bench.graphs.captures == 3 * len(SIZES) > KEPT
    assert len(bench.graphs._captured) == KEPT


def test_their_memory_goes_with_the_patch(bench: Bench) -> None:
    bench.handle.captures = bench.graphs
    bench.handle.unpatch()
    assert bench.handle.captures is None


def test_only_on_a_card() -> None:
    with ifkv.patch(shared_tiny_model("llama")) as handle:
        assert handle.captures is None


@pytest.mark.gpu
def test_on_a_card_by_itself() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with ifkv.patch(tiny_model("llama").to("cuda"), backend="reference") as handle:
        assert isinstance(handle.captures, Captures)
