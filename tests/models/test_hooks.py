"""What hangs on modules: refused in every way of asking, unless it can change no number."""

import functools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import ifkv
from ifkv.errors import UnsupportedModelError
from ifkv.models import rope
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ["The lamp is red.", "The door is green."]
QUESTION = "Which?"
Undo = Callable[[], object]


def fresh() -> Any:
    return tiny_model(vocab_size=len(TOKENIZER), dtype=torch.float32, num_layers=3)


def session_of(model: Any, store: MemoryStore | None = None) -> ifkv.Session:
    return ifkv.Session(model, TOKENIZER, store=store or MemoryStore())


# --- what is refused -----------------------------------------------------------------------


def layer_hook(model: Any) -> Undo:
    return model.model.layers[1].register_forward_hook(lambda _, args, out: out + 1).remove


def pre_hook(model: Any) -> Undo:
    mlp = model.model.layers[2].mlp
    return mlp.register_forward_pre_hook(lambda _, args: (args[0] * 2,)).remove


def keyword_hook(model: Any) -> Undo:
    def steer(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 2}

    return model.model.layers[0].self_attn.register_forward_pre_hook(steer, with_kwargs=True).remove


def embedding_hook(model: Any) -> Undo:
    return model.model.embed_tokens.register_forward_hook(lambda _, args, out: out * 2).remove


def norm_hook(model: Any) -> Undo:
    return model.model.norm.register_forward_hook(lambda _, args, out: out * 2).remove


def head_hook(model: Any) -> Undo:
    return model.lm_head.register_forward_hook(lambda _, args, out: -out).remove


def stack_hook(model: Any) -> Undo:
    def steer(module: Any, args: Any, out: Any) -> None:
        out.last_hidden_state = -out.last_hidden_state

    return model.model.register_forward_hook(steer).remove


def model_hook(model: Any) -> Undo:
    def steer(module: Any, args: Any, out: Any) -> None:
        out.logits = -out.logits

    return model.register_forward_hook(steer).remove


def global_hook(model: Any) -> Undo:
    def steer(module: Any, args: Any, out: Any) -> Any:
        return out * 2 if module is model.model.layers[1].mlp else None

    return nn.modules.module.register_module_forward_hook(steer).remove


def global_pre_hook(model: Any) -> Undo:
    def steer(module: Any, args: Any) -> Any:
        return (args[0] * 2,) if module is model.model.layers[1].mlp else None

    return nn.modules.module.register_module_forward_pre_hook(steer).remove


def replaced(path: str, name: str = "forward") -> Callable[[Any], Undo]:
    def hang(model: Any) -> Undo:
        module = model.get_submodule(path)
        usual = getattr(module, name)

        @functools.wraps(usual)  # which makes it look like the class's own
        def other(*args: Any, **kwargs: Any) -> Any:
            return usual(*args, **kwargs)

        setattr(module, name, other)
        return lambda: delattr(module, name)

    return hang


def another_module_s_forward(model: Any) -> Undo:
    first, second = (model.model.layers[index].mlp for index in (0, 1))
    first.forward = second.forward
    return lambda: delattr(first, "forward")


def compiled_replacement(model: Any) -> Undo:
    mlp = model.model.layers[0].mlp
    usual = mlp.forward
    mlp.forward = torch.compile(lambda x: 2 * usual(x), backend="eager")
    return lambda: delattr(mlp, "forward")


def parametrized(model: Any) -> Undo:
    down = model.model.layers[1].mlp.down_proj
    parametrize.register_parametrization(down, "weight", nn.Identity())
    return lambda: parametrize.remove_parametrizations(down, "weight")


def accelerate_s(name: str) -> Any:
    """A hook as accelerate's class of that name is one."""
    return type(name, (), {"__module__": "accelerate.hooks", "hooks": ()})()


def hung_by_accelerate(*hooks: Any) -> Callable[[Any], Undo]:
    """What ``add_hook_to_module`` leaves on a module."""

    def hang(model: Any) -> Undo:
        module = model.model.layers[1]
        module._old_forward = module.forward
        module._hf_hook = hooks[0]
        if len(hooks) > 1:
            module._hf_hook = accelerate_s("SequentialHook")
            module._hf_hook.hooks = hooks

        def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            return module._old_forward(*args, **kwargs)

        forward = functools.partial(new_forward, module)
        module.forward = functools.update_wrapper(forward, module._old_forward)

        def take_off() -> None:
            del module._hf_hook, module._old_forward, module.forward

        return take_off

    return hang


