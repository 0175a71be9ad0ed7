"""ifkv as a LangChain language model: `pip install langchain-core`.

A chain hands its retrieved documents to `invoke(question, documents=[...])`; they are encoded when
they are first seen, and found again by content ever after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.language_models.llms import LLM
from langchain_core.outputs import GenerationChunk


class IfkvLLM(LLM):
    """Answers the prompt over documents given at the call.

    Attributes:
        session: The session whose model answers.
        ratio: Recompute ratio.
        max_new_tokens: Length of an answer at most.
    """

    session: Any
    ratio: float = 0.15
    max_new_tokens: int = 64

    @property
    def _llm_type(self) -> str:
        return "ifkv"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        name = getattr(self.session.model, "name_or_path", "")
        return {"model": name, "ratio": self.ratio, "max_new_tokens": self.max_new_tokens}

    def _options(self, documents: Any = (), **options: Any) -> dict[str, Any]:
        """What a session is asked with; documents that it does not know are encoded."""
        keys = self.session.add(list(documents))
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
