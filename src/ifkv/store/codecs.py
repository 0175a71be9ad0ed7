"""Codecs of stored rows: exact, or in eight bits with one scale per layer and head."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError


@dataclasses.dataclass(frozen=True)
class Codec:
    """Encoding of stored keys and values.

    Attributes:
        name: Its name in metadata.
        dtype: Stored dtype; None for the dtype of the rows.
        largest: The greatest magnitude that ``dtype`` holds.
    """

    name: str
    dtype: torch.dtype | None = None
    largest: float = 0.0

    @property
    def exact(self) -> bool:
        """True if decoded rows equal the encoded ones bit for bit."""
        return self.dtype is None

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode rows for storage.

        Args:
            rows: ``[kv_heads, n, head_dim]``, keys or values of one layer.

        Returns:
            Rows of the same shape and the stored dtype, contiguous; and scales, float32
            ``[kv_heads]``, or None if exact.

        Raises:
            InvalidInputError: The codec scales, and a row is not finite.
        """
        if self.dtype is None:
            return rows.contiguous(), None
        wide = rows.to(torch.float32)
        peak = wide.abs().amax(dim=(1, 2))
        if not bool(torch.isfinite(peak).all()):
            raise InvalidInputError(
                f"the document holds infinities or NaN, which {self.name} cannot scale; store it "
                "with codec='exact', or find out why the model makes them."
            )
        scales = torch.where(peak > 0, peak / self.largest, 1.0)
        scaled = wide / scales[:, None, None]
        if self.dtype == torch.int8:
            scaled = scaled.round()
        return scaled.clamp(-self.largest, self.largest).to(self.dtype).contiguous(), scales

    def decode(self, stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode stored rows to ``dtype``; not for the exact codec."""
        return (stored.to(torch.float32) * scales[:, None, None]).to(dtype)


CODECS = {
    codec.name: codec
    for codec in (
        Codec("exact"),
        Codec("fp8", torch.float8_e4m3fn, 448.0),
        Codec("int8", torch.int8, 127.0),
    )
}


def resolve_codec(name: str) -> Codec:
    """Return the codec of a name.

    Raises:
        InvalidInputError: The name is unknown.
    """
    if name not in CODECS:
        raise InvalidInputError(f"codec {name!r} is unknown; choose one of {', '.join(CODECS)}.")
    return CODECS[name]
