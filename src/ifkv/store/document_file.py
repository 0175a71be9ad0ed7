"""Writing of a document's file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError
from ifkv.store.format import DTYPE_NAMES, Header, checksum, layer_name
from ifkv.store.keys import key_of

if TYPE_CHECKING:
    from ifkv.documents.cache import DocumentCache
    from ifkv.store.codecs import Codec


class DocumentFile:
    """Bytes of a document's file: a head, then the tensors without a copy.

    Attributes:
        header: The file's header.
        nbytes: Size of the file.

    Args:
        document: The document.
        codec: The codec of its rows.

    Raises:
        InvalidInputError: Its dtype cannot be stored, or the codec cannot hold it.
    """

    def __init__(self, document: DocumentCache, codec: Codec):
        if document.keys.dtype not in DTYPE_NAMES or not document.keys.dtype.is_floating_point:
            raise InvalidInputError(
                f"the document's rows are {document.keys.dtype}; float64, float32, float16 and "
                "bfloat16 can be stored."
            )
        layers, kv_heads, length, head_dim = document.keys.shape
        tensors: dict[str, Tensor] = {
            "token_ids": document.token_ids,
            "prefix_ids": document.prefix_ids,
        }
        texts = () if document.surrogate is None else document.surrogate.texts
        if texts:
            tensors["surrogate_ids"] = torch.cat(texts)
        if document.sensitivity is not None:
            tensors["sensitivity"] = document.sensitivity
        rows: dict[str, Tensor] = {}
        scales: dict[str, list[Tensor]] = {"keys": [], "values": []}
        # One copy to the host for all layers, if they are on a device.
        whole = {"keys": document.keys.cpu(), "values": document.values.cpu()}
        for layer in range(layers):
            for part, stacked in whole.items():
                stored, scale = codec.encode(stacked[layer])
                rows[layer_name(layer, part)] = stored
                if scale is not None:
                    scales[part].append(scale)
        if not codec.exact:
            tensors |= {f"scales.{part}": torch.stack(each) for part, each in scales.items()}
        self._parts = [_bytes(tensor) for tensor in (tensors | rows).values()]
        checksums = {
            name: checksum(part) for name, part in zip(tensors | rows, self._parts, strict=True)
        }
        self.header = Header(
            key_of(document),
            document.fingerprint,
            codec,
            document.keys.dtype,
            (layers, kv_heads, length, head_dim),
            len(document.prefix_ids),
            checksums,
            document.sensitivity is not None,
            tuple(map(len, texts)),
        )
        self._parts.insert(0, memoryview(self.header.encode()))
        self.nbytes = sum(part.nbytes for part in self._parts)

    def write(self, descriptor: int) -> None:
        """Write everything to a file descriptor.

        Raises:
            OSError: The system cannot write.
        """
        for part in self._parts:
            while part.nbytes:
                part = part[os.write(descriptor, part) :]

    def tobytes(self) -> bytes:
        """Return the file's bytes."""
        return b"".join(self._parts)


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a CPU tensor as bytes."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy().data
