"""Pictures of documents, checked, and run through the model's vision tower."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.documents.images import ImageDocument, ImageRows
from ifkv.errors import InvalidInputError
from ifkv.models.picture_positions import positions_of
from ifkv.utils.checks import naming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.models.wrappers import Wrapper

_VIDEOS = ("pixel_values_videos", "video_grid_thw")


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one document, checked and ready for the tower.

    Attributes:
        at: Which tokens are their rows, long ``[m]``, ascending, on the CPU.
        pixels: Patches of all pictures, ``[patches, width]``.
        grids: Time, height and width of each picture in patches, long ``[pictures, 3]``.
        positions: As in `ImageRows`.
        extent: Positions that the document takes.
        identity: As in `ImageRows`.
    """

    at: Tensor
    pixels: Tensor
    grids: Tensor
    positions: Tensor
    extent: int
    identity: str


def pictures_of(
    model: PreTrainedModel,
    wrapper: Wrapper | None,
    documents: Any,
    tokens: Sequence[Tensor],
) -> list[Pictures | None]:
    """Check the pictures of documents.

    Args:
        model: The model.
        wrapper: Its wrapper.
        documents: The documents given, of which some may be an `ImageDocument`.
        tokens: Token ids of each document, checked.

    Returns:
        For each document its pictures; None for a text.

    Raises:
        InvalidInputError: The inputs are not what the image processor of this model returns for
            still pictures, or do not match the placeholders.
    """
    found: list[Pictures | None] = [None] * len(tokens)
    if not isinstance(documents, Sequence):
        return found
    for index, (document, ids) in enumerate(zip(documents, tokens, strict=True)):
        if isinstance(document, ImageDocument):
            with naming(f"document {index}"):
                found[index] = _checked(model, wrapper, ids, document.inputs)
    return found


