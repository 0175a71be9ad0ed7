"""Questions and texts: one object that does all steps.

Belongs here: sessions, conversations, prompt formats, answers, streams of answers.
Not here: the steps themselves; a session calls them and adds nothing to their numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.utils.lazy import lazily

if TYPE_CHECKING:
    from ifkv.session.answer import Answer, Prepared
    from ifkv.session.answer_stream import AnswerStream
    from ifkv.session.conversation import Conversation
    from ifkv.session.session import Session

__all__ = ["Answer", "AnswerStream", "Conversation", "Prepared", "Session"]

__getattr__ = lazily(
    __name__,
    {
        "Answer": "answer",
        "AnswerStream": "answer_stream",
        "Conversation": "conversation",
        "Prepared": "answer",
        "Session": "session",
    },
)
