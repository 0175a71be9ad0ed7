"""A tokenizer's chat template: messages in, the same text and token ids every day."""

from __future__ import annotations

import copy
import datetime
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from ifkv.errors import InvalidInputError

Message = dict[str, str]
# The date that is written where a template prints today's: the one that Llama's own templates
# print where there is no clock. Any other would do that stays the same.
FROZEN_DATE = datetime.date(2024, 7, 26)
# Two moments that are written differently in every format, of dates and of times of day.
_DAYS = (datetime.date(2001, 2, 3), datetime.datetime(2018, 11, 25, 13, 24, 56))
# Before a template: its clock, which knows the formats that are written in the template. Upstream
# hands templates no functions of ours. The line's end goes with the block.
_CLOCK = (
    "{% macro strftime_now(format) %}{{ ifkv_dates[format] if format in ifkv_dates else "
    "raise_exception('strftime_now is called with a format that the template does not spell out') "
    "}}{% endmacro %}\n"
)
# Of apply_chat_template's parameters those that are for a template to read.
_READ = frozenset({"tools", "documents"})


class ChatTemplate:
    """Layout of messages by a tokenizer.

    By its Jinja template, by its class's own ``apply_chat_template``, or without either, one text
    after another.

    Args:
        tokenizer: A tokenizer from transformers.
        variables: Further variables of the template, such as ``{"enable_thinking": False}``.
        date: The date to write where the template prints today's: a date, as text such as
            ``"2026-01-31"``, or ``"today"``. `FROZEN_DATE` if None.
        system: Whether messages begin with a system prompt, in whose place some templates have
            one of their own, with the date.

    Attributes:
        by_class: Whether the tokenizer's class lays messages out by itself.
        date: The date that is written where the template asks for today's.
        dated: Whether it does.
        literals: All that the template itself can write, its literal texts one after another.

    Raises:
        InvalidInputError: A variable or date that the template does not use, or no date.
    """

    def __init__(
        self,
        tokenizer: Any,
        variables: Mapping[str, Any] | None = None,
        date: datetime.date | str | None = None,
        *,
        system: bool = False,
    ):
        if not isinstance(variables, Mapping | None):
            raise InvalidInputError(
                f"chat_template_kwargs is {variables!r}; give the names and values of variables of "
                "the chat template, such as {'enable_thinking': False}."
            )
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        self.by_class = _has_own_way(tokenizer)
        self._source: str | None = None
        self.literals = ""
        self._constants: list[str] = []
        self._read: set[str] = set()
        if self.by_class:
            own = inspect.signature(tokenizer.apply_chat_template).parameters.values()
            self._read = {each.name for each in own if each.kind != each.VAR_KEYWORD}
        elif getattr(tokenizer, "chat_template", None):
            self._source = _source(tokenizer, self._variables.get("tools"))
            tree = _tree(self._source)
            self._constants = _constants(tree)
            texts = [node.data for node in tree.find_all(nodes.TemplateData)]
            self.literals = "\0".join([*texts, *self._constants])
            self._read = find_undeclared_variables(tree)
        self._check_variables()
        self.date, self.dated = _date(date), False
        if "strftime_now" in self._read:
            roles = ("system", "user") if system else ("user",)
            probe = [{"role": role, "content": "?"} for role in roles]
            self.dated = self._on(_DAYS[0], probe) != self._on(_DAYS[1], probe)
        if date is not None and not self.dated:
            raise InvalidInputError(
                f"date is {date!r}, but this tokenizer's chat template prints no date; leave it "
                "out, or write the date into the instruction or the system prompt."
            )

    def _on(self, date: datetime.date, messages: Sequence[Message]) -> str:
        """Render messages on another date."""
        other = copy.copy(self)
        other.date = date
        return other.render(messages)

    @property
    def exists(self) -> bool:
        """True if there is one; otherwise messages are plain text."""
        return self.by_class or self._source is not None

    @property
    def another(self) -> str:
        """Return how to get another template, as the end of a sentence."""
        if self.by_class:
            return (
                "give a tokenizer that has a Jinja template in place of this "
                f"{type(self._tokenizer).__name__}, such as PreTrainedTokenizerFast.from_pretrained"
            )
        return "set tokenizer.chat_template to one that does, or to None"

    def render(self, messages: Sequence[Message]) -> str:
        """Render messages, ready for an answer.

        Raises:
            InvalidInputError: The template refuses them.
        """
        if self.by_class:
            # Not tokenize=False, of which Mistral's warns: the ids are the truth, here their text.
            text: str = self._tokenizer.decode(self.token_ids(messages))
            return text
        if self._source is None:
            ends = {"user": "\nAnswer:", "assistant": "\n\n"}
            bos = self._tokenizer.bos_token or ""
            return bos + "".join(one["content"] + ends[one["role"]] for one in messages)
        rendered: str = self._apply(messages, tokenize=False)
        return rendered

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids that the tokenizer makes of messages, by its template or its class.

        Raises:
            InvalidInputError: The template refuses them.
        """
        return list(self._apply(messages, tokenize=True, return_dict=False))

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        if self._source is not None and "strftime_now" in self._read:
            options["chat_template"] = _CLOCK + self._source
            options["ifkv_dates"] = {each: _written(self.date, each) for each in self._constants}
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, **self._variables, **options
            )
        except Exception as error:  # whatever a template, or somebody's class, raises
            said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
            roles = ", ".join(one["role"] for one in messages)
            raise InvalidInputError(
                f"the tokenizer's chat template does not take messages of {roles} ({said}); "
                f"{self.another}."
            ) from error

    def _check_variables(self) -> None:
        """Raise if a variable changes nothing, or something that it must not change."""
        if not all(isinstance(name, str) for name in self._variables):
            raise InvalidInputError(
                f"chat_template_kwargs has the names {list(self._variables)}; names are texts."
            )
        own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        fixed = {*own, "messages", "strftime_now", "ifkv_dates"} - _READ
        for name in self._variables:
            if not self.exists:
                raise InvalidInputError(
                    f"chat_template_kwargs names {name!r}, but the tokenizer has no chat template; "
                    "leave it out."
                )
            if name in fixed:
                raise InvalidInputError(
                    f"chat_template_kwargs names {name!r}, which is not the caller's to set; give "
                    "variables that the chat template reads."
                )
            if name not in self._read:
                known = sorted(self._read - fixed)
                raise InvalidInputError(
                    f"chat_template_kwargs names {name!r}, which this tokenizer's chat template "
                    f"does not read; it reads {', '.join(known) or 'none'}."
                )


class _Generation(Extension):
    """The block in which templates put what a model is to be trained on."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return its statements unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _has_own_way(tokenizer: Any) -> bool:
    """True if the tokenizer's class lays messages out by itself, without a Jinja template."""
    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is not None and own is not PreTrainedTokenizerBase.apply_chat_template