ALIGN = accelerate_s("AlignDevicesHook")
REFUSED: dict[str, tuple[Callable[[Any], Undo], str]] = {
    "a layer's hook": (layer_hook, r"model\.layers\.1 of this Llama.* forward hook \(.*layer_hook"),
    "a pre-hook": (pre_hook, r"model\.layers\.2\.mlp .* forward hook .*pre_hook"),
    "a hook with keywords": (keyword_hook, r"layers\.0\.self_attn .*keyword_hook.*handle\.remove"),
    "the embeddings' hook": (embedding_hook, r"embed_tokens .*embedding_hook"),
    "the norm's hook": (norm_hook, r"model\.norm .*norm_hook"),
    "the head's hook": (head_hook, r"lm_head .*head_hook"),
    "the stack's hook": (stack_hook, r"model of this .*stack_hook"),
    "the model's hook": (model_hook, r"^this LlamaForCausalLM carries a forward hook"),
    "a global hook": (global_hook, r"global forward hook .*global_hook"),
    "a global pre-hook": (global_pre_hook, r"global forward hook .*global_pre_hook"),
    "a layer's forward": (replaced("model.layers.1"), r"layers\.1 .*its own forward .*del "),
    "a projection's": (replaced("model.layers.0.mlp.up_proj"), r"up_proj .*its own forward"),
    "the head's": (replaced("lm_head"), r"lm_head .*its own forward"),
    "the stack's": (replaced("model"), r"model of this .*its own forward"),
    "the model's": (replaced(""), r"^this LlamaForCausalLM has its own forward"),
    "another module's": (another_module_s_forward, r"layers\.0\.mlp .*its own forward"),
    "a compiled one": (compiled_replacement, r"layers\.0\.mlp .*its own forward"),
    "generate": (replaced("", "generate"), r"^this LlamaForCausalLM has its own generate"),
    "a parametrization": (parametrized, r"down_proj .*parametrization.*remove_parametrizations"),
    "a hook for accelerate": (
        hung_by_accelerate(SimpleNamespace()),
        r"layers\.1 .*its own forward",
    ),
    "one behind accelerate's": (
        hung_by_accelerate(ALIGN, SimpleNamespace()),
        r"layers\.1 .*its own forward",
    ),
    "accelerate's casts": (
        hung_by_accelerate(accelerate_s("LayerwiseCastingHook")),
        r"layers\.1 .*its own forward",
    ),
}


@pytest.fixture
def hung(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ifkv.Session, Any, Undo, str]]:
    """A session with documents and a conversation, and then something hung onto its model."""
    hang, message = REFUSED[request.param]
    model = fresh()
    session = session_of(model)
    session.add(TEXTS)
    chat = session.conversation()
    take_off = hang(model)
    yield model, session, chat, take_off, message
    nn.modules.module._global_forward_hooks.clear()
    nn.modules.module._global_forward_pre_hooks.clear()


@pytest.mark.parametrize("hung", REFUSED, indirect=True)
def test_every_way_of_asking_refuses_what_could_change_it(hung: Any) -> None:
    model, session, chat, take_off, message = hung
    documents = [session.store.get(key) for key in session.keys]
    ways: list[Callable[[], object]] = [
        lambda: ifkv.patch(model),
        lambda: session_of(model),
        lambda: session.add(TEXTS),
        lambda: session.add(["Another."]),
        lambda: session.ask(QUESTION),
        lambda: session.ask_many([QUESTION, QUESTION]),
        lambda: "".join(session.stream(QUESTION)),
        lambda: chat.ask(QUESTION),
        lambda: session.conversation().ask(QUESTION),
        lambda: ifkv.prefill_documents(model, [[5, 6]]),
        lambda: ifkv.stitch(model, documents),
    ]
    for way in ways:
        with pytest.raises(UnsupportedModelError, match=message):
            way()
    take_off()
    assert session.prefilled == len(TEXTS)
    cache = ifkv.stitch(model, documents)
    expected = session.ask(QUESTION, max_new_tokens=3).token_ids
    assert torch.equal(chat.ask(QUESTION, max_new_tokens=3).token_ids, expected)
    layer_hook(model)
    for way in (
        lambda: ifkv.score(model, cache, [7]),
        lambda: ifkv.recompute(model, cache, [9]),
        lambda: ifkv.generate(model, cache, [7]),
    ):
        with pytest.raises(UnsupportedModelError, match="forward hook"):
            way()


