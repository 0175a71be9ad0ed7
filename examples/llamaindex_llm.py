"""ifkv as a LlamaIndex language model: `pip install llama-index-core`.

A query engine pastes its passages into the prompt as text. To reuse caches they must stay apart, so
here they are given beside it: `llm.complete(question, documents=[node.get_content(), ...])`.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback


class IfkvLLM(CustomLLM):
    """Answers the prompt over documents given at the call."""

    session: Any
    ratio: float = 0.15
    max_new_tokens: int = 64
    context_window: int = 8192

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex asks of a model."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_new_tokens,
            model_name=getattr(self.session.model, "name_or_path", "ifkv"),
        )

    @llm_completion_callback()
    def complete(
        self, prompt: str, formatted: bool = False, *, documents: Any = (), **kwargs: Any
    ) -> CompletionResponse:
        """Answer over documents."""
        keys = self.session.add(list(documents))
        answer = self.session.ask(
            prompt, documents=keys, ratio=self.ratio, max_new_tokens=self.max_new_tokens
        )
        return CompletionResponse(text=answer.text, raw={"ttft_seconds": answer.ttft_seconds})

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, *, documents: Any = (), **kwargs: Any
    ) -> Any:
        """Answer over documents, piece by piece."""
        keys = self.session.add(list(documents))
        text = ""
        for piece in self.session.stream(
            prompt, documents=keys, ratio=self.ratio, max_new_tokens=self.max_new_tokens
        ):
            text += piece
            yield CompletionResponse(text=text, delta=piece)
