"""The laws of the method on documents with pictures: several in a document, text around them.

The oracle makes positions and masks by itself. Beside it stands the model's own forward, which is
given the pixels of all pictures at once.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

import ifkv
from ifkv.cache.stitched import StitchedCache
from ifkv.documents.images import ImageRows
from ifkv.forward.picture_rows import PictureRows
from ifkv.models.compat import cache_keyword
from ifkv.selectors import Budget, resolve
from ifkv.selectors import Request as Asked
from ifkv.steps.pending_rows import defer
from ifkv.testing import assert_bit_equal, assert_close
from ifkv.testing.strategies import orders, prompts, slot_subsets
from ifkv.testing.vision_models import (
    IMAGE,
    picture_ids,
    random_pictures,
    shared_tiny_vision_model,
    vision_families,
)
from ifkv.testing.vision_oracle import (
    dense_vision_prefill,
    dense_vision_recompute,
    dense_vision_rows,
    dense_vision_scores,
    dense_vision_stitched,
    joined_rows,
)
from scenario import EXACT, assert_rows_equal, cache_of, keys_of, poison, values_of

PROMPT = [30, 31, 32]
FAMILIES = vision_families()
WORDS = st.lists(st.integers(0, 89), max_size=4)
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4))


@dataclasses.dataclass(frozen=True)
class Paged:
    """A document: its tokens, and the sizes of its pictures in rows and columns."""

    token_ids: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    seed: int

    @property
    def inputs(self) -> dict[str, Tensor]:
        return random_pictures(self.sizes, self.seed)

    @property
    def given(self) -> Any:
        return ifkv.ImageDocument(self.token_ids, self.inputs) if self.sizes else self.token_ids


@st.composite
def pages(draw: st.DrawFn, least: int = 0) -> Paged:
    """Text, a picture, text, a picture, ..., all but one of them perhaps left out."""
    sizes = draw(st.lists(SIZES, min_size=least, max_size=2))
    ids = draw(WORDS)
    for rows, columns in sizes:
        ids = ids + picture_ids(rows, columns) + draw(WORDS)
    return Paged(tuple(ids) or (7,), tuple(sizes), draw(st.integers(0, 9)))


@dataclasses.dataclass(frozen=True)
class Scene:
    """A request over pages.

    Attributes:
        family: The model's.
        prefix: Possibly empty.
        pages: The documents; the first drawn has a picture.
        order: A permutation of them.
        slots: Some slots of the context.
        prompt: Tokens to be answered.
    """

    family: str
    prefix: list[int]
    pages: list[Paged]
    order: list[int]
    slots: list[int]
    prompt: list[int]

    @property
    def model(self) -> Any:
        return shared_tiny_vision_model(self.family)

    @property
    def total(self) -> int:
        return len(self.prefix) + sum(len(page.token_ids) for page in self.pages)


@st.composite
def scenes(draw: st.DrawFn, least: int = 1) -> Scene:
    own = [draw(pages(1)), *draw(st.lists(pages(), min_size=least - 1, max_size=2))]
    prefix = draw(st.lists(st.integers(0, 89), max_size=3))
    total = len(prefix) + sum(len(page.token_ids) for page in own)
    return Scene(
        draw(st.sampled_from(FAMILIES)),
        prefix,
        own,
        draw(orders(len(own))),
        draw(slot_subsets(total)),
        draw(prompts(vocab_size=90)),
    )


@contextmanager
def documents_of(scene: Scene) -> Iterator[list[ifkv.DocumentCache]]:
    with ifkv.patch(scene.model):
        yield ifkv.prefill_documents(
            scene.model, [page.given for page in scene.pages], prefix=scene.prefix
        )


def oracle_of(scene: Scene) -> Any:
    rows = [dense_vision_rows(scene.model, page.token_ids, _inputs(page)) for page in scene.pages]
    return dense_vision_stitched(scene.model, scene.prefix, rows, scene.order)


def _inputs(page: Paged) -> dict[str, Tensor] | None:
    return page.inputs if page.sizes else None


def upstream_arguments(pages: Sequence[Paged], before: Sequence[int], behind: Sequence[int]) -> Any:
    """What the model's own forward and generate() are given for a whole context and a prompt."""
    ids = [*before, *(token for page in pages for token in page.token_ids), *behind]
    shown = [page.inputs for page in pages if page.sizes]
    tokens = torch.tensor([ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.cat([each["pixel_values"] for each in shown]).double(),
        "image_grid_thw": torch.cat([each["image_grid_thw"] for each in shown]),
    }


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    """Upstream's modules remember the last request's positions; no test may depend on another."""
    yield
    for family in FAMILIES:
        shared_tiny_vision_model(family).model.rope_deltas = None


@given(s=scenes())
def test_recompute_equals_the_oracle_for_any_selection(s: Scene) -> None:
    with documents_of(s) as documents:
        cache = ifkv.stitch(s.model, documents, order=s.order)
        logits = ifkv.recompute(s.model, cache, s.slots, prompt_ids=s.prompt)
    context = oracle_of(s)
    truth = dense_vision_recompute(s.model, context, s.slots, s.prompt)
    assert cache.positions.expand(3, -1).tolist() == context.rows.positions.tolist()
    assert cache.query_position == context.rows.extent
    assert_rows_equal(cache, truth, what="after recompute")
    assert_close(logits, truth.logits[-1], what="logits", tolerance=EXACT)


PAGES = [
    Paged((5, 6, *picture_ids(3, 2), 8), ((3, 2),), 1),
    Paged((*picture_ids(2, 4), 11, *picture_ids(1, 3), 12), ((2, 4), (1, 3)), 2),
    Paged((13, 14, 15), (), 3),
    Paged((16, *picture_ids(3, 2), 17), ((3, 2),), 4),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 0, 1]])
