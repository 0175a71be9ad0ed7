"""Control tokens: the template's own become ids; in a document or a question they stay letters.

A tokenizer's ``<|im_end|>`` ends a message wherever it stands in a text, also where a document
quotes it, or a hostile one forges it. Here a text is a list of pieces, each either the template's,
in which control tokens are meant, or a reader's, in which they are letters like any others.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Tokenizer

from ifkv.errors import InvalidInputError

# What control tokens in documents and questions are: letters, or control tokens as the template's.
ControlTokens = Literal["text", "parse"]
# Nobody writes words in this shape, and some tokenizers do not call all of them special.
_BRACKETED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
        text: Its text.
        template: Whether control tokens in it are meant as such.
    """

    text: str
    template: bool


class TextEncoder:
    """Token ids of texts that are written by several hands.

    Control tokens are all special tokens, and those other added tokens that the chat template
    writes, that ``tokenizer.chat_control_tokens`` names or that look like ``<|this|>``. Further
    added tokens are words that somebody taught the tokenizer, and remain theirs everywhere.

    Args:
        tokenizer: A tokenizer from transformers.
        written: Text that the chat template writes.
        control_tokens: ``"text"``, or ``"parse"`` to take control tokens as such in every piece.

    Raises:
        InvalidInputError: ``control_tokens`` is neither.
    """

    def __init__(self, tokenizer: Any, written: str = "", control_tokens: ControlTokens = "text"):
        if control_tokens not in ("text", "parse"):
            raise InvalidInputError(
                f"control_tokens is {control_tokens!r}; give 'text', by which they are letters in "
                "documents and questions, or 'parse', by which they are control tokens there, too."
            )
        self._tokenizer = tokenizer
        self._parsing = control_tokens == "parse"
        self._ids = _control_ids(tokenizer, frozenset(self._plainly(written)))
        self._strings = _any_of(self._ids)
        # Letters that a tokenizer does not know become this one without anybody writing it.
        self._unknown: str | None = getattr(tokenizer, "unk_token", None)
        self._controls = frozenset(self._ids.values()) - {self._ids.get(self._unknown or "")}
        self._reads_them = not self._ids or any(
            control in self._plainly(text) for text, control in self._ids.items()
        )

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Return the token ids of a text; nothing is added to it.

        Without control tokens in a reader's pieces this is what the tokenizer makes of the whole.

        Raises:
            InvalidInputError: The text holds half of a surrogate pair, or a control token that
                this tokenizer cannot write in letters.
        """
        if self._parsing:
            pieces = [Piece(piece.text, template=True) for piece in pieces]
        text = "".join(piece.text for piece in pieces)
        _check_decoded(text)
        if not self._reads_them:
            return self._around_controls(pieces)
        ids = self._plainly(text)
        if self._parsing:
            return ids
        meant = [
            token
            for piece in pieces
            if piece.template
            for token in self._plainly(piece.text)
            if token in self._controls
        ]
        written = any(
            self._unknown is not None and self._unknown in piece.text
            for piece in pieces
            if not piece.template
        )
        if written or self._controls_in(ids) != meant:
            ids = self._with_letters(pieces)
        if self._controls_in(ids) != meant:
            letters = "".join(piece.text for piece in pieces if not piece.template)
            found = self._strings.search(letters)
            raise InvalidInputError(
                f"a text holds {found[0] if found else letters[:40]!r}, of which this tokenizer "
                f"({type(self._tokenizer).__name__}) makes a control token wherever it stands. "
                "Take it out of the text, or give control_tokens='parse' if it is meant as one."
            )
        return ids

    def _controls_in(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._controls]

    def _plainly(self, text: str) -> list[int]:
        """Return what the tokenizer makes of a text by itself."""
        options: dict[str, Any] = {"add_special_tokens": False}
        # Not verbose: what is too long is refused by us, and a text may yet be cut into pieces.
        options["verbose"] = False
        if getattr(self._tokenizer, "split_special_tokens", False):
            options["split_special_tokens"] = False  # or the template's would be letters, too
        ids: list[int] = self._tokenizer(text, **options)["input_ids"]
        return ids

    def _around_controls(self, pieces: Sequence[Piece]) -> list[int]:
        """Encode text around control tokens, which are put in by id."""
        ids: list[int] = []
        letters = ""
        for piece in pieces:
            start = 0
            for found in self._strings.finditer(piece.text) if piece.template else ():
                letters += piece.text[start : found.start()]
                ids += self._plainly(letters) if letters else []
                ids.append(self._ids[found[0]])
                letters, start = "", found.end()
            letters += piece.text[start:]
        return ids + (self._plainly(letters) if letters else [])

    def _with_letters(self, pieces: Sequence[Piece]) -> list[int]:
        """Encode by a tokenizer that knows the template's control tokens under other names."""
        if self._renamed is None:
            return self._plainly("".join(piece.text for piece in pieces))
        core, names, back = self._renamed
        text = "".join(
            self._strings.sub(lambda found: names[found[0]], piece.text)
            if piece.template
            else piece.text
            for piece in pieces
        )
        core.encode_special_tokens = True  # here, since copies of a tokenizer forget it
        made: list[int] = core.encode(text, add_special_tokens=False).ids
        return [back.get(token, token) for token in made]

    @functools.cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]] | None:
        """Return a copy whose control tokens have names that no text can guess.

        A copy, since the tokenizer itself may be in use by other threads: for these, too, a switch
        such as ``split_special_tokens`` would hold.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        core = Tokenizer.from_str(backend.to_str())
        core.no_truncation()
        core.no_padding()
        added = {token.content: token for token in core.get_added_tokens_decoder().values()}
        names, back = {}, {}
        nonce = secrets.token_hex(8)
        for text, control in self._ids.items():
            kind = added.get(text) or AddedToken(text, normalized=False)
            core.add_special_tokens([AddedToken(text, special=True, normalized=kind.normalized)])
            names[text] = f"\ue000{nonce}.{control}\ue001"
            core.add_tokens(
                [
                    AddedToken(
                        names[text],
                        lstrip=kind.lstrip,
                        rstrip=kind.rstrip,
                        normalized=kind.normalized,
                    )
                ]
            )
            renamed = core.token_to_id(names[text])
            assert renamed is not None
            back[renamed] = control
        return core, names, back


def _control_ids(tokenizer: Any, written: frozenset[int]) -> dict[str, int]:
    """Return the ids of a tokenizer's control tokens by their texts."""
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", None)
    named = frozenset(getattr(tokenizer, "chat_control_tokens", None) or ())
    for index, token in added.items() if isinstance(added, dict) else ():
        text = str(token.content)
        # Some have runs of spaces for tokens, which templates write as anybody does.
        in_template = index in written and not text.isspace()
        if token.special or in_template or text in named or _BRACKETED.fullmatch(text):
            found[text] = index
    return {text: index for text, index in found.items() if text}


def _any_of(texts: Any) -> re.Pattern[str]:
    """Return a pattern that matches any of these texts, the longest first; none matches nothing."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _check_decoded(text: str) -> None:
    """Raise if a text was decoded wrongly.

    Raises:
        InvalidInputError: It holds half of a surrogate pair.
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
