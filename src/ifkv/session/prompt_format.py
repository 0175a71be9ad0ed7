"""Layout of a request: where a chat template's header ends and the prompt begins.

Token ids are the contract everywhere else. Here, once, text is cut into the parts that a stitched
cache is made of: a prefix, documents, and the prompt that follows them. Each part is tokenised
alone and the full sequence is their concatenation, so stitching and full prefill see the same ids.
"""

from __future__ import annotations

import datetime
import functools
import re
import warnings
from collections.abc import Mapping
from typing import Any, TypedDict

from ifkv.errors import InvalidInputError, PromptWarning
from ifkv.session.chat_template import ChatTemplate
from ifkv.session.control_tokens import ControlTokens, Piece, TextEncoder
from ifkv.session.vocabulary import check_vocabulary

# What the instruction says when the caller does not. The documents follow it.
INSTRUCTION = "Answer the question from the documents. Be brief.\n\nDocuments:\n\n"
# What stands before documents that are added to a conversation.
FURTHER = "Further documents:\n\n"
_ASKING = "Question: "
_MARK = "\ue000documents\ue001"
_QUESTION = "\ue000question\ue001"
_ANSWER = "\ue000answer\ue001"
# Around the reader's texts before the documents, to tell them from the template's.
_SYSTEM, _SYSTEM_END = "\ue000system\ue001", "\ue000/system\ue001"
_BODY = "\ue000body\ue001"
_INNER = re.compile("|".join((_SYSTEM, _SYSTEM_END, _BODY)))


class PromptOptions(TypedDict, total=False):
    """Further options of a request's layout; see `PromptFormat`."""

    system: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    date: datetime.date | str | None
    control_tokens: ControlTokens


def check_question(question: object) -> None:
    """Raise if this is no question.

    Raises:
        InvalidInputError: It is no text, or blank.
    """
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(
            f"the question is {question!r}; it needs to be text with something in it."
        )


