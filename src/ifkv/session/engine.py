"""Engine: the model, the prompt layout, the documents and the settings behind answers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError
from ifkv.generation.checks import check_answer_settings
from ifkv.generation.settings import GenerationSettings
from ifkv.selectors import Layers, Selector, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ifkv.session.catalog import Catalog
    from ifkv.session.library import Library
    from ifkv.session.options import AskOptions
    from ifkv.session.prompt_format import PromptFormat
    from ifkv.session.ratio import Ratios


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """Engine that answers questions; a session and its conversations share one.

    Attributes:
        model: A patched model.
        tokenizer: The model's tokenizer.
        format: Layout of the model's prompts.
        prefix_ids: Tokens that every document is encoded behind.
        library: The documents.
        catalog: Sources of the documents.
        ratios: Recompute ratios, which turn ``"auto"`` into a plan.
        selector: Selector for questions that name none.
        kv_dtype: Dtype of requests' caches, as in [ifkv.stitch][].
    """

    model: PreTrainedModel
    tokenizer: Any
    format: PromptFormat
    prefix_ids: list[int]
    library: Library
    catalog: Catalog
    ratios: Ratios
    selector: Selector
    kv_dtype: torch.dtype | None

    def settings(self, options: AskOptions) -> GenerationSettings:
        """Return the settings of answers, checked before any work.

        Raises:
            InvalidInputError: A setting that an answer has no place for, or a bad one.
        """
        given = dict(options.generate_kwargs)
        if options.max_new_tokens is not None:
            given["max_new_tokens"] = options.max_new_tokens
        if given.get("tokenizer") is None:
            given["tokenizer"] = self.tokenizer  # for stop_strings
        settings = GenerationSettings.of(self.model, given)
        check_answer_settings(self.model, settings)
        return settings

    def rule(self, options: AskOptions) -> Selector:
        """Return the selector of a question, with its layers if it gives some.

        Raises:
            InvalidInputError: There is no such selector, or layers come with one that has no
                scoring layers or names its own.
        """
        layers = options.layers
        rule = self.selector if options.selector is None else resolve(options.selector)
        if layers is None:
            return rule
        found: Any = rule
        fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
        usual = {field.name: field.default for field in fields}.get("layers")
        if not isinstance(usual, Layers):
            raise InvalidInputError(
                f"layers={layers!r} is given, but the selector {rule} has no scoring layers; leave "
                "them out."
            )
        if found.layers != usual:
            raise InvalidInputError(
                f"layers={layers!r} is given, but the selector {rule} names its own; give them "
                "once."
            )
        changed: Selector = dataclasses.replace(found, layers=Layers.of(layers))
        return changed
