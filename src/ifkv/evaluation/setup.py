"""Setup of an evaluation: a model, and how questions are put to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.cost import ModelShape
from ifkv.documents.cache import DocumentCache
from ifkv.documents.prefill import prefill_documents
from ifkv.documents.surrogate import SurrogateContext
from ifkv.documents.token_ids import no_padding
from ifkv.errors import InvalidInputError
from ifkv.evaluation.encodings import Encoding
from ifkv.evaluation.questions import Question
from ifkv.generation.settings import DEFAULT_MAX_NEW_TOKENS
from ifkv.patching.handle import patch
from ifkv.session.prompt_format import PromptFormat, PromptOptions
from ifkv.session.splitting import fixed_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT_ANSWER = "Answer with as few words as possible and without a sentence around them."


@dataclasses.dataclass
class Bench:
    """Setup of an evaluation: a model, and how questions are put to it.

    Attributes:
        model: The model; it is patched if it is not yet.
        tokenizer: Its tokenizer; requests are laid out as in [ifkv.Session][].
        short_answer: Text after every question, so that answers can be compared with the right
            ones. The bare question that selectors may score does not have it.
        split: Tokens of a document, cut from the passages in turn; None makes every passage a
            document.
        max_new_tokens: Largest length of an answer.
        layout: Further options of the layout, such as ``system``.
    """

    model: PreTrainedModel
    tokenizer: Any
    short_answer: str = SHORT_ANSWER
    split: int | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    layout: PromptOptions = dataclasses.field(default_factory=PromptOptions)

    def __post_init__(self) -> None:
        self.format = PromptFormat(self.tokenizer, **self.layout)
        patch(self.model)
        self.shape = ModelShape.of(self.model)
        self._prefix: DocumentCache | None = None
        self._surrogates: dict[Encoding, SurrogateContext] = {}

    def parts(self, question: Question) -> list[list[int]]:
        """Return the token ids of the question's passages, or of pieces of them."""
        parts = [self.format.document_ids(passage.document) for passage in question.passages]
        if self.split is not None:
            parts = fixed_length(parts, self.split)
        if len(parts) < 2:
            raise InvalidInputError(
                f"question {question.id!r} has one document, which is exact already: there is "
                "nothing to recompute. Cut it into pieces of a fixed length (split)."
            )
        return parts

    def documents(
        self, question: Question, encoding: Encoding | None = None
    ) -> list[DocumentCache]:
        """Return the question's `parts`, prefilled alone or behind a surrogate context."""
        parts = self.parts(question)
        made = prefill_documents(
            self.model,
            parts,
            attention_mask=no_padding(parts),
            prefix=self._prefix or self.format.prefix_ids(),
            surrogate=None if encoding is None else self._surrogate(encoding),
        )
        self._prefix = made[0].prefix
        return made

    def _surrogate(self, encoding: Encoding) -> SurrogateContext:
        """Return the token ids of an encoding's texts, tokenised as documents are."""
        if encoding not in self._surrogates:
            texts = [self.format.document_ids(text) for text in encoding.texts]
            self._surrogates[encoding] = SurrogateContext.of(self.model, texts)
        return self._surrogates[encoding]

    def prompt(self, question: Question) -> list[int]:
        """Return the token ids of the prompt."""
        text = f"{question.text}\n{self.short_answer}" if self.short_answer else question.text
        return self.format.prompt_ids(text)

    def gold(self, question: Question, prompt: Sequence[int]) -> Tensor:
        """Return the token ids of the first right answer after a prompt, long ``[tokens]``."""
        space = "" if self.tokenizer.decode(prompt)[-1:].isspace() else " "
        return torch.tensor(self.format.encode(space + question.answers[0]))

    @property
    def stop(self) -> frozenset[int]:
        """Return the ids that end an answer."""
        config: Any = self.model.generation_config
        ends = config.eos_token_id if config is not None else None
        ends = self.tokenizer.eos_token_id if ends is None else ends
        if ends is None:
            return frozenset()
        return frozenset([ends] if isinstance(ends, int) else ends)
