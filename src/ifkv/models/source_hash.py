"""Hashes of upstream's code, by which code that has been read is told from code that has not."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

# Annotations and names of type parameters say nothing about what is computed; the others differ
# between releases of Python, or follow from where a name stands.
_CLOTHES = {"annotation", "returns", "type_params", "ctx", "kind", "type_comment"}


def source_hash(path: str) -> str:
    """Hash a function, or the ``forward`` of a class, by its dotted path.

    Args:
        path: E.g. ``transformers.models.llama.modeling_llama.LlamaAttention``.

    Returns:
        16 hex digits. A change means that upstream changed what the code does.
    """
    module, _, name = path.rpartition(".")
    return hash_of(code_of(getattr(importlib.import_module(module), name)))


def code_of(part: Any) -> Any:
    """Return the function that a module, a class or a function computes, without its wrappers."""
    if isinstance(part, nn.Module):
        # The wrapper that torch.compile makes runs what it wraps.
        part = type(getattr(part, "_orig_mod", part))
    return inspect.unwrap(getattr(part, "forward", part) if isinstance(part, type) else part)


@functools.cache
def hash_of(function: Callable[..., Any]) -> str:
    """Hash a function, blind to comments, docstrings, annotations, decorators and formatting.

    The same in every release of Python.

    Raises:
        OSError: Its source cannot be read.
        TypeError: It is no function.
    """
    return hash_of_source(inspect.getsource(function))


def hash_of_source(source: str) -> str:
    """Hash the source of a function, as `hash_of` does."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return hashlib.sha256(repr(_bare(function)).encode()).hexdigest()[:16]


def _bare(node: object) -> object:
    """A syntax tree as nested lists, without what makes no difference."""
    if isinstance(node, ast.AST):
        fields = [
            [name, _bare(value)]
            for name, value in ast.iter_fields(node)
            if name not in _CLOTHES and value is not None and value != []
        ]
        return [type(node).__name__, fields]
    return [_bare(each) for each in node] if isinstance(node, list) else repr(node)
