"""LangChain language model that answers by ifkv: `pip install langchain-core`.

A retrieving chain passes its documents on beside the question, not pasted into it:

    {"context": retriever, "question": RunnablePassthrough()} | over_context(IfkvLLM(session=...))

Documents are encoded when they are first seen, and found again by their content.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from langchain_core.language_models.llms import LLM
from langchain_core.outputs import GenerationChunk
from langchain_core.runnables import Runnable, RunnableLambda


class IfkvLLM(LLM):
    """Language model that answers over documents given at the call: texts or `Document`s.

    Attributes:
        session: Session whose model answers.
        ratio: Recompute ratio.
        max_new_tokens: Most tokens of an answer; the default of `Session.ask` if None.
    """

    session: Any
    ratio: float = 0.15
    max_new_tokens: int | None = None

    @property
    def _llm_type(self) -> str:
        return "ifkv"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        name = getattr(self.session.model, "name_or_path", "")
        return {"model": name, "ratio": self.ratio, "max_new_tokens": self.max_new_tokens}

    def _options(self, documents: Any = (), **options: Any) -> dict[str, Any]:
        """Return the arguments of `Session.ask`; unknown documents are encoded."""
        texts = [getattr(document, "page_content", document) for document in documents]
        keys = list(dict.fromkeys(self.session.add(texts)))  # a passage found twice is read once
        own = {"ratio": self.ratio, "max_new_tokens": self.max_new_tokens}
        return {**own, **options, "documents": keys}

    def _call(self, prompt: str, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> str:
        text: str = self.session.ask(prompt, **self._options(**kwargs)).text
        for word in stop or []:
            text = text.split(word, 1)[0]
        return text

    def _stream(
        self, prompt: str, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[GenerationChunk]:
        if stop:
            raise ValueError("stop words are not supported when streaming; use invoke().")
        for piece in self.session.stream(prompt, **self._options(**kwargs)):
            yield GenerationChunk(text=piece)


def over_context(llm: Runnable[Any, str]) -> Runnable[dict[str, Any], str]:
    """Return a step of a chain: from `{"context": documents, "question": text}` to the answer.

    A retriever puts the best match first. Here it goes last, next to the question.
    """

    def answering(given: dict[str, Any]) -> Runnable[dict[str, Any], str]:
        return itemgetter("question") | llm.bind(documents=given["context"][::-1])

    return RunnableLambda(answering)