def test_everything_recomputed_equals_the_models_own_forward_on_pixels(family, order):
    model = shared_tiny_vision_model(family)
    arranged = [PAGES[index] for index in order]
    with torch.no_grad():
        out = model(**upstream_arguments(arranged, [1, 2], PROMPT))
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [p.given for p in PAGES], prefix=[1, 2])
        cache = ifkv.stitch(model, documents, order=order)
        layer0 = cache.layers[0].keys.clone()
        stale = cache.layers[2].values.clone()
        rest = range(cache.exact_length, cache.context_length)
        logits = ifkv.recompute(model, cache, rest, prompt_ids=PROMPT)
    native = cache_of(out)
    assert_close(logits, out.logits[0, -1], what="logits", tolerance=EXACT)
    for layer, theirs in zip(cache.layers, native.layers, strict=True):
        assert_close(layer.keys, theirs.keys, what="keys", tolerance=EXACT)
        assert_close(layer.values, theirs.values, what="values", tolerance=EXACT)
    total = cache.context_length
    assert_close(layer0, native.layers[0].keys[:, :, :total], what="layer 0", tolerance=EXACT)
    assert (stale - native.layers[2].values[:, :, :total]).abs().max() > 0.1


@given(s=scenes())
def test_one_document_needs_no_recompute_and_layers_0_and_1_are_exact(s: Scene) -> None:
    with documents_of(s) as documents:
        alone = ifkv.stitch(s.model, documents[:1])
        logits = ifkv.recompute(s.model, alone, [], prompt_ids=s.prompt)
        cache = ifkv.stitch(s.model, documents, order=s.order)
        stitched = cache.clone()
        ifkv.recompute(s.model, cache, s.slots)
    rows = [
        dense_vision_rows(s.model, s.prefix),
        dense_vision_rows(s.model, s.pages[0].token_ids, _inputs(s.pages[0])),
        dense_vision_rows(s.model, s.prompt),
    ]
    full = dense_vision_prefill(s.model, joined_rows(rows))
    assert_rows_equal(alone, full, what="of one document")
    assert_close(logits, full.logits[-1], what="logits", tolerance=EXACT)
    whole = dense_vision_prefill(s.model, oracle_of(s).rows)
    assert_rows_equal(stitched, whole, what="stitched", layers=slice(0, 1))
    assert_rows_equal(cache, whole, what="selected", rows=s.slots, layers=slice(0, 2))