def derived(model: Any) -> None:
    class Negated(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = -out.logits
            return out

    model.__class__ = Negated


def derived_stack(model: Any) -> None:
    class Longer(type(model.model)):  # type: ignore[misc]
        @functools.wraps(type(model.model).forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.model.__class__ = Longer


@pytest.mark.parametrize("derive", [derived, derived_stack])
def test_a_forward_over_upstream_s_is_refused(derive: Callable[[Any], None]) -> None:
    model = fresh()
    derive(model)
    with pytest.raises(UnsupportedModelError, match=r"forward of Llama.*logits_processor"):
        session_of(model)
    with pytest.raises(UnsupportedModelError, match=r"forward of Llama.*logits_processor"):
        ifkv.patch(torch.compile(model, backend="eager"))


def test_a_class_of_one_s_own_without_a_forward_is_not_refused() -> None:
    model = fresh()
    model.__class__ = type("Named", (type(model),), {})
    session_of(model).add(TEXTS)


def test_rows_of_a_hooked_model_are_not_served_to_the_plain_one() -> None:
    store, model = MemoryStore(), fresh()
    hook = model.model.layers[1].register_forward_hook(lambda _, args, out: out + 1)
    with pytest.raises(UnsupportedModelError, match="forward hook"):
        session_of(model, store).add(TEXTS)
    hook.remove()
    session = session_of(model, store)
    session.add(TEXTS)
    assert session.prefilled == 2


# --- what goes on working ------------------------------------------------------------------


def look(model: Any) -> Undo:
    hook = model.model.layers[1].register_forward_hook(ifkv.observer(lambda _, args, out: out + 1))
    return hook.remove


def notes_hidden_states(model: Any) -> Undo:
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules()), "upstream left none behind"
    return lambda: None


def asks_for_gradients(model: Any) -> Undo:
    model.enable_input_require_grads()
    assert model.model.embed_tokens._forward_hooks, "upstream left none behind"
    return lambda: model.disable_input_require_grads()


def compiled_norm(model: Any) -> Undo:
    norm = model.model.layers[1].input_layernorm
    norm.forward = torch.compile(norm.forward, backend="eager")
    return lambda: delattr(norm, "forward")


def compiled_forward(model: Any) -> Undo:
    """As transformers' documentation has it."""
    model.forward = torch.compile(model.forward, backend="eager")
    return lambda: delattr(model, "forward")


def put_back(model: Any) -> Undo:
    model.model.layers[1].forward = model.model.layers[1].forward
    return lambda: delattr(model.model.layers[1], "forward")


def cleared(model: Any) -> Undo:
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda _, args, out: out + 1)
    mlp._forward_hooks.clear()
    return lambda: None


def backward_hook(model: Any) -> Undo:
    return model.model.layers[1].register_full_backward_hook(lambda *_: None).remove


KEPT: dict[str, Callable[[Any], Undo]] = {
    "an observer": look,
    "transformers' own": notes_hidden_states,
    "transformers' for gradients": asks_for_gradients,
    "a compiled norm": compiled_norm,
    "a compiled forward": compiled_forward,
    "its own forward": put_back,
    "hooks taken off": cleared,
    "a backward hook": backward_hook,
    "accelerate's": hung_by_accelerate(ALIGN),
    "accelerate's two": hung_by_accelerate(ALIGN, ALIGN),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_changes_no_number_goes_on_working(name: str) -> None:
    session = session_of(fresh())
    session.add(TEXTS)
    expected = session.ask(QUESTION, ratio=0.5, max_new_tokens=3)
    model = fresh()
    take_off = KEPT[name](model)
    session = session_of(model)
    session.add(TEXTS)
    answer = session.ask(QUESTION, ratio=0.5, max_new_tokens=3)
    assert torch.equal(answer.token_ids, expected.token_ids)
    assert torch.equal(answer.first_logits, expected.first_logits)
    take_off()


def test_passes_through_compiled_layers_are_not_traced() -> None:
    """Inductor makes an IndexError of the rotation, which writes into parts of its output."""
    session = session_of(fresh())
    session.add(TEXTS)
    expected = session.ask(QUESTION, ratio=0.5, max_new_tokens=3)
    traced: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    model = fresh()
    for layer in model.model.layers:
        layer.compile(backend=backend)
    session = session_of(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")
        session.add(TEXTS)
        answer = session.ask(QUESTION, ratio=0.5, max_new_tokens=3)
    assert torch.equal(answer.token_ids, expected.token_ids)
    assert torch.equal(answer.first_logits, expected.first_logits)
    assert traced
    assert not [where for where in traced if rope.__file__ in where]


def test_real_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = fresh()
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    session_of(model).add(TEXTS)
    hooks.remove_hook_from_module(model, recurse=True)
    session_of(model).add(TEXTS)

    class Steering(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: Any, output: Any) -> Any:
            return output + 1

    hooks.add_hook_to_module(model.model.layers[0], Steering())
    with pytest.raises(UnsupportedModelError, match="its own forward"):
        session_of(model).add(TEXTS)


def test_an_observer_sees_and_replaces_nothing() -> None:
    model, seen = fresh(), []

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        seen.append(out.shape[1])
        return out * 0

    layer = model.model.layers[0]
    layer.register_forward_hook(ifkv.observer(hook), with_kwargs=True)
    with ifkv.patch(model):
        observed = ifkv.prefill_documents(model, [[5, 6, 7]])[0]
    with ifkv.patch(plain := fresh()):
        assert torch.equal(observed.keys, ifkv.prefill_documents(plain, [[5, 6, 7]])[0].keys)
    assert seen == [3]