def _source(tokenizer: Any, tools: Any) -> str:
    """Return the tokenizer's Jinja template; it may have several.

    Raises:
        InvalidInputError: It has several, and none by default.
    """
    try:
        source: str = tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise InvalidInputError(
            f"the tokenizer has no chat template by default ({str(error).splitlines()[0]}); set "
            "tokenizer.chat_template to the one that is meant."
        ) from error
    return source


def _tree(source: str) -> nodes.Template:
    """Parse a template into a tree.

    Raises:
        InvalidInputError: It is no template.
    """
    try:
        return jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidInputError(
            f"the tokenizer's chat template cannot be read ({error}); set "
            "tokenizer.chat_template to one that can."
        ) from error


def _constants(tree: nodes.Template) -> list[str]:
    return [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def _written(date: datetime.date, pattern: str) -> str:
    """Format a date; return the empty text for what is no format, as most constants are."""
    try:
        return date.strftime(pattern)
    except ValueError:
        return ""


def _date(date: datetime.date | str | None) -> datetime.date:
    """Return the date that a caller names.

    Raises:
        InvalidInputError: It is none.
    """
    if date is None:
        return FROZEN_DATE
    if isinstance(date, datetime.date):
        return date
    try:
        return datetime.date.today() if date == "today" else datetime.date.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"date is {date!r}; give a date, as text in the form 2026-01-31, or 'today'."
        ) from error
