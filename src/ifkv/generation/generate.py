"""Answer from a stitched cache through the model's own ``generate()``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ifkv.cache.checks import check_answerable, check_cache
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import InvalidInputError
from ifkv.generation.checks import check_settings
from ifkv.generation.settings import GenerationSettings
from ifkv.models.compat import cache_keyword
from ifkv.utils.checks import token_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    cache: StitchedCache,
    prompt_ids: Sequence[int] | Tensor,
    **generate_kwargs: Any,
) -> Any:
    """Continue a prompt behind the cache's context with ``model.generate()``.

    The model is given the context's tokens as well as the prompt's, so repetition
    penalties and stopping criteria see the same tokens as after a full prefill. If
    [ifkv.recompute][] has run this prompt already, only its last token runs again.

    Args:
        model: A patched model.
        cache: A stitched cache in the global geometry; afterwards it ends with its context again.
        prompt_ids: Tokens to be answered, ``[Q]`` or ``[1, Q]``.
        **generate_kwargs: For ``model.generate()``: sampling, beams, ``streamer``,
            ``stop_strings`` with its ``tokenizer``, and so on. The model's generation config
            decides what they leave out. Lengths count from the prompt's start (in the model's own
            config from the context's). ``max_new_tokens`` is 64 if nothing limits the answer.

    Returns:
        Token ids of prompt and continuation, ``[sequences, Q + new]``, or generate's own output
        object with ``return_dict_in_generate``.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: Bad ids, other rows appended behind the context, too many tokens, a
            keyword that ifkv sets itself, or one that generate() does not know.
        GeometryError: The cache's geometry is not global.
        FingerprintMismatchError: The cache belongs to another model.
    """
    check_cache(model, cache)  # first: only a patched model has settings
    settings = GenerationSettings.of(model, generate_kwargs)
    check_settings(model, settings)
    return run_generate(model, cache, prompt_ids, settings, keep=False)


@torch.no_grad()
def run_generate(
    model: PreTrainedModel,
    cache: StitchedCache,
    prompt_ids: Sequence[int] | Tensor,
    settings: GenerationSettings,
    *,
    keep: bool,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    pad_token_id: int | None = None,
) -> Any:
    """Run `generate` with checked settings; with ``keep`` its rows stay behind the context.

    Those are the rows of the prompt and of the answer without its last token, which was never run.
    Beams and several sequences run in copies, so only the prompt's rows without the last one stay.

    ``overrides`` come before the settings; ``pad_token_id`` is used if they have none.
    """
    handle = check_cache(model, cache)
    prompt = token_tensor(model, prompt_ids, "the prompt").to(model.device)
    ready = has_prompt(cache, prompt)
    if not ready:
        check_answerable(cache, "generate")
    if cache.pending is not None and len(cache.pending.slots):
        raise InvalidInputError(
            f"{len(cache.pending.slots)} rows of the context have not run yet; call ifkv.recompute "
            "before generate."
        )
    handle.rope.check_length(cache.query_position + len(prompt), "context and prompt")

    context = cache.context_length
    kwargs = settings.keywords(context, len(prompt), overrides=overrides, pad_token_id=pad_token_id)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _PromptStreamer(kwargs["streamer"], context)
    input_ids = torch.cat((cache.token_ids, prompt))[None]
    if ready:
        cache.crop(-1)  # generate() needs one row to run
    sequences = settings.sequences
    used = cache
    if sequences > 1:
        used = cache.clone()
        used.batch_repeat_interleave(sequences)
    places = {}
    if not cache.plain or cache.axes > 1:  # a model of several axes would take another request's
        places = {"position_ids": cache.positions_with(len(prompt))}
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
    """True if the cache's context is followed by this prompt's rows and nothing else.

    Args:
        cache: A stitched cache.
        prompt: Token ids, on the model's device.
    """
    return (
        cache.prompt_ids is not None
        and cache.appended == len(prompt)
        and torch.equal(cache.prompt_ids, prompt)
    )


class _PromptStreamer:
    """Streamer that hides the context from another one, which gets the prompt first."""

    def __init__(self, streamer: Any, context: int):
        self._streamer = streamer
        self._context = context

    def put(self, value: Tensor) -> None:
        if self._context:
            value, self._context = value[..., self._context :], 0
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
