"""Prefill of documents: once, each alone behind a shared prefix, before any request."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.documents.checks import check_rows
from ifkv.documents.images import ImageDocument, ImageRows
from ifkv.documents.mean import Mean
from ifkv.documents.pictures import pictures_of, run_tower
from ifkv.documents.surrogate import SurrogateContext, Texts, before_documents
from ifkv.documents.token_ids import document_tensors
from ifkv.errors import FingerprintMismatchError, InvalidInputError
from ifkv.forward.layers import embed, run_attention, run_layers
from ifkv.forward.passes import LayerCall
from ifkv.forward.picture_rows import side_by_side
from ifkv.models.decoder import DecoderView
from ifkv.models.rope import join_positions, rotate
from ifkv.patching.handle import PatchHandle, handle_of
from ifkv.utils.checks import check_positive, token_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.backends.base import DocumentPlan

__all__ = ["DocumentCache", "default_batch_tokens", "prefill_documents"]

# Tokens of one ragged forward if the caller gives no number. On a CPU a larger forward does not
# fit its caches: measured in benchmarks/encoding.py.
DEFAULT_BATCH_TOKENS = 4096
CPU_BATCH_TOKENS = 1024

# Token ids of each document, with pictures or without, or what a tokenizer returned for texts.
Documents = Sequence[Sequence[int] | Tensor | ImageDocument] | Tensor | Mapping[str, Any]


def default_batch_tokens(device: torch.device) -> int:
    """Return the tokens of one ragged forward, if the caller gives no number."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else DEFAULT_BATCH_TOKENS


