"""Reasons why FlashInfer cannot run here, and its import."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import Any

import torch

from ifkv.errors import BackendUnavailableError

INSTALL = "pip install -e '.[flashinfer]' in the clone of ifkv"
# From the first release whose call rules were read, up to but not including the first unread one.
VERSIONS = ((0, 6, 18), (0, 8))
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
# FlashInfer merges two states of a row in one block of threads, each with 8 numbers.
THREADS = 1024
MERGED_AT_ONCE = 8
# Turing: the oldest generation FlashInfer has kernels for.
CAPABILITY = (7, 5)

# Functions that ifkv calls, and the names of the arguments. A version number only promises them, so
# the installed module is checked.
_PLAN = (
    "qo_indptr",
    "num_qo_heads",
    "num_kv_heads",
    "head_dim_qk",
    "causal",
    "sm_scale",
    "q_data_type",
    "kv_data_type",
)
_PAGES = (
    "paged_kv_indptr",
    "paged_kv_indices",
    "paged_kv_last_page_len",
    "page_size",
    "max_token_per_sequence",
)
_MASKS = ("custom_mask", "packed_custom_mask")
USED: dict[str, tuple[str, ...]] = {
    "BatchPrefillWithPagedKVCacheWrapper": ("kv_layout", "backend", "jit_args"),
    "BatchPrefillWithPagedKVCacheWrapper.plan": (*_PLAN, *_PAGES, *_MASKS),
    "BatchPrefillWithPagedKVCacheWrapper.run": ("out", "return_lse", "k_scale", "v_scale"),
    "BatchPrefillWithRaggedKVCacheWrapper": ("kv_layout", "backend"),
    "BatchPrefillWithRaggedKVCacheWrapper.plan": (*_PLAN, "kv_indptr", "window_left"),
    "BatchPrefillWithRaggedKVCacheWrapper.run": (),
    "merge_state": (),
}


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    >>> version_tuple("0.6.18.post1"), version_tuple("0.7.2rc1")
    ((0, 6, 18), (0, 7, 2))
    """
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def refusal_of_version(version: str) -> str | None:
    """Return why ifkv cannot use this version; None if it can."""
    low, high = VERSIONS
    if low <= version_tuple(version) < high:
        return None
    text = ">={},<{}".format(*(".".join(map(str, bound)) for bound in VERSIONS))
    return f"flashinfer-python {version} is installed, but ifkv knows the call rules of {text} only"


def refusal_of_module(module: Any) -> str | None:
    """Return which functions and arguments FlashInfer lacks; None if ifkv finds all it calls.

    Args:
        module: FlashInfer, of any version.
    """
    missing = []
    for name, arguments in USED.items():
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            missing.append(name)
            continue
        try:
            parameters = inspect.signature(found).parameters.values()
        except (TypeError, ValueError):  # compiled, without a signature
            continue
        # A function with **kwargs may accept every name.
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            continue
        known = {parameter.name for parameter in parameters}
        missing += [f"{name}({argument}=)" for argument in arguments if argument not in known]
    if not missing:
        return None
    version = getattr(module, "__version__", "of an unknown version")
    return f"flashinfer {version} has no {', '.join(missing)}, which ifkv calls"


def refusal_of_model(dtype: torch.dtype, head_dims: set[int], heads: int) -> str | None:
    """Return why FlashInfer has no kernel for such a model; None if it has one.

    Args:
        dtype: The model's dtype.
        head_dims: Head dimensions of its layers.
        heads: Query heads of a layer.
    """
    if dtype not in DTYPES:
        return f"the model is {dtype}, and FlashInfer computes in float16 or bfloat16 only"
    odd = sorted(head_dims.difference(HEAD_DIMS))
    if odd:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"head_dim is {odd[0]}, and FlashInfer has kernels for {sizes} only"
    most = THREADS * MERGED_AT_ONCE // max(head_dims)
    if heads > most:
        return (
            f"the model has {heads} query heads of {max(head_dims)}, and FlashInfer merges at most "
            f"{most} of them"
        )
    return None


def refusal_of_device(device: torch.device) -> str | None:
    """Return why FlashInfer cannot run on this device; None if it can."""
    if device.type != "cuda":
        return f"the model is on {device}, and FlashInfer runs on CUDA only; move the model first"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}, below (7, 5)"
    return None


def load() -> Any:
    """Import FlashInfer.

    Raises:
        BackendUnavailableError: It is not installed, cannot be imported, or has another version.
    """
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        raise BackendUnavailableError(
            f"backend 'flashinfer' needs a package that is not installed: {INSTALL}"
        ) from None
    refusal = refusal_of_version(version)
    if refusal is not None:
        raise BackendUnavailableError(f"{refusal}: {INSTALL}")
    try:
        return importlib.import_module("flashinfer")
    except Exception as error:  # an AssertionError on a machine without CUDA, among others
        raise BackendUnavailableError(
            f"flashinfer-python {version} is installed but cannot be imported "
            f"({type(error).__name__}: {error}); install it again: {INSTALL}"
        ) from error