@given(s=scenes())
def test_old_rows_at_selected_slots_are_never_read_and_others_stay(s: Scene) -> None:
    with documents_of(s) as documents:
        before = ifkv.stitch(s.model, documents, order=s.order)
        expected, cache = before.clone(), before.clone()
        ifkv.recompute(s.model, expected, s.slots)
        poison(cache, s.slots, float("nan"))
        ifkv.recompute(s.model, cache, s.slots)
    kept = sorted(set(range(s.total)) - set(s.slots))
    for pick in (keys_of, values_of):
        assert_bit_equal(pick(cache), pick(expected), what="rows")
        assert_bit_equal(pick(cache)[:, :, kept], pick(before)[:, :, kept], what="other rows")


@given(s=scenes(), block=st.integers(1, 7))
def test_blocks_subsets_and_the_fused_prompt_change_nothing(s: Scene, block: int) -> None:
    with documents_of(s) as documents:
        joint, blocked, separate = (
            ifkv.stitch(s.model, documents, order=s.order) for _ in range(3)
        )
        expected = ifkv.recompute(s.model, joint, s.slots, prompt_ids=s.prompt)
        got = ifkv.recompute(s.model, blocked, s.slots, prompt_ids=s.prompt, block_tokens=block)
        ifkv.recompute(s.model, separate, s.slots)
        after = ifkv.recompute(s.model, separate, [], prompt_ids=s.prompt)
    assert_close(got, expected, what="logits in blocks", tolerance=EXACT)
    assert_close(after, expected, what="logits of a separate prompt", tolerance=EXACT)
    assert_rows_equal(blocked, joint, what="in blocks")
    assert_rows_equal(separate, joint, what="separate")


@given(s=scenes(), depth=st.integers(0, 4))
def test_rows_that_stop_at_a_depth_are_right_up_to_it(s: Scene, depth: int) -> None:
    with documents_of(s) as documents:
        before = ifkv.stitch(s.model, documents, order=s.order)
        whole, cut, every = before.clone(), before.clone(), before.clone()
        ifkv.recompute(s.model, whole, s.slots)
        ifkv.recompute(s.model, every, s.slots, depths=[4] * len(s.slots))
        ifkv.recompute(s.model, cut, s.slots, depths=[depth] * len(s.slots))
    assert_rows_equal(every, whole, what="at full depth")
    assert_rows_equal(cut, whole, what="of the layers that ran", layers=slice(0, depth))
    assert_rows_equal(cut, before, what="of the layers that did not", layers=slice(depth, None))


@given(s=scenes(), geometry=st.sampled_from(["global", "hl-hp", "tl-tp", "hl-tp"]))
def test_scores_in_every_geometry(s: Scene, geometry: Any) -> None:
    with documents_of(s) as documents:
        cache = ifkv.stitch(s.model, documents, order=s.order, geometry=geometry)
        scores = ifkv.score(s.model, cache, s.prompt, layers=[1, 2])
    truth = dense_vision_scores(s.model, oracle_of(s), s.prompt, layers=[1, 2], geometry=geometry)
    assert_close(scores, truth.float(), what="scores", tolerance=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_answers_as_upstream_does_whatever_the_module_remembers(family, beams):
    model = shared_tiny_vision_model(family)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 96, "num_beams": beams}
    with torch.no_grad():
        want = model.generate(**upstream_arguments(PAGES, [1, 2], PROMPT), **settings)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [p.given for p in PAGES], prefix=[1, 2])
        for remembered in (None, torch.tensor([[41]])):
            cache = ifkv.stitch(model, documents)
            ifkv.recompute(model, cache, cache.candidate_slots)
            model.model.rope_deltas = remembered
            got = ifkv.generate(model, cache, PROMPT, **settings)
            assert got[0].tolist() == want[0, cache.context_length :].tolist()
            assert model.model.rope_deltas is remembered


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_answers_as_upstream_does_whatever_the_module_remembers(family):
    model = shared_tiny_vision_model(family)
    ids = torch.tensor([[1, 2, 5, 6, 7, 8, 9, *PROMPT]])
    with torch.no_grad():
        want = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=96)
    with ifkv.patch(model):
        cache = ifkv.stitch(
            model, ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1, 2])
        )
        ifkv.recompute(model, cache, cache.candidate_slots)
        model.model.rope_deltas = torch.tensor([[41]])
        got = ifkv.generate(model, cache, PROMPT, max_new_tokens=5, eos_token_id=96)
    assert got[0].tolist() == want[0, 7:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_side_by_side_do_not_see_one_another(family):
    """Requests with pictures, without, and of other lengths, in one pass each."""
    model = shared_tiny_vision_model(family)
    requests = [[0, 1], [2], [3, 2, 0]]
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [p.given for p in PAGES], prefix=[1, 2])
        chosen = [[documents[i] for i in own] for own in requests]
        caches = ifkv.stitch_many(model, chosen)
        alone = [ifkv.stitch(model, own) for own in chosen]
        prompts = [PROMPT, [33], [34, 35]]
        scores = ifkv.score_many(model, caches, prompts)
        slots = [cache.candidate_slots[::2] for cache in caches]
        logits = ifkv.recompute_many(model, caches, slots, prompts=prompts)
        many = ifkv.generate_many(model, caches, prompts, max_new_tokens=4, eos_token_id=[96])
        for cache, prompt, own, its, row, answer in zip(
            alone, prompts, slots, scores, logits, many, strict=True
        ):
            want = ifkv.score(model, cache, prompt)
            assert_close(its, want, what="scores", tolerance=1e-6)
            row_alone = ifkv.recompute(model, cache, own, prompt_ids=prompt)
            assert_close(row, row_alone, what="logits", tolerance=EXACT)
            said = ifkv.generate(model, cache, prompt, max_new_tokens=4, eos_token_id=96)
            assert answer.tolist() == said[0, len(prompt) :].tolist()


