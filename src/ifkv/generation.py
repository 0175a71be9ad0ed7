"""Answer from a stitched cache through the model's own ``generate()``."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ifkv.checks import check_positive, token_tensor
from ifkv.errors import InvalidInputError
from ifkv.stitched_cache import StitchedCache, check_answerable, check_cache
from ifkv.upstream import cache_keyword

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_MAX_NEW_TOKENS = 32

_RESERVED = (
    "attention_mask",
    "cache",
    "cache_implementation",
    "input_ids",
    "inputs",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "use_cache",
)
_UNDECLARED = ("tokenizer",)  # generate() takes it, for stop_strings, out of its **kwargs
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    cache: StitchedCache,
    prompt_ids: Sequence[int] | Tensor,
    **generate_kwargs: Any,
) -> Any:
    """Continue a prompt behind the cache's context with ``model.generate()``.

    The model is given the context's tokens as well as the prompt's, so whatever looks at tokens
    (repetition penalties, stopping criteria) sees what it would see after a full prefill. If
    :func:`ifkv.recompute` has run this prompt already, only its last token runs again.

    Args:
        model: A patched model.
        cache: A stitched cache in the global geometry; afterwards it ends with its context again.
        prompt_ids: Tokens to be answered, ``[Q]`` or ``[1, Q]``.
        **generate_kwargs: For ``model.generate()``: sampling, beams, ``streamer``,
            ``stop_strings`` with its ``tokenizer``, and so on. Lengths count from the prompt's
            start. ``max_new_tokens`` is 32 if nothing limits the answer.

    Returns:
        Token ids of prompt and continuation, ``[sequences, Q + new]``, or generate's own output
        object with ``return_dict_in_generate``.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: Bad ids, other rows appended behind the context, too many tokens, a
            keyword that the cache leaves no choice about, or one that generate() does not know.
        GeometryError: The cache's geometry is not global.
        FingerprintMismatchError: The cache belongs to another model.
    """
    return run_generate(model, cache, prompt_ids, generate_kwargs, keep=False)


@torch.no_grad()
def run_generate(
    model: PreTrainedModel,
    cache: StitchedCache,
    prompt_ids: Sequence[int] | Tensor,
    generate_kwargs: dict[str, Any],
    *,
    keep: bool,
) -> Any:
    """See :func:`generate`; with ``keep`` the rows that were run stay behind the context.

    Those are the prompt's and the answer's but for its last token, which has not been run; of
    beams and of several sequences, whose rows lie in copies, the prompt's but for its last.
    """
    handle = check_cache(model, cache)
    prompt = token_tensor(model, prompt_ids, "the prompt").to(model.device)
    ready = has_prompt(cache, prompt)
    if not ready:
        check_answerable(cache, "generate")
    if cache.owed is not None and len(cache.owed.slots):
        raise InvalidInputError(
            f"{len(cache.owed.slots)} rows of the context have not run yet; call ifkv.recompute "
            "before generate."
        )
    handle.rope.check_length(cache.query_position + len(prompt), "context and prompt")
    check_generate_kwargs(model, generate_kwargs)

    context = cache.context_length
    kwargs = _with_lengths(model, context, generate_kwargs)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _PromptStreamer(kwargs["streamer"], context)
    input_ids = torch.cat((cache.token_ids, prompt))[None]
    if ready:
        cache.crop(-1)  # generate() needs one row to run; the rest of the prompt is there
    sequences = _sequences(model, kwargs)
    used = cache
    if sequences > 1:
        used = cache.clone()
        used.batch_repeat_interleave(sequences)
    places = {} if cache.plain else {"position_ids": cache.positions_with(len(prompt))}
    try:
        out = cast(Any, model).generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **places,
            **cache_keyword(model, used),
            **kwargs,
        )
    finally:
        if not keep:
            cache.crop()
    if isinstance(out, Tensor):
        return out[:, context:]
    out.sequences = out.sequences[:, context:]
    return out


def has_prompt(cache: StitchedCache, prompt: Tensor) -> bool:
    """Whether the cache's context is followed by this prompt's rows and nothing else.

    Args:
        cache: A stitched cache.
        prompt: Token ids, on the model's device.
    """
    appended = cache.get_seq_length() - cache.context_length
    return (
        cache.prompt_ids is not None
        and appended == len(prompt)
        and torch.equal(cache.prompt_ids, prompt)
    )


def check_generate_kwargs(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse keywords for generate() before any work.

    Args:
        model: A model.
        kwargs: What is meant for its ``generate()``.

    Raises:
        InvalidInputError: The cache leaves no choice about one, or generate() does not know it.
    """
    known = _known_kwargs(model)
    for key in kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out."
            raise InvalidInputError(f"{key} is no option of generate(); {hint}")
    for key in _RESERVED:
        if key in kwargs:
            raise InvalidInputError(
                f"{key} cannot be given: ifkv.generate makes it from the cache and the prompt."
            )
    for key in _ASSISTED:
        if setting(model, kwargs, key) is not None:
            raise InvalidInputError(
                f"{key} asks for assisted decoding, which runs the whole context again behind a "
                "cache that holds it already; leave it out."
            )
    kind = setting(model, kwargs, "cache_implementation")
    if kind is not None:
        raise InvalidInputError(
            f"cache_implementation is {kind!r} in the generation config, but the stitched cache is "
            "the cache. Set it to None there (model.generation_config, or the one given)."
        )
    if setting(model, kwargs, "token_healing"):
        raise InvalidInputError(
            "token_healing changes the prompt's last tokens after the cache was made for them; "
            "leave it out."
        )
    if kwargs.get("max_new_tokens") is not None:
        check_positive(kwargs["max_new_tokens"], "max_new_tokens")


def setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """A setting as ``generate()`` finds it, or None.

    What a keyword does not say, a generation config given says; what that leaves out, the model's.
    """
    configs = (kwargs.get("generation_config"), model.generation_config)
    given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in given if value is not None), None)


def _known_kwargs(model: PreTrainedModel) -> set[str]:
    """What ``model.generate()`` takes: its own arguments, a config's fields, the forward's."""
    from transformers import GenerationConfig

    methods: list[Any] = [model.generate, model.forward]
    parameters = [each for method in methods for each in inspect.signature(method).parameters]
    known = {*parameters, *vars(GenerationConfig()), *_RESERVED, *_ASSISTED, *_UNDECLARED}
    return known - {"self", "kwargs"}


def _with_lengths(model: PreTrainedModel, context: int, given: dict[str, Any]) -> dict[str, Any]:
    """Lengths counted from the prompt's start become lengths counted from the context's."""
    kwargs = dict(given)
    own = copy.deepcopy(kwargs.get("generation_config"))  # the caller's stays as it is
    if own is not None:
        kwargs["generation_config"] = own
    for key in ("max_length", "min_length"):
        if kwargs.get(key) is not None:
            kwargs[key] += context
        if getattr(own, key, None) is not None:
            setattr(own, key, getattr(own, key) + context)
    # A max_length in the model's own config counts the context too, and says nothing here.
    limited = getattr(own, "max_length", None) is not None or any(
        kwargs.get(key) is not None for key in ("max_new_tokens", "max_length")
    )
    if not limited and setting(model, kwargs, "max_new_tokens") is None:
        kwargs["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
    if setting(model, kwargs, "use_cache") is False:  # as fine-tuned checkpoints often have it
        kwargs["use_cache"] = True
    return kwargs


def _sequences(model: PreTrainedModel, kwargs: dict[str, Any]) -> int:
    """How many rows generate() will expand the batch to, and the cache must have."""
    names = ("num_beams", "num_return_sequences")
    return max(int(setting(model, kwargs, name) or 1) for name in names)


class _PromptStreamer:
    """Hides the context from a streamer: the first thing it is given is the prompt."""

    def __init__(self, streamer: Any, context: int):
        self._streamer = streamer
        self._context = context

    def put(self, value: Tensor) -> None:
        if self._context:
            value, self._context = value[..., self._context :], 0
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
