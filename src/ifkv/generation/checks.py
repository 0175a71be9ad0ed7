"""Checks of ``generate()`` settings that a stitched cache cannot follow, before any work."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

from ifkv.errors import InvalidInputError
from ifkv.generation.settings import GenerationSettings, refused_upstream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
# Arguments of vision-language models.
_PICTURES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "mm_token_type_ids",
    "mm_encoder_outputs",
)
_UNDECLARED = ("tokenizer",)  # generate() takes it, for stop_strings, out of its **kwargs
_ASSISTED = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "is_assistant",
    "use_mtp",
)
# Ways of decoding that transformers fetches as code from its hub.
_FETCHED = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids")
# Settings that are counts, and the least value of each.
_COUNTS = {"num_beams": 1, "num_return_sequences": 1, "min_new_tokens": 0, "min_length": 0}
_NUMBERS = ("max_time", "temperature", "guidance_scale", "repetition_penalty", "length_penalty")
# Outputs beside the tokens, which an Answer cannot hold.
_BESIDE = (
    "streamer",
    "return_dict_in_generate",
    "num_return_sequences",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "custom_generate",
)


def check_settings(model: PreTrainedModel, settings: GenerationSettings) -> None:
    """Refuse settings that [ifkv.generate][] cannot follow.

    Raises:
        InvalidInputError: A keyword that ifkv sets itself or that generate() does not know, or a
            setting that cannot be followed, naming the place where it was set.
    """
    _check_keywords(model, settings)
    check_configs(settings)
    _check_values(model, settings)


def check_answer_settings(model: PreTrainedModel, settings: GenerationSettings) -> None:
    """Refuse settings of one answer: as `check_settings`, and outputs that it cannot hold.

    Raises:
        InvalidInputError: As of `check_settings`.
    """
    for name in _BESIDE:
        if name in settings.given:
            raise InvalidInputError(
                f"{name}={settings.given[name]!r} cannot be given here, where one Answer is made; "
                "use ifkv.generate for it (and stream= for streaming)."
            )
    check_one_answer(settings)
    check_settings(model, settings)


def check_one_answer(settings: GenerationSettings) -> None:
    """Refuse settings that ask for several answers to one question.

    Raises:
        InvalidInputError: They ask for several.
    """
    many, place = settings.said("num_return_sequences")
    if many is not None and many != 1:
        raise InvalidInputError(
            f"num_return_sequences is {many!r} {place}, but one Answer is made; set it to 1 there, "
            "or use ifkv.generate."
        )


def check_configs(settings: GenerationSettings) -> None:
    """Refuse settings that can be refused without a model.

    Raises:
        InvalidInputError: As of `check_settings`.
    """
    for name in _ASSISTED:
        value, place = settings.said(name)
        if value is not None and value is not False:
            raise InvalidInputError(
                f"{name} asks for assisted decoding, which runs the whole context again behind a "
                f"cache that holds it already; leave it out (it is {place})."
            )
    kind, place = settings.said("cache_implementation")
    if kind is not None:
        raise InvalidInputError(
            f"cache_implementation is {kind!r} {place}, but the stitched cache is the cache. Set "
            "it to None there."
        )
    healing, place = settings.said("token_healing")
    if healing:
        raise InvalidInputError(
            "token_healing changes the prompt's last tokens after the cache was made for them; "
            f"leave it out (it is {place})."
        )
    groups, place = settings.said("num_beam_groups")
    fetched = [name for name in _FETCHED if settings.get(name)]
    if groups is not None and groups != 1:
        fetched.append("num_beam_groups")
    if fetched:
        value, place = settings.said(fetched[0])
        raise InvalidInputError(
            f"{fetched[0]} is {value!r} {place}, which asks for a way of decoding that is no part "
            "of transformers any more but code from its hub; leave it out."
        )
    settings.check_lengths()
    _check_numbers(settings)
    _ = settings.effective  # refuses combinations


def _check_numbers(settings: GenerationSettings) -> None:
    """Refuse counts that are no whole numbers, and numbers that are none."""
    for name, least in _COUNTS.items():
        value, place = settings.said(name)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and value >= least):
            raise InvalidInputError(
                f"{name} is {value!r} {place}, but must be a whole number of at least {least}."
            )
    for name in _NUMBERS:
        value, place = settings.said(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise InvalidInputError(f"{name} is {value!r} {place}, but must be a number.")


def _check_keywords(model: PreTrainedModel, settings: GenerationSettings) -> None:
    """Refuse keywords that generate() does not know, that ifkv sets, or of the wrong type."""
    from transformers import GenerationConfig

    known = _known_keywords(model)
    for key in settings.given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out."
            raise InvalidInputError(f"{key} is no option of generate(); {hint}")
    for key in _RESERVED:
        if key in settings.given:
            raise InvalidInputError(
                f"{key} cannot be given: ifkv.generate makes it from the cache and the prompt."
            )
    for key in _PICTURES:
        if settings.given.get(key) is not None:
            raise InvalidInputError(
                f"{key} cannot be given: a prompt is text. Put pictures into documents "
                "(ifkv.ImageDocument)."
            )
    config = settings.config
    if config is not None and not isinstance(config, GenerationConfig):
        raise InvalidInputError(
            f"generation_config is a {type(config).__name__}; give a "
            "transformers.GenerationConfig, or its settings as keywords."
        )
    for name in ("stopping_criteria", "logits_processor"):
        functions(name, settings.given.get(name))


def functions(name: str, given: Any) -> list[Any]:
    """Return the functions of a keyword as a list; none for None.

    Args:
        name: The keyword.
        given: Its value.

    Raises:
        InvalidInputError: It is no list of functions.
    """
    if given is None:
        return []
    found = list(given) if isinstance(given, Iterable) else [given]
    if not isinstance(given, Iterable) or not all(map(callable, found)):
        raise InvalidInputError(f"{name} is {given!r}; give a list of functions.")
    return found


def _known_keywords(model: PreTrainedModel) -> set[str]:
    """Return the keywords of ``model.generate()``: its own, a config's fields, the forward's."""
    from transformers import GenerationConfig

    methods: list[Any] = [model.generate, model.forward]
    parameters = [each for method in methods for each in inspect.signature(method).parameters]
    known = {*parameters, *vars(GenerationConfig()), *_RESERVED, *_ASSISTED, *_UNDECLARED}
    return known - {"self", "kwargs"}


def _check_values(model: PreTrainedModel, settings: GenerationSettings) -> None:
    """Refuse values that transformers would refuse only after the recompute."""
    strings, place = settings.said("stop_strings")
    if strings is not None:
        listed = [strings] if isinstance(strings, str) else strings
        if not isinstance(listed, list | tuple) or not all(isinstance(s, str) for s in listed):
            raise InvalidInputError(
                f"stop_strings is {strings!r} {place}; give a text or a list of texts."
            )
        if settings.given.get("tokenizer") is None:
            raise InvalidInputError(
                f"stop_strings {place} are found with the tokenizer; give tokenizer=, too."
            )
    upstream: Any = model
    misplaced: dict[str, Any] = getattr(upstream.config, "_get_generation_parameters", dict)()
    if misplaced and settings.config is None:
        raise InvalidInputError(
            f"model.config holds {misplaced}, which generate() does not follow; set them in "
            "model.generation_config."
        )
    config = copy.deepcopy(settings.effective)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    arguments = {
        "generation_config": config,
        "input_ids_seq_length": 1,
        "encoder_input_ids": ids,
        "device": model.device,
        "model_kwargs": {},
    }
    make = getattr(upstream, "_get_logits_processor", None)
    prepare = getattr(upstream, "_prepare_special_tokens", None)
    if make is None or prepare is None:
        return  # generate() checks it later
    try:
        prepare(config, True, device=model.device)
        make(**arguments)
    except IndexError:  # upstream takes the first stop token for padding
        raise InvalidInputError(
            f"eos_token_id is an empty list {settings.said('eos_token_id')[1]}; give at least one "
            "token, or -1 for none."
        ) from None
    except (ValueError, TypeError) as error:
        raise refused_upstream(error) from error
    except Exception as error:  # of a value that upstream does not look at, but stumbles over
        said = {name: v for name, v in config.to_diff_dict().items() if name[0] != "_"}
        said.pop("transformers_version", None)
        raise InvalidInputError(
            f"generate() fails over these settings: {said} ({error}); correct what is wrong among "
            "them."
        ) from error