def _checked(model: PreTrainedModel, wrapper: Wrapper | None, ids: Tensor, inputs: Any) -> Pictures:
    if wrapper is None:
        raise InvalidInputError(
            f"it has pictures, but {type(model).__name__} has no vision tower; give token "
            "ids alone."
        )
    pixels, grids = _tensors(wrapper, inputs)
    side: int = model.config.vision_config.spatial_merge_size
    tower: Any = wrapper.tower_of(model)
    width = tower.patch_embed.proj.weight[0].numel()
    patches = int(grids.prod(dim=-1).sum())
    if pixels.shape != (patches, width):
        raise InvalidInputError(
            f"{wrapper.inputs[0]} has the shape {tuple(pixels.shape)}, but {patches} patches of "
            f"{width} numbers belong to {wrapper.inputs[1]} {grids.tolist()}; give what this "
            "model's image processor returned, unchanged."
        )
    if bool((grids[:, 0] != 1).any()):
        raise InvalidInputError(
            f"a picture has {int(grids[:, 0].max())} frames; videos cannot be documents, give "
            "still pictures."
        )
    if bool((grids[:, 1:] % side != 0).any()):
        raise InvalidInputError(
            f"{wrapper.inputs[1]} is {grids.tolist()}, but heights and widths must be multiples of "
            f"{side}; give what this model's image processor returned, unchanged."
        )
    at = (ids == wrapper.image_token_id(model)).nonzero()[:, 0]
    wanted = (grids.prod(dim=-1) // side**2).tolist()
    runs = _runs(at)
    if runs != wanted:
        raise InvalidInputError(
            f"its token ids have runs of {runs} placeholders for pictures of {wanted} rows; write "
            "one placeholder for each row, and a mark between pictures, as the processor does."
        )
    positions, extent = positions_of(model, wrapper, ids, grids)
    identity = _identity(dict(zip(wrapper.inputs, (pixels, grids), strict=True)))
    return Pictures(at, pixels, grids, positions, extent, identity)


def _tensors(wrapper: Wrapper, inputs: Any) -> tuple[Tensor, Tensor]:
    """Return pixels and grids of an image processor's output, on the CPU."""
    if not isinstance(inputs, Mapping):
        raise InvalidInputError(
            f"its inputs are of type {type(inputs).__name__}; give what the image processor "
            "returned, a mapping."
        )
    given = {name for name, value in inputs.items() if value is not None}
    if given & set(_VIDEOS):
        raise InvalidInputError(
            f"its inputs hold {sorted(given & set(_VIDEOS))[0]}; videos cannot be documents, give "
            "still pictures."
        )
    if given != set(wrapper.inputs):
        raise InvalidInputError(
            f"its inputs are {sorted(given)}, but {sorted(wrapper.inputs)} are wanted; give what "
            "this model's image processor returned."
        )
    try:
        pixels, grids = (torch.as_tensor(inputs[n]).detach().cpu() for n in wrapper.inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"its inputs are no tensors ({error}); call the image processor with "
            "return_tensors='pt'."
        ) from error
    whole = not grids.dtype.is_floating_point and grids.dtype != torch.bool
    if grids.ndim != 2 or grids.shape[1] != 3 or not len(grids) or not whole or grids.min() < 1:
        raise InvalidInputError(
            f"{wrapper.inputs[1]} is {grids.dtype} {tuple(grids.shape)}; three positive whole "
            "numbers are wanted for each picture."
        )
    if not pixels.dtype.is_floating_point or not bool(torch.isfinite(pixels).all()):
        raise InvalidInputError(
            f"{wrapper.inputs[0]} is {pixels.dtype} and must hold finite floating-point numbers."
        )
    return pixels, grids.to(torch.long)


def _runs(at: Tensor) -> list[int]:
    """Return the lengths of runs of adjacent indices."""
    groups = itertools.groupby(enumerate(at.tolist()), lambda pair: pair[1] - pair[0])
    return [len(list(group)) for _, group in groups]


def _identity(inputs: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over the names, shapes, dtypes and bytes of tensors."""
    digest = hashlib.sha256(b"ifkv pictures\n")
    for name, tensor in inputs.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def run_tower(
    model: PreTrainedModel,
    wrapper: Wrapper | None,
    pictures: Sequence[Pictures | None],
    budget: int,
) -> Iterator[ImageRows | None]:
    """Run the pictures of documents through the tower, those of several documents together.

    A picture's rows do not depend on the others.

    Args:
        model: The model.
        wrapper: Its wrapper.
        pictures: For each document its pictures, or None.
        budget: Rows of one run at most; the pictures of one document stay together.

    Yields:
        For each document its rows of pictures, or None.
    """
    waiting: list[Pictures | None] = []
    size = 0
    for own in pictures:
        count = 0 if own is None else len(own.at)
        if size and size + count > budget:
            yield from _run_tower(model, wrapper, waiting)
            waiting, size = [], 0
        waiting.append(own)
        size += count
    yield from _run_tower(model, wrapper, waiting)


def _run_tower(
    model: PreTrainedModel, wrapper: Wrapper | None, pictures: Sequence[Pictures | None]
) -> Iterator[ImageRows | None]:
    present = [own for own in pictures if own is not None]
    if wrapper is None or not present:
        yield from [None] * len(pictures)
        return
    features = wrapper.inner_of(model).get_image_features(
        torch.cat([own.pixels for own in present]).to(model.device),
        torch.cat([own.grids for own in present]).to(model.device),
        return_dict=True,
    )
    counts = [len(own.at) for own in present]
    rows = _joined(features.pooler_output, model.dtype).split(counts)
    deep: list[Tensor | None] = [None] * len(present)
    if wrapper.deepstack:
        levels = [_joined(level, model.dtype) for level in features.deepstack_features]
        deep = list(torch.stack(levels).split(counts, dim=1))
    made = iter(zip(rows, deep, strict=True))
    for own in pictures:
        if own is None:
            yield None
            continue
        its_rows, its_deep = next(made)
        # Cloned: a view would keep the rows of all documents of the run.
        yield ImageRows(
            own.at,
            its_rows.cpu().clone(),
            None if its_deep is None else its_deep.cpu().clone(),
            own.positions,
            own.identity,
        )


def _joined(features: Any, dtype: torch.dtype) -> Tensor:
    """Return features of all pictures; releases give one tensor, or one for each picture."""
    whole = features if isinstance(features, Tensor) else torch.cat(list(features))
    return whole.to(dtype)
