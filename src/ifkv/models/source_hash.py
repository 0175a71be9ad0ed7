"""Hashes of upstream's code, which show whether it is the code that ifkv was reviewed for."""

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

# Annotations and type parameters do not affect what is computed. The other fields differ between
# releases of Python, or follow from where a name stands.
_IGNORED = {"annotation", "returns", "type_params", "ctx", "kind", "type_comment"}


def source_hash(path: str) -> str:
    """Hash a function, a method, or the ``forward`` of a class, by its dotted path.

    Args:
        path: E.g. ``transformers.models.llama.modeling_llama.LlamaAttention``. Classes begin with
            a capital letter, and modules do not.

    Returns:
        16 hex digits; they change if upstream changes what the code does.
    """
    module, _, name = path.rpartition(".")
    holder, _, owner = module.rpartition(".")
    if owner[:1].isupper():
        return hash_of(code_of(getattr(getattr(importlib.import_module(holder), owner), name)))
    return hash_of(code_of(getattr(importlib.import_module(module), name)))


def code_of(part: Any) -> Any:
    """Return the function that a module, class or function runs, without its wrappers."""
    if isinstance(part, nn.Module):
        # The wrapper made by torch.compile runs the module that it wraps.
        part = type(getattr(part, "_orig_mod", part))
    return inspect.unwrap(getattr(part, "forward", part) if isinstance(part, type) else part)


@functools.cache
def hash_of(function: Callable[..., Any]) -> str:
    """Hash a function without its comments, docstring, annotations, decorators and formatting.

    The hash is the same in every release of Python.

    Raises:
        OSError: The source cannot be read.
        TypeError: The object is not a function.
    """
    return hash_of_source(inspect.getsource(function))


def hash_of_source(source: str) -> str:
    """Hash the source of a function like `hash_of`."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return hashlib.sha256(repr(_bare(function)).encode()).hexdigest()[:16]


def _bare(node: object) -> object:
    """Return a syntax tree as nested lists, without the fields that do not affect the result."""
    if isinstance(node, ast.AST):
        fields = [
            [name, _bare(value)]
            for name, value in ast.iter_fields(node)
            if name not in _IGNORED and value is not None and value != []
        ]
        return [type(node).__name__, fields]
    return [_bare(each) for each in node] if isinstance(node, list) else repr(node)
