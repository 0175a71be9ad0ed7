"""Options for device and dtype of a command, and their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

DTYPES = ("float32", "float64", "bfloat16", "float16")
AUTO = "auto"

DTYPE_HELP = (
    "Dtype of weights and cache: float32, float64, bfloat16 or float16. auto is the "
    "checkpoint's dtype, or float32 on a CPU that computes half precision no faster."
)
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP)]
Device = Annotated[
    str, typer.Option(help="Device, such as cpu or cuda. auto is the GPU if CUDA has one.")
]

# Names in torch of the instructions that multiply these numbers, on x86 and on ARM.
_ARITHMETIC = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"),
}


def check_dtype(dtype: str) -> None:
    """Refuse the name of a dtype that is neither ``auto`` nor one of `DTYPES`.

    Raises:
        InvalidInputError: The name is unknown.
    """
    if dtype not in (AUTO, *DTYPES):
        raise InvalidInputError(
            f"dtype {dtype!r} is unknown; choose one of {', '.join((AUTO, *DTYPES))}."
        )


def chosen_device(device: str) -> str:
    """Return the device; for ``auto`` a GPU if CUDA has one, else the CPU.

    Raises:
        InvalidInputError: The device cannot be used here.
    """
    import torch

    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each device its own
        raise InvalidInputError(
            f"device {device!r} cannot be used here ({first_line(error)}); give cpu, or install a "
            "build of torch that supports it."
        ) from error
    return device


def chosen_dtype(dtype: str, config: PretrainedConfig, device: str) -> str:
    """Return the dtype; for ``auto`` the one that suits checkpoint and device.

    This is the checkpoint's dtype. On a CPU without arithmetic for its half precision it is
    float32, which represents the same weights and is no slower there.

    Args:
        dtype: ``auto``, or one of `DTYPES`.
        config: The model's config.
        device: Device that the model runs on.

    Raises:
        InvalidInputError: The checkpoint's dtype cannot be computed in.
    """
    if dtype != AUTO:
        return dtype
    own = own_dtype(config)
    if own not in DTYPES:
        raise InvalidInputError(
            f"the model's config names the dtype {own}, in which ifkv cannot compute; choose one "
            f"with --dtype: {', '.join(DTYPES)}."
        )
    if device.startswith("cpu") and own in _ARITHMETIC and not _cpu_computes(own):
        return "float32"
    return own


def own_dtype(config: PretrainedConfig) -> str:
    """Return the dtype that a config names for its weights; float32 if it names none."""
    named: torch.dtype | str | None = getattr(config, "dtype", None)
    return str(named or "float32").removeprefix("torch.")


def _cpu_computes(dtype: str) -> bool:
    """True if this CPU has instructions that multiply numbers of a half precision."""
    import torch

    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in _ARITHMETIC[dtype])


def first_line(error: Exception) -> str:
    """Return the first line of another library's message, as part of a sentence."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".: ") if text else repr(error)
