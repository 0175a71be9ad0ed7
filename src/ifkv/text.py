"""From text to token ids: where a chat template's header ends and a request's prompt begins.

Token ids are the contract everywhere else. Here, once, text is cut into the parts that a stitched
cache is made of: a prefix, documents, and the prompt that follows them. Each part is tokenised
alone and the full sequence is their concatenation, so stitching and full prefill see the same ids.
"""

from __future__ import annotations

import functools
from typing import Any

from ifkv.errors import InvalidInputError

# What the instruction says when the caller does not. The documents follow it.
INSTRUCTION = "Answer the question from the documents. Be brief.\n\nDocuments:\n\n"
# What stands before documents that are added to a conversation.
FURTHER = "Further documents:\n\n"
_MARK = "\ue000documents\ue001"
_QUESTION = "\ue000question\ue001"
_ANSWER = "\ue000answer\ue001"


def check_question(question: object) -> None:
    """Refuse what is no question.

    Raises:
        InvalidInputError: It is no text, or blank.
    """
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(
            f"the question is {question!r}; it needs to be text with something in it."
        )


class PromptFormat:
    """How one tokenizer's requests are laid out: prefix, documents, prompt, and further turns.

    With a chat template the prefix is everything the template puts before the documents and the
    prompt carries the question and the template's end; without one they are plain text. A later
    turn is what the template puts between an answer and the next question.

    Args:
        tokenizer: A tokenizer from transformers.
        instruction: Text before the documents, part of the prefix.
    """

    def __init__(self, tokenizer: Any, instruction: str = INSTRUCTION):
        self._tokenizer = tokenizer
        self._body = f"{instruction}{_MARK}Question: {_QUESTION}"
        rendered = self._render([self._body])
        if rendered.count(_MARK) != 1 or rendered.count(_QUESTION) != 1:
            raise InvalidInputError(
                "the tokenizer's chat template does not repeat the user's message once and word "
                "for word, so documents cannot be cut out of it. Set tokenizer.chat_template = "
                "None, or use ifkv.prefill_documents and the steps after it with token ids."
            )
        self._first = rendered
        self.prefix_text, rest = rendered.split(_MARK)
        self._before, self._after = rest.split(_QUESTION)

    def _render(self, messages: list[str]) -> str:
        """The user's message, an answer, the user's message, and so on: ready for an answer."""
        if getattr(self._tokenizer, "chat_template", None):
            roles = ("user", "assistant")
            turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
            rendered: str = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            return rendered
        ends = ("\nAnswer:", "\n\n")
        return (self._tokenizer.bos_token or "") + "".join(
            text + ends[i % 2] for i, text in enumerate(messages)
        )

    @functools.cached_property
    def opening(self) -> str:
        """What the template puts between an answer and the next message of the user.

        Raises:
            InvalidInputError: The template does not write all turns alike, or writes one otherwise
                once others follow it, as some drop what a model thought. A conversation keeps rows
                as they were computed and cannot follow.
        """
        later = f"{self._before}{_QUESTION}"
        pieces = self._render([self._body, _ANSWER, later, _ANSWER, later]).split(_ANSWER)
        opening = pieces[-1].removesuffix(later + self._after)
        if pieces != [self._first, *2 * [opening + later + self._after]]:
            raise InvalidInputError(
                "the tokenizer's chat template does not repeat a conversation's turns word for "
                "word and all alike, so earlier turns cannot be kept. Set tokenizer.chat_template "
                "to one that does (or to None), or ask() each question by itself."
            )
        return opening

    def encode(self, text: str) -> list[int]:
        """Token ids of a part; nothing is added to it.

        Raises:
            InvalidInputError: The text holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise InvalidInputError(
                f"a text holds {half!r}, half of a surrogate pair, which stands for no character: "
                "it was decoded wrongly. Read it again, or replace it: "
                "text.encode('utf-8', 'replace').decode()."
            ) from error
        # Not verbose: what is too long is refused by us, and a text may yet be cut into pieces.
        made = self._tokenizer(text, add_special_tokens=False, verbose=False)
        ids: list[int] = made["input_ids"]
        return ids

    def prefix_ids(self) -> list[int]:
        """Token ids of the prefix."""
        return self.encode(self.prefix_text)

    def document_ids(self, text: str) -> list[int]:
        """Token ids of a document: its text, set off by a blank line."""
        if not isinstance(text, str):
            raise InvalidInputError(
                f"the text is of type {type(text).__name__}, not str; read files, decode bytes. "
                "Session takes texts, and ifkv.prefill_documents token ids."
            )
        if not text.strip():
            raise InvalidInputError("the text is empty or blank; a document needs some.")
        return self.encode(text.rstrip("\n") + "\n\n")

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt that follows the documents."""
        check_question(question)
        return self.encode(f"{self._before}{question}{self._after}")

    def turn_ids(self, question: str) -> list[int]:
        """Token ids of a later prompt, from the end of the answer before it."""
        check_question(question)
        return self.encode(f"{self.opening}{self._before}{question}{self._after}")

    def further_ids(self) -> list[int]:
        """Token ids between an answer and further documents; :meth:`prompt_ids` follow those."""
        return self.encode(self.opening + FURTHER)
