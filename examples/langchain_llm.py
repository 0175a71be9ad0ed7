"""ifkv as a LangChain language model: `pip install langchain-core`.

A chain hands its retrieved documents to `invoke(question, documents=[...])`; they are encoded when
they are first seen, and found again by content ever after.
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

from langchain_core.language_models.llms import LLM
from langchain_core.outputs import GenerationChunk

import ifkv


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

    def _ask(self, prompt: str, documents: list[str], **options: Any) -> ifkv.Answer:
        keys = self.session.add(list(documents))
        options.setdefault("ratio", self.ratio)
        options.setdefault("max_new_tokens", self.max_new_tokens)
        return self.session.ask(prompt, documents=keys, **options)

    def _call(self, prompt: str, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> str:
        text = self._ask(prompt, kwargs.pop("documents", []), **kwargs).text
        for word in stop or []:
            text = text.split(word, 1)[0]
        return text

    def _stream(
        self, prompt: str, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[GenerationChunk]:
        if stop:
            raise ValueError("stop words are not supported when streaming; use invoke().")
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self._ask(prompt, kwargs.pop("documents", []), stream=pieces.put, **kwargs)
                pieces.put(None)
            except BaseException as error:  # raised again where the caller reads
                pieces.put(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield GenerationChunk(text=piece)
        thread.join()
