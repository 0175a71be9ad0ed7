"""Documents of ``ifkv ask``: the files given or those of a store, all of them or the best few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ifkv.cli.compare_and_show import add_documents, say_documents
from ifkv.cli.interrupts import documents_kept
from ifkv.cli.output_paths import check_store
from ifkv.cli.read_files import read_corpus
from ifkv.cli.split_option import cut
from ifkv.errors import InvalidInputError
from ifkv.session.retrieval import load_bm25s
from ifkv.store import MemoryStore, session_store

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig

    from ifkv.session.prompt_format import PromptFormat
    from ifkv.session.session import Session
    from ifkv.store import DocumentStore

# Refuse documents, as token ids, that leave no room for the question and its answer.
CheckRoom = Callable[[Sequence[Sequence[int]]], None]


class DocumentChoice:
    """Choice of the documents that a question is asked over.

    Everything that needs no model is checked when the choice is made.

    Args:
        files: Files to ask over; without any, the documents of the store.
        only: Patterns of the titles or paths of stored documents; all documents if None.
        retrieve: Number of documents to retrieve for the question; all of them if None.
        split: Largest number of tokens of a document that files are cut into; None cuts nothing.
        field: Field of a JSONL line that holds the text.
        store: Folder or URL of the store, or ``memory``; the user's cache folder if None.
        surrogate: Texts of the surrogate context that documents are encoded behind, or None.

    Raises:
        InvalidInputError: The options contradict one another, a file cannot be read, there is no
            store to ask over, or the package for retrieval is not installed.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        only: Sequence[str] | None,
        retrieve: int | None,
        split: int | None,
        field: str,
        store: str | None,
        surrogate: Sequence[str] | None = None,
    ):
        if files and only:
            raise InvalidInputError(
                f"--only {only[0]} names documents of a store, and files were given, too; "
                "leave one of them out."
            )
        if not files and split is not None:
            raise InvalidInputError(
                f"--split {split} cuts files, and none was given; documents of a store stay as "
                "they were encoded."
            )
        if not files:
            check_store(store)
        if retrieve is not None:
            load_bm25s()
        self._from_files = bool(files)
        self._texts = read_corpus(files, field)
        self._only = only
        self._retrieve = retrieve
        self._split = split
        self._store = store
        self._surrogate = surrogate
        self._token_ids: list[list[int]] = []

    def tokenize(
        self, layout: PromptFormat, config: PretrainedConfig, check_room: CheckRoom
    ) -> None:
        """Cut the files into documents, and refuse those that the model cannot take.

        Args:
            layout: Layout of the model's requests.
            config: The model's config.
            check_room: Called with all documents, if all of them are asked over.

        Raises:
            InvalidInputError: A document, or the whole request, is too long for the model.
        """
        self._token_ids = [
            document.ids
            for document in cut(layout, config, self._texts, self._split, self._surrogate)
        ]
        if self._from_files and self._retrieve is None:
            check_room(self._token_ids)

    def open_store(self) -> DocumentStore:
        """Return the store that documents are kept in."""
        return MemoryStore() if self._store == "memory" else session_store(self._store)

    def kept_sentence(self, session: Session) -> Callable[[], str]:
        """Return a function that says what an interruption leaves in the store."""
        if not self._from_files:
            return lambda: "The store is unchanged."
        if self._store == "memory":
            return lambda: "With --store memory nothing is kept."
        return documents_kept(
            session.store, session.model, self._token_ids, session.prefix_ids, session.surrogate
        )

    def keys(
        self,
        console: Console,
        session: Session,
        question: str,
        check_room: CheckRoom,
        *,
        say: bool,
    ) -> list[str]:
        """Add the files to the session or look the documents up, and retrieve if asked.

        Args:
            console: Console that the documents are named on.
            session: A session over the model and the store of `open_store`.
            question: The question, for retrieval.
            check_room: Called with the documents, if they are retrieved or come from the store.
            say: True to print the times of prefilling files.

        Returns:
            Keys of the documents, in the order in which they are asked over.

        Raises:
            InvalidInputError: No stored document matches, or the request is too long.
        """
        if self._from_files:
            texts, sources = (
                [text for _, text in self._texts],
                [source for source, _ in self._texts],
            )
            keys = add_documents(console, session, texts, sources, split=self._split, say=say)
        else:
            keys = session.stored(self._only)
        if self._retrieve is not None:
            keys = session.retrieve(question, self._retrieve, documents=keys)
        if self._retrieve is not None or not self._from_files:
            prefix = len(session.prefix_ids)
            check_room([session.context_ids([key])[prefix:].tolist() for key in keys])
            say_documents(console, session, keys)
        return keys