def prefill_documents(
    model: PreTrainedModel,
    documents: Documents,
    *,
    attention_mask: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
    prefix: Sequence[int] | Tensor | DocumentCache = (),
    surrogate: SurrogateContext | Texts | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[DocumentCache]:
    """Prefill documents, each alone behind the prefix, many in one ragged forward.

    Args:
        model: A patched model.
        documents: Token ids of each document. Ids are the contract: nothing is added, stripped or
            tokenised again, and a document's cache does not depend on its neighbours. The output
            of a tokenizer for several texts is taken with its attention mask. A document with
            pictures is an [ifkv.ImageDocument][].
        attention_mask: Of padded documents, ``[documents, tokens]``: 0 where a token is padding,
            which is left out. A tensor of several rows needs it.
        prefix: Token ids that every document is encoded behind (BOS, a chat header), or the
            ``.prefix`` of documents made earlier, which is then shared and not computed again.
        surrogate: Token ids of a text that stands between prefix and document while it is encoded,
            and is then dropped; of several texts, the mean over them, for as many prefills. No
            document is then exact without recompute. The ``.surrogate`` of documents made earlier,
            or an [ifkv.SurrogateContext][], is shared, and its texts are prefilled once. None
            encodes each document alone.
        batch_tokens: Tokens of one forward at most (a longer document goes alone); more takes
            more memory. Default 1024 on a CPU, where more is slower, and 4096 elsewhere.
        progress: Show a progress bar.

    Returns:
        One cache per document, in order.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: A document is empty, longer than the model's positions, or holds an id
            outside the vocabulary; they look padded and there is no mask; ``batch_tokens`` is not
            positive; ``prefix`` is a document that was itself encoded behind a prefix; or
            ``surrogate`` has no text, or an id outside the vocabulary.
        FingerprintMismatchError: ``prefix`` was made by another model.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> handle = ifkv.patch(model)
        >>> docs = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1])
        >>> [len(doc) for doc in docs], docs[0].prefix is docs[1].prefix
        ([3, 2], True)
        >>> ifkv.unpatch(model)
    """
    handle = handle_of(model)
    handle.rope.check_frequencies()
    if batch_tokens is not None:
        check_positive(batch_tokens, "batch_tokens")
    given, wanted = (
        (prefix, prefix.token_ids) if isinstance(prefix, DocumentCache) else (None, prefix)
    )
    prefix_ids = token_tensor(model, wanted, "the prefix", empty=True)
    standing_in = None if surrogate is None else SurrogateContext.of(model, surrogate)
    if isinstance(documents, Iterator):  # read twice below
        documents = [*cast(Iterator[Any], documents)]
    tokens = document_tensors(model, documents, attention_mask, pictures=True)
    pictures = pictures_of(model, handle.wrapper, documents, tokens)
    before, what = before_documents(prefix_ids, standing_in)
    for index, (ids, own) in enumerate(zip(tokens, pictures, strict=True)):
        extent = len(ids) if own is None else own.extent
        handle.rope.check_length(before + extent, f"document {index} {what}")
    identity = handle.identity(model)
    if given is not None:
        _check_prefix(given, identity)
    shared = given
    if shared is None and tokens and len(prefix_ids) > 0:
        shared = _prefill_alone(model, handle, prefix_ids, identity)
    contexts = None
    if standing_in is not None and tokens:
        contexts = _surrogate_rows(model, handle, prefix_ids, standing_in, identity)
    caches: list[DocumentCache] = []
    budget = batch_tokens or default_batch_tokens(model.device)
    towered = run_tower(model, handle.wrapper, pictures, budget)
    for batch in _batches(tokens, budget, progress):
        images = list(itertools.islice(towered, len(batch)))
        if contexts is None:
            caches += _prefill_batch(model, handle, batch, prefix_ids, shared, identity, images)
            continue
        mean = Mean()
        for context in contexts:
            behind = context.token_ids
            made = _prefill_batch(model, handle, batch, behind, context, identity, images)
            mean.add(made)
        caches += [
            document.rebuilt(
                prefix_ids=prefix_ids,
                keys=keys,
                values=values,
                prefix=shared,
                surrogate=standing_in,
            )
            for document, (keys, values) in zip(made, mean.rows(), strict=True)
        ]
    return [
        document if own is None else document.rebuilt(extent=own.extent)
        for document, own in zip(caches, pictures, strict=True)
    ]


def _prefill_alone(
    model: PreTrainedModel, handle: PatchHandle, ids: Tensor, identity: str
) -> DocumentCache:
    """Prefill tokens with nothing before them."""
    return _prefill_batch(model, handle, [ids], ids[:0], None, identity, [None])[0]


# The rows of each surrogate context that is in use, computed last: what of, and the rows.
_ROWS: WeakKeyDictionary[SurrogateContext, tuple[object, list[DocumentCache]]] = WeakKeyDictionary()


def _surrogate_rows(
    model: PreTrainedModel,
    handle: PatchHandle,
    prefix_ids: Tensor,
    surrogate: SurrogateContext,
    identity: str,
) -> list[DocumentCache]:
    """Return the rows of the prefix and each text, computed once for one surrogate context."""
    wanted = identity, tuple(prefix_ids.tolist())
    held, rows = _ROWS.get(surrogate, (None, []))
    if held != wanted:
        texts = [torch.cat((prefix_ids, text)) for text in surrogate.texts]
        rows = [_prefill_alone(model, handle, text, identity) for text in texts]
        _ROWS[surrogate] = wanted, rows
    return rows


def _check_prefix(prefix: DocumentCache, identity: str) -> None:
    """Refuse rows that this model would not compute for a prefix."""
    if prefix.fingerprint != identity:
        raise FingerprintMismatchError(
            f"the prefix was made by model {prefix.fingerprint[:8]}, this one is {identity[:8]}; "
            "give its token ids instead, to encode it anew."
        )
    if len(prefix.prefix_ids) or prefix.prefix is not None:
        raise InvalidInputError(
            f"the prefix given was itself encoded behind {len(prefix.prefix_ids)} tokens; give a "
            "document's .prefix, or token ids."
        )
    check_rows(prefix, "the prefix")


def _batches(tokens: list[Tensor], budget: int, progress: bool) -> Iterator[list[Tensor]]:
    """Group documents in order, each group within the budget of tokens or a single document."""
    groups: list[list[Tensor]] = []
    size = budget + 1
    for ids in tokens:
        if size + len(ids) > budget:
            groups.append([])
            size = 0
        groups[-1].append(ids)
        size += len(ids)
    if not progress:
        yield from groups
        return
    from ifkv.utils.progress import track_tokens

    yield from track_tokens(groups, "prefilling documents")


@torch.no_grad()
def _prefill_batch(
    model: PreTrainedModel,
    handle: PatchHandle,
    tokens: list[Tensor],
    prefix_ids: Tensor,
    prefix: DocumentCache | None,
    identity: str,
    images: Sequence[ImageRows | None],
) -> list[DocumentCache]:
    device, depth = model.device, DecoderView(model).num_layers
    lengths = tuple(len(ids) for ids in tokens)
    start = len(prefix_ids)
    offsets = [
        torch.arange(length) if own is None else own.positions
        for length, own in zip(lengths, images, strict=True)
    ]
    positions = join_positions(offsets).to(device) + start
    plan = handle.backend.plan_documents(lengths, start, device)
    hidden = embed(model, torch.cat(tokens).to(device))
    run = _PrefillPass(handle, plan, positions, hidden.dtype, depth, prefix)
    rotation = handle.rope.identity(hidden.dtype, device)
    own_rows = [None if own is None else own.all_rows(device) for own in images]
    pictures = side_by_side(list(zip(own_rows, lengths, strict=True)))
    hidden = run_layers(model, hidden, positions, rotation, run, depth - 1, pictures=pictures)
    run_attention(model, hidden, positions, rotation, run, depth - 1)
    return [
        DocumentCache(ids, prefix_ids, keys, values, identity, prefix, images=own)
        for ids, keys, values, own in zip(tokens, run.keys, run.values, images, strict=True)
    ]


class _PrefillPass:
    """Attention pass of documents side by side; it keeps keys and values before the rotation."""

    def __init__(
        self,
        handle: PatchHandle,
        plan: DocumentPlan,
        positions: Tensor,
        dtype: torch.dtype,
        depth: int,
        prefix: DocumentCache | None,
    ):
        self._backend = handle.backend
        self._plan = plan
        self._depth = depth
        self._prefix = prefix
        self._cos, self._sin = handle.rope.cos_sin(positions, dtype)
        before = torch.arange(plan.prefix_length, device=positions.device)
        self._prefix_cos, self._prefix_sin = handle.rope.cos_sin(before, dtype)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == 0:
            _, kv_heads, _, head_dim = keys.shape
            for length in self._plan.lengths:
                shape = (self._depth, kv_heads, length, head_dim)
                self.keys.append(keys.new_empty(shape))
                self.values.append(values.new_empty(shape))
        start = 0
        for index, length in enumerate(self._plan.lengths):
            rows = slice(start, start + length)
            start += length
            self.keys[index][layer_idx] = keys[0, :, rows]
            self.values[index][layer_idx] = values[0, :, rows]
        return keys, values

    def attend(self, call: LayerCall) -> Tensor:
        query, keys, values = call.query, call.keys, call.values
        if call.layer_idx == self._depth - 1:
            return query.transpose(1, 2)  # not read: the layer runs for its keys and values
        if self._prefix is None:
            prefix_keys, prefix_values = keys[:, :, :0], values[:, :, :0]
        else:
            stored = self._prefix.keys[call.layer_idx].to(keys.device)
            prefix_keys = rotate(stored, self._prefix_cos, self._prefix_sin)[None]
            prefix_values = self._prefix.values[call.layer_idx].to(values.device)[None]
        return self._backend.attend_documents(
            rotate(query, self._cos, self._sin),
            rotate(keys, self._cos, self._sin),
            values,
            prefix_keys,
            prefix_values,
            self._plan,
            call.spec,
        )
