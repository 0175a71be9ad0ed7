"""LlamaIndex language model that answers by ifkv: `pip install llama-index-core`.

A query engine pastes its passages into the prompt as text. To reuse caches they must stay apart.
`IfkvSynthesizer` passes them to the model beside the question; the engine returns the nodes.

    engine = RetrieverQueryEngine(retriever, IfkvSynthesizer(IfkvLLM(session=session)))
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode

from ifkv.generation.settings import DEFAULT_MAX_NEW_TOKENS


class IfkvLLM(CustomLLM):
    """Language model that answers over documents given at the call: texts, nodes, scored nodes."""

    session: Any
    ratio: float = 0.15
    max_new_tokens: int | None = None

    @property
    def metadata(self) -> LLMMetadata:
        """Return the facts that LlamaIndex asks of a model."""
        return LLMMetadata(
            context_window=self.session.model.config.max_position_embeddings,
            num_output=self.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
            model_name=getattr(self.session.model, "name_or_path", "ifkv"),
        )

    def _options(self, documents: Any) -> dict[str, Any]:
        """Return the arguments of `Session.ask`; unknown documents are encoded."""
        keys = self.session.add([_text(document) for document in documents])
        return {
            "documents": list(dict.fromkeys(keys)),  # a passage found twice is read once
            "ratio": self.ratio,
            "max_new_tokens": self.max_new_tokens,
        }

    @llm_completion_callback()
    def complete(
        self, prompt: str, formatted: bool = False, *, documents: Any = (), **kwargs: Any
    ) -> CompletionResponse:
        """Answer over documents."""
        answer = self.session.ask(prompt, **self._options(documents))
        return CompletionResponse(text=answer.text, raw={"ttft_seconds": answer.ttft_seconds})

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, *, documents: Any = (), **kwargs: Any
    ) -> Any:
        """Answer over documents, piece by piece."""
        text = ""
        for piece in self.session.stream(prompt, **self._options(documents)):
            text += piece
            yield CompletionResponse(text=text, delta=piece)


class IfkvSynthesizer(BaseSynthesizer):
    """The step of a query engine behind its retriever: the answer over the passages it found.

    A retriever puts the best match first. Here it goes last, next to the question.

    Args:
        llm: Model that answers.
        streaming: Return the answer piece by piece, as the response's `response_gen`.
    """

    def __init__(self, llm: IfkvLLM, streaming: bool = False):
        super().__init__(llm=llm, streaming=streaming)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        documents = text_chunks[::-1]
        if not self._streaming:
            return self._llm.complete(query_str, documents=documents).text
        said = self._llm.stream_complete(query_str, documents=documents)
        return (piece.delta for piece in said)

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        if self._streaming:
            raise ValueError("streaming is not supported in aquery(); use query().")
        return await asyncio.to_thread(self.get_response, query_str, text_chunks)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        """Do nothing: the session lays out the request."""


def _text(document: Any) -> Any:
    """Return a passage as the model reads it: a node with its metadata for the model."""
    if not hasattr(document, "get_content"):
        return document
    return document.get_content(metadata_mode=MetadataMode.LLM)
