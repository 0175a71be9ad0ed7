"""LangChain and LlamaIndex over cached documents, in the frameworks' own chains, with BM25."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ifkv
from ifkv.testing import tiny_model, tiny_tokenizer

# Installed by `tox -e frameworks`; imports of frameworks stand in the tests.
pytestmark = pytest.mark.frameworks
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "frameworks.md"
TEXTS = ["The lamp in the hall is red.", "The door of the shed is green."]
QUESTION = "Is the door green, or is the lamp?"


@pytest.fixture
def session() -> ifkv.Session:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)


def run_block(title: str, session: ifkv.Session) -> dict[str, Any]:
    """What a block of the page has defined, run with a session."""
    page = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(rf'```python title="{title}"\n(.*?)```', page, re.DOTALL)
    names: dict[str, Any] = {"session": session, "__name__": "block"}
    exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
    return names


def over(session: ifkv.Session, texts: list[str], question: str = QUESTION) -> str:
    """What the session says over these texts in this order."""
    return session.ask(question, documents=session.add(texts), max_new_tokens=16).text


# LangChain


def test_the_usual_chain_answers_over_what_bm25_found_the_best_last(session: ifkv.Session) -> None:
    page = run_block("LangChain", session)
    assert page["sources"] == ["door.md", "lamp.md"]
    assert page["answer"] == page["result"]["answer"] == over(session, TEXTS)
    assert page["answer"] != over(session, TEXTS[::-1]), "the order would not be seen"
    assert page["result"]["question"] == QUESTION
    assert session.prefilled == 2, "what was found twice was encoded twice, or what was not found"


def test_the_chain_streams_and_runs_in_batches_and_asynchronously(session: ifkv.Session) -> None:
    page = run_block("LangChain", session)
    chain = page["chain"]
    said = list(page["llm"].stream(QUESTION, documents=TEXTS))
    assert list(chain.stream(QUESTION)) == said
    assert "".join(said).strip() == page["answer"]
    other = chain.invoke("Is the lamp red?")
    assert chain.batch([QUESTION, "Is the lamp red?"]) == [page["answer"], other]
    assert asyncio.run(chain.ainvoke(QUESTION)) == page["answer"]


def test_langchain_takes_documents_and_texts_beside_the_prompt(session: ifkv.Session) -> None:
    from langchain_core.documents import Document
    from langchain_core.prompts import PromptTemplate
    from langchain_llm import IfkvLLM

    llm = IfkvLLM(session=session, max_new_tokens=16)
    expected = over(session, TEXTS)
    documents = [Document(text) for text in TEXTS]
    assert llm.invoke(QUESTION, documents=TEXTS) == expected
    assert llm.invoke(QUESTION, documents=[*documents, documents[0]]) == expected
    assert "".join(llm.stream(QUESTION, documents=documents)).strip() == expected
    chain = PromptTemplate.from_template("Is the {thing} green, or is the lamp?") | llm.bind(
        documents=TEXTS
    )
    assert chain.invoke({"thing": "door"}) == expected
    assert llm.invoke(QUESTION, documents=TEXTS, stop=[expected[2:4]]) == expected[:2]


@pytest.mark.parametrize(
    ("context", "words"), [([], "empty list|no document"), ([3], "document is of type|int")]
)
def test_langchain_refuses_what_is_no_passage(
    session: ifkv.Session, context: Any, words: str
) -> None:
    from langchain_llm import IfkvLLM, over_context

    session.add(TEXTS)
    llm = IfkvLLM(session=session)
    with pytest.raises(ifkv.IfkvError, match=words):
        over_context(llm).invoke({"context": context, "question": QUESTION})
    with pytest.raises(ifkv.IfkvError, match=words):
        list(llm.stream(QUESTION, documents=context))


# LlamaIndex


def shown(nodes: list[Any]) -> list[str]:
    """Texts as LlamaIndex shows nodes to a model."""
    from llama_index.core.schema import MetadataMode

    return [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]


def test_a_query_engine_answers_over_what_bm25_found_the_best_last(session: ifkv.Session) -> None:
    page = run_block("LlamaIndex", session)
    assert page["sources"] == ["door.md", "lamp.md"]
    lamp, door, _ = page["nodes"]
    assert str(page["response"]) == over(session, shown([lamp, door]))
    assert "lamp.md" in shown([lamp])[0]
    assert session.prefilled == 2


def test_a_query_engine_streams_and_runs_asynchronously(session: ifkv.Session) -> None:
    page = run_block("LlamaIndex", session)
    engine, expected = page["engine"], str(page["response"])
    assert str(asyncio.run(engine.aquery(QUESTION))) == expected
    synthesizer = page["IfkvSynthesizer"](page["llm"], streaming=True)
    streaming = page["RetrieverQueryEngine"](page["retriever"], synthesizer)
    reply = streaming.query(QUESTION)
    assert "".join(reply.response_gen).strip() == expected
    assert [node.metadata["file"] for node in reply.source_nodes] == page["sources"]
    with pytest.raises(ValueError, match="use query"):
        asyncio.run(streaming.aquery(QUESTION))


def test_llamaindex_takes_nodes_and_texts_beside_the_prompt(session: ifkv.Session) -> None:
    page = run_block("LlamaIndex", session)
    llm, found = page["llm"], page["retriever"].retrieve(QUESTION)
    expected = over(session, shown(found))
    assert llm.complete(QUESTION, documents=found).text == expected
    assert llm.complete(QUESTION, documents=[hit.node for hit in found]).text == expected
    assert llm.complete(QUESTION, documents=shown(found)).text == expected
    said = list(llm.stream_complete(QUESTION, documents=found))
    assert "".join(piece.delta or "" for piece in said).strip() == expected
    assert said[-1].text.strip() == expected
    assert llm.metadata.num_output == 16
    assert llm.metadata.context_window == session.model.config.max_position_embeddings
    with pytest.raises(ifkv.IfkvError, match=r"empty list|no document"):
        llm.complete(QUESTION, documents=[])