class PromptFormat:
    """Layout of one tokenizer's requests: prefix, documents, prompt, and further turns.

    With a chat template the prefix is everything the template puts before the documents and the
    prompt carries the question and the template's end; without one they are plain text. A later
    turn is what the template puts between an answer and the next question.

    Args:
        tokenizer: A tokenizer from transformers.
        instruction: Text before the documents, part of the prefix.
        system: The system prompt, part of the prefix; the template's own if None.
        chat_template_kwargs: Further variables of the chat template.
        date: As of `ChatTemplate`.
        control_tokens: ``"text"`` takes control tokens in documents, questions, the instruction
            and the system prompt for the letters that they are written in; ``"parse"`` takes them
            for what they are in the chat template.

    Raises:
        InvalidInputError: The template changes a message or refuses or ignores a system prompt,
            text and token ids of what it writes differ, or an option is wrong.
    """

    def __init__(
        self,
        tokenizer: Any,
        instruction: str = INSTRUCTION,
        *,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: datetime.date | str | None = None,
        control_tokens: ControlTokens = "text",
    ):
        check_vocabulary(tokenizer)
        if not isinstance(instruction, str):
            raise InvalidInputError(
                f"instruction is {instruction!r}; give the text before the documents, '' for none."
            )
        self._template = ChatTemplate(
            tokenizer, chat_template_kwargs, date, system=system is not None
        )
        self._freezes = date is None and self._template.dated
        self._system = system
        self._check_system()
        self._body = f"{_within(instruction, _BODY)}{_MARK}{_ASKING}{_QUESTION}"
        self._first = self._render([self._body])
        self._check_word_for_word(instruction)
        head, rest = self._first.split(_MARK)
        self._before, self._after = rest.split(_QUESTION)
        self._prefix = _pieces(head)
        self.prefix_text = "".join(piece.text for piece in self._prefix)
        self._encoder = TextEncoder(tokenizer, self._written(), control_tokens)
        self._check_ids(self._probe(1))

    def _render(self, texts: list[str], system: str | None = None) -> str:
        """Render messages of the user and answers in turn, ready for an answer."""
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        if self._system is not None:
            system = _within(self._system, _SYSTEM, _SYSTEM_END) if system is None else system
            turns.insert(0, {"role": "system", "content": system})
        return self._template.render(turns)

    def _written(self) -> str:
        """Return all that the template writes by itself."""
        if not self._template.exists:
            return ""
        blank = "\ue000\ue001"
        rendered = self._template.render([{**turn, "content": blank} for turn in self._probe(1)])
        return f"{self._template.literals}\n{rendered.replace(blank, '')}"

    def _probe(self, questions: int) -> list[dict[str, str]]:
        """Return a conversation of words that no template treats specially."""
        roles = ("user", "assistant")
        turns = [
            {"role": roles[i % 2], "content": f"Words {i}, and more.\n\nYes."}
            for i in range(2 * questions - 1)
        ]
        return [{"role": "system", "content": "A word."}] * (self._system is not None) + turns

    def _check_system(self) -> None:
        """Raise if the system prompt is blank, or has no place in the template."""
        if self._system is None:
            return
        if not isinstance(self._system, str) or not self._system.strip():
            raise InvalidInputError(
                f"system is {self._system!r}; give text with something in it, or None for what the "
                "chat template says by itself."
            )
        if not self._template.exists:
            raise InvalidInputError(
                "a system prompt was given, but the tokenizer has no chat template to put it "
                "into; write it into the instruction."
            )
        try:
            self._render(["?"])
        except InvalidInputError as error:
            raise InvalidInputError(f"system cannot be given: {error}") from error

    def _check_word_for_word(self, instruction: str) -> None:
        """Raise if documents cannot be cut out of the template."""
        bare = f"{instruction}{_MARK}{_ASKING}{_QUESTION}"
        unmarked = _INNER.sub("", self._first) == self._render([bare], self._system)
        once = self._first.count(_BODY) == self._first.count(self._body.strip()) == 1
        if self._system is not None and (
            self._first.count(_SYSTEM) != 1
            or _within(self._system, _SYSTEM, _SYSTEM_END).strip() not in self._first
        ):
            raise InvalidInputError(
                "the tokenizer's chat template does not repeat the system prompt once and word for "
                f"word: it ignores or changes it. Write it into the instruction, or "
                f"{self._template.another}."
            )
        if not once or not unmarked:
            raise InvalidInputError(
                "the tokenizer's chat template does not repeat the user's message once and word "
                f"for word, so documents cannot be cut out of it; {self._template.another}, or use "
                "ifkv.prefill_documents and the steps after it with token ids."
            )

    def _check_ids(self, turns: list[dict[str, str]]) -> None:
        """Raise if the tokenizer's ids of a conversation are not those of its text.

        Of a Jinja template they are by definition.
        """
        if not self._template.by_class:
            return
        ids = self._encoder.encode([Piece(self._template.render(turns), template=True)])
        own = self._template.token_ids(turns)
        if ids != own:
            raise InvalidInputError(
                f"this tokenizer's chat template gives {len(own)} token ids for a conversation "
                f"whose text gives {len(ids)} others, so requests cannot be laid out by it; "
                f"{self._template.another}, or use ifkv.prefill_documents and the steps after it "
                "with token ids."
            )

    @functools.cached_property
    def opening(self) -> str:
        """Return what the template puts between an answer and the user's next message.

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
                "word and all alike, so earlier turns cannot be kept. To converse, "
                f"{self._template.another}; or ask() each question by itself."
            )
        self._check_ids(self._probe(3))
        return opening

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a reader's text; nothing is added to it.

        Raises:
            InvalidInputError: The text holds half of a surrogate pair, or a control token that
                the tokenizer cannot write in letters.
        """
        return self._encoder.encode([Piece(text, template=False)])

    def parse(self, text: str) -> list[int]:
        """Return the token ids of text whose control tokens are meant, such as a rendered template.

        Raises:
            InvalidInputError: The text holds half of a surrogate pair.
        """
        return self._encoder.encode([Piece(text, template=True)])

    def prefix_ids(self) -> list[int]:
        """Return the token ids of the prefix; warn if the template's date is frozen in it."""
        if self._freezes:
            warnings.warn(
                "the tokenizer's chat template prints today's date or time, with which no document "
                f"would be found tomorrow; {self._template.date} is printed in its place. Give "
                "date='today' to have today's (--date on the command line), or another date.",
                PromptWarning,
                stacklevel=1,
            )
        return self._encoder.encode(self._prefix)

    def document_ids(self, text: str) -> list[int]:
        """Return the token ids of a document: its text, set off by a blank line."""
        if not isinstance(text, str):
            raise InvalidInputError(
                f"the text is of type {type(text).__name__}, not str; read files, decode bytes. "
                "Session takes texts, and ifkv.prefill_documents token ids."
            )
        if not text.strip():
            raise InvalidInputError("the text is empty or blank; a document needs some.")
        return self.encode(text.rstrip("\n") + "\n\n")

    def prompt_ids(self, question: str) -> list[int]:
        """Return the token ids of the prompt that follows the documents."""
        check_question(question)
        return self._encoder.encode(self._asked(question))

    def turn_ids(self, question: str) -> list[int]:
        """Return the token ids of a later prompt, from the end of the answer before it."""
        check_question(question)
        return self._encoder.encode([Piece(self.opening, True), *self._asked(question)])

    def further_ids(self) -> list[int]:
        """Return the token ids between an answer and further documents."""
        return self._encoder.encode([Piece(self.opening, True), Piece(FURTHER, False)])

    def _asked(self, question: str) -> list[Piece]:
        """Return a question as it stands in a message, to the message's end."""
        return [
            Piece(self._before + question, template=False),
            Piece(self._after, template=True),
        ]


def _within(text: str, opening: str, end: str = "") -> str:
    """Put a text between marks, where a template that trims texts leaves them."""
    core = text.strip()
    lead = text[: len(text) - len(text.lstrip())]
    return f"{lead}{opening}{core}{end}{text[len(lead) + len(core) :]}"


def _pieces(head: str) -> list[Piece]:
    """Return what stands before the documents, cut at the marks."""
    pieces, start, template = [], 0, True
    for found in [*_INNER.finditer(head), None]:
        end = len(head) if found is None else found.start()
        pieces.append(Piece(head[start:end], template))
        if found is not None:
            start, template = found.end(), found[0] == _SYSTEM_END
    return [piece for piece in pieces if piece.text]