@given(s=scenes(least=2))
def test_documents_added_later_stand_where_they_would_have_stood(s: Scene) -> None:
    """Also behind a text, whose positions have one axis, and behind tokens still to run."""
    with documents_of(s) as documents:
        assume(s.order[0] != 0)  # a text may come first
        ordered = [documents[index] for index in s.order]
        whole = ifkv.stitch(s.model, ordered)
        grown = ifkv.stitch(s.model, ordered[:1])
        slots = ifkv.extend(s.model, grown, ordered[1:])
        assert grown.positions.expand(3, -1).tolist() == whole.positions.expand(3, -1).tolist()
        for pick in (keys_of, values_of):
            assert_bit_equal(pick(grown), pick(whole), what="rows")
        got = ifkv.recompute(s.model, grown, slots, prompt_ids=s.prompt)
        want = ifkv.recompute(s.model, whole, whole.candidate_slots, prompt_ids=s.prompt)
    if all(page.sizes for page in s.pages):
        assert grown.positions.shape[0] == 3
    assert_close(got, want, what="logits", tolerance=EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scored", [False, True])
def test_tokens_still_to_run_stand_between_pictures(family, scored):
    """As a conversation does: a question, then a picture, then tokens that no pass has run."""
    model = shared_tiny_vision_model(family)
    between = [40, 41]
    with torch.no_grad():
        spoken = Paged((*PAGES[0].token_ids, *between), PAGES[0].sizes, PAGES[0].seed)
        out = model(**upstream_arguments([spoken, PAGES[3]], [1, 2], PROMPT))
    with ifkv.patch(model):
        first, second = ifkv.prefill_documents(
            model, [PAGES[0].given, PAGES[3].given], prefix=[1, 2]
        )
        cache = ifkv.stitch(model, [first])
        defer(model, cache, between)
        slots = ifkv.extend(model, cache, [second])
        if scored:
            ifkv.score(model, cache, PROMPT)
        logits = ifkv.recompute(model, cache, slots, prompt_ids=PROMPT)
    assert_close(logits, out.logits[0, -1], what="logits", tolerance=EXACT)


@given(s=scenes())
def test_cacheblend_compares_rows_of_pictures(s: Scene) -> None:
    with documents_of(s) as documents:
        cache = ifkv.stitch(s.model, documents, order=s.order)
        rule = resolve("cacheblend")
        found = rule.select(s.model, cache, Asked(s.prompt, s.prompt, None, None), Budget(0.3))
        whole = dense_vision_prefill(s.model, oracle_of(s).rows)
        want = (whole.values[1] - cache.layers[1].values[0]).float().square().mean(dim=(0, 2))
        want[: cache.exact_length] = 0
    assert found.scores is not None
    assert_close(found.scores, want, what="deviations", tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_runs_in_any_company(family):
    model = shared_tiny_vision_model(family)
    given_pages = [page.given for page in PAGES]
    with ifkv.patch(model):
        together = ifkv.prefill_documents(model, given_pages)
        apart = ifkv.prefill_documents(model, iter(given_pages), batch_tokens=1)
    for one, other in zip(together, apart, strict=True):
        assert_close(one.values, other.values, what="values", tolerance=EXACT)
        assert (one.images is None) == (other.images is None)
        if one.images is not None and other.images is not None:
            assert_close(one.images.rows, other.images.rows, what="rows", tolerance=EXACT)
            assert one.images.identity == other.images.identity


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_a_surrogate_context_everything_recomputed_is_exact(family):
    model = shared_tiny_vision_model(family)
    with torch.no_grad():
        out = model(**upstream_arguments(PAGES, [1, 2], PROMPT))
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(
            model, [p.given for p in PAGES], prefix=[1, 2], surrogate=[[60, 61, 62], [63]]
        )
        cache = ifkv.stitch(model, documents)
        first = keys_of(cache)[0].clone()
        assert cache.exact_length == 2
        got = ifkv.recompute(model, cache, cache.candidate_slots, prompt_ids=PROMPT)
    native = cache_of(out).layers[0].keys[0][:, : cache.context_length]
    assert_close(first, native, what="layer 0", tolerance=EXACT)
    assert_close(got, out.logits[0, -1], what="logits", tolerance=EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rounded_cache_of_pictures_is_near_the_exact_one(family):
    model = shared_tiny_vision_model(family, dtype=torch.float32)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [p.given for p in PAGES])
        exact = ifkv.stitch(model, documents)
        rounded = ifkv.stitch(model, documents, kv_dtype=torch.float8_e4m3fn)
        one, other = (
            ifkv.recompute(model, cache, cache.candidate_slots, prompt_ids=PROMPT)
            for cache in (exact, rounded)
        )
    assert one is not None
    assert other is not None
    assert (one - other).abs().max() < 0.3 * one.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_forward_continues_a_stitched_cache_with_its_positions(family):
    model = shared_tiny_vision_model(family)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [p.given for p in PAGES])
        fused, native = (ifkv.stitch(model, documents) for _ in range(2))
        want = ifkv.recompute(model, fused, [], prompt_ids=PROMPT)
        places = native.positions_with(len(PROMPT))[..., -len(PROMPT) :]
        with torch.no_grad():
            out = model(torch.tensor([PROMPT]), position_ids=places, **cache_keyword(model, native))
    assert_close(out.logits[0, -1], want, what="logits", tolerance=EXACT)


def _without_deepstack(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PictureRows, "behind", lambda self, hidden, layer_idx: hidden)


def _slot_for_position(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StitchedCache, "positions_at", lambda self, slots: slots)


def _neighbours_rows(patch: pytest.MonkeyPatch) -> None:
    right = ImageRows.rows_at

    def rolled(self: ImageRows, *args: Any) -> PictureRows:
        found = right(self, *args)
        return found._replace(rows=found.rows.roll(1, dims=0))

    patch.setattr(ImageRows, "rows_at", rolled)


def _placeholders_embedded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PictureRows, "entering", lambda self, hidden: hidden)


MISTAKES = [_without_deepstack, _slot_for_position, _neighbours_rows, _placeholders_embedded]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_recompute_is_noticed(mistake, monkeypatch):
    model = shared_tiny_vision_model("qwen3_vl")
    with torch.no_grad():
        out = model(**upstream_arguments(PAGES, [1, 2], PROMPT))
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [p.given for p in PAGES], prefix=[1, 2])
        cache = ifkv.stitch(model, documents)
        mistake(monkeypatch)
        logits = ifkv.recompute(model, cache, cache.candidate_slots, prompt_ids=PROMPT)
    with pytest.raises(AssertionError):
        assert_close(logits, out.logits[0, -1], what="logits", tolerance=0.01)
