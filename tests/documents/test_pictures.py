"""Documents with pictures: what is refused, and that nothing answers from the wrong picture.

Two pictures of one size have the same token ids. Whatever goes by ids would take the one for the
other, so stores, sessions and memos refuse documents with pictures.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import ifkv
from ifkv.cache.stitched import StitchedCache
from ifkv.documents.sensitivity import measure_sensitivities, with_sensitivities
from ifkv.errors import (
    InvalidInputError,
    UnsupportedModelError,
    UnsupportedRopeError,
)
from ifkv.models.compat import cache_keyword
from ifkv.models.fact_file import patches
from ifkv.models.wrappers import parse_wrapper, wrapper_of, wrappers
from ifkv.selectors import Budget, Request, resolve
from ifkv.selectors.geometry import in_geometry
from ifkv.store import DiskStore, MemoryStore, TieredStore
from ifkv.store.keys import key_of
from ifkv.store.populate import encode_documents
from ifkv.testing import assert_close, shared_tiny_model, tiny_tokenizer
from ifkv.testing.vision_models import (
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_FAMILIES,
    VISION_START,
    picture_ids,
    random_pictures,
    shared_tiny_vision_model,
    tiny_vision_model,
    vision_families,
)

IDS = [5, *picture_ids(2, 3), 6]


def page(seed: int = 0, **changes: Any) -> ifkv.ImageDocument:
    return ifkv.ImageDocument(IDS, random_pictures([(2, 3)], seed) | changes)


@pytest.fixture
def model() -> Any:
    found = shared_tiny_vision_model()
    with ifkv.patch(found):
        yield found
    found.model.rope_deltas = None


PIXELS = random_pictures([(2, 3)])["pixel_values"]
GRID = torch.tensor([[1, 4, 6]])
WRONG = {
    "no mapping": (IDS, [PIXELS], "type list; give what the image processor"),
    "a name missing": (IDS, {"pixel_values": PIXELS}, r"are \['pixel_values'\], but"),
    "a name too many": (
        IDS,
        {"pixel_values": PIXELS, "image_grid_thw": GRID, "input_ids": GRID},
        r"\['image_grid_thw', 'input_ids', 'pixel_values'\]",
    ),
    "a video": (
        IDS,
        {"pixel_values_videos": PIXELS, "video_grid_thw": GRID},
        "videos cannot be documents",
    ),
    "frames": (
        IDS,
        {"pixel_values": torch.cat((PIXELS, PIXELS)), "image_grid_thw": torch.tensor([[2, 4, 6]])},
        "has 2 frames; videos cannot",
    ),
    "pixels of another picture": (
        IDS,
        {"pixel_values": PIXELS[:-1], "image_grid_thw": GRID},
        r"shape \(23, 24\), but 24 patches of 24",
    ),
    "flat pixels": (
        IDS,
        {"pixel_values": PIXELS.reshape(12, 48), "image_grid_thw": GRID},
        "24 patches of 24 numbers",
    ),
    "an odd height": (
        IDS,
        {"pixel_values": PIXELS[:15], "image_grid_thw": torch.tensor([[1, 3, 5]])},
        "multiples of 2",
    ),
    "a grid of two": (
        IDS,
        {"pixel_values": PIXELS, "image_grid_thw": GRID[:, :2]},
        "three positive whole numbers",
    ),
    "a grid of zeros": (
        IDS,
        {"pixel_values": PIXELS, "image_grid_thw": 0 * GRID},
        "three positive whole numbers",
    ),
    "whole pixels": (
        IDS,
        {"pixel_values": PIXELS.int(), "image_grid_thw": GRID},
        "finite floating-point",
    ),
    "nan": (
        IDS,
        {"pixel_values": PIXELS * float("nan"), "image_grid_thw": GRID},
        "finite floating-point",
    ),
    "pictures, not tensors": (
        IDS,
        {"pixel_values": ["page.png"], "image_grid_thw": GRID},
        "return_tensors='pt'",
    ),
    "a placeholder too few": (
        [5, *picture_ids(1, 5), 6],
        {"pixel_values": PIXELS, "image_grid_thw": GRID},
        r"runs of \[5\] placeholders for pictures of \[6\]",
    ),
    "no placeholder": (
        [5, 6],
        {"pixel_values": PIXELS, "image_grid_thw": GRID},
        r"runs of \[\] placeholders",
    ),
    "placeholders apart": (
        [*picture_ids(1, 3), *picture_ids(1, 3)],
        {"pixel_values": PIXELS, "image_grid_thw": GRID},
        r"runs of \[3, 3\] placeholders",
    ),
    "pictures without a mark between": (
        [IMAGE] * 12,
        random_pictures([(2, 3), (2, 3)]),
        r"runs of \[12\] placeholders for pictures of \[6, 6\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_refused_with_the_documents_name(model, name):
    ids, inputs, message = WRONG[name]
    with pytest.raises(InvalidInputError, match=rf"document 1: .*{message}"):
        ifkv.prefill_documents(model, [[7, 8], ifkv.ImageDocument(ids, inputs)])


@pytest.mark.parametrize("placeholder", [IMAGE, VIDEO])
def test_placeholders_in_texts_are_refused(model, placeholder):
    """A user's text that contains the literal placeholder is tokenised to one."""
    with pytest.raises(InvalidInputError, match=f"document 0 holds the token id {placeholder}"):
        ifkv.prefill_documents(model, [[7, placeholder]])
    with pytest.raises(InvalidInputError, match="the prefix holds the token id"):
        ifkv.prefill_documents(model, [[7]], prefix=[placeholder])
    with pytest.raises(InvalidInputError, match="surrogate: text 0 holds the token id"):
        ifkv.prefill_documents(model, [[7]], surrogate=[7, placeholder])
    cache = ifkv.stitch(model, ifkv.prefill_documents(model, [[7, 8]]))
    with pytest.raises(InvalidInputError, match="the query holds the token id"):
        ifkv.score(model, cache, [placeholder])
    with pytest.raises(InvalidInputError, match="the prompt holds the token id"):
        ifkv.recompute(model, cache, [], prompt_ids=[placeholder])
    with pytest.raises(InvalidInputError, match="the prompt holds the token id"):
        ifkv.generate(model, cache, [placeholder])
    with pytest.raises(InvalidInputError, match="the prompt holds the token id"):
        ifkv.generate_many(model, [cache], [[placeholder]])


def test_a_video_placeholder_beside_a_picture_is_refused(model):
    ids = [*IDS, VISION_START, VIDEO, VISION_END]
    with pytest.raises(InvalidInputError, match="row of a video"):
        ifkv.prefill_documents(model, [ifkv.ImageDocument(ids, page().inputs)])


def test_the_marks_around_pictures_are_text(model):
    made = ifkv.prefill_documents(model, [[VISION_START, 7, VISION_END]])
    assert made[0].images is None


def test_text_models_take_no_pictures():
    text = shared_tiny_model("llama")
    with ifkv.patch(text), pytest.raises(InvalidInputError, match="has no vision tower"):
        ifkv.prefill_documents(text, [page()])


def test_masks_and_pictures_do_not_go_together(model):
    with pytest.raises(InvalidInputError, match="leave it out"):
        ifkv.prefill_documents(model, [page()], attention_mask=[[1] * len(IDS)])


def test_a_picture_takes_fewer_positions_than_tokens_and_the_limit_counts_positions():
    small = tiny_vision_model(max_position_embeddings=20)
    wide = ifkv.ImageDocument([5, *picture_ids(8, 8), 6], random_pictures([(8, 8)]))
    tall = ifkv.ImageDocument([5, *picture_ids(9, 1), 6], random_pictures([(9, 1)]))
    with ifkv.patch(small):
        [one] = ifkv.prefill_documents(small, [wide], prefix=[1])
        assert (len(one), one.positions_taken) == (68, 12)
        cache = ifkv.stitch(small, [one])
        ifkv.recompute(small, cache, [3], prompt_ids=[7] * 7)
        cache.crop()
        with pytest.raises(InvalidInputError, match="context and prompt"):
            ifkv.recompute(small, cache, [3], prompt_ids=[7] * 8)
        [other] = ifkv.prefill_documents(small, [tall])
        with pytest.raises(InvalidInputError, match="25 positions are needed"):
            ifkv.prefill_documents(
                small, [ifkv.ImageDocument([*picture_ids(21, 2), 6, 7], random_pictures([(21, 2)]))]
            )
        assert other.positions_taken == 13


# --- identity: the same ids, another picture ---------------------------------------------------


def test_pictures_of_one_size_have_equal_ids_and_different_rows(model):
    one, other, again = ifkv.prefill_documents(model, [page(0), page(1), page(0)])
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.images.identity == again.images.identity != other.images.identity
    assert_close(one.values, again.values, what="values")
    assert (one.values - other.values).abs().max() > 0.1


def test_requests_side_by_side_keep_their_pictures(model):
    """The same ids in both requests of a batch: each has the answer it has alone."""
    one, other = ifkv.prefill_documents(model, [page(0), page(1)])
    caches = ifkv.stitch_many(model, [[one, other], [other, one]])
    slots = [cache.candidate_slots for cache in caches]
    together = ifkv.recompute_many(model, caches, slots, prompts=[[30], [30]])
    for own, got in zip([[one, other], [other, one]], together, strict=True):
        cache = ifkv.stitch(model, own)
        want = ifkv.recompute(model, cache, cache.candidate_slots, prompt_ids=[30])
        assert_close(got, want, what="logits")
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["memory", "disk", "tiered"])
def test_stores_refuse_documents_with_pictures(model, kind, tmp_path):
    disk = DiskStore(tmp_path)
    store = {"memory": MemoryStore(), "disk": disk, "tiered": TieredStore(MemoryStore(), disk)}
    [document] = ifkv.prefill_documents(model, [page()], prefix=[1])
    with pytest.raises(InvalidInputError, match="cannot be kept in a store yet"):
        store[kind].put(document)
    with pytest.raises(InvalidInputError, match="cannot be kept in a store yet"):
        key_of(document)
    with pytest.raises(InvalidInputError, match="holds the token id"):
        store[kind].key_for(model, IDS)
    with pytest.raises(InvalidInputError, match="can only be made by"):
        encode_documents(model, store[kind], [page()])
    with pytest.raises(InvalidInputError, match="document 0 holds the token id"):
        encode_documents(model, store[kind], [IDS])
    column = ifkv.ImageDocument(picture_ids(1, 3), random_pictures([(1, 3)]))
    [document] = ifkv.prefill_documents(model, [column])
    assert document.positions_taken == len(document)  # and still no text
    with pytest.raises(InvalidInputError, match="cannot be kept in a store yet"):
        store[kind].put(document)
    assert len(store[kind]) == 0


def test_stores_keep_texts_of_vision_models(model):
    store = MemoryStore()
    key = store.put(ifkv.prefill_documents(model, [[5, 6, 7]], prefix=[1])[0])
    assert key == store.key_for(model, [5, 6, 7], [1])


def test_sessions_refuse_pictures(model):
    session = ifkv.Session(model, tiny_tokenizer())
    pictures: Any = [page()]
    with pytest.raises(InvalidInputError, match="ImageDocument"):
        session.add(pictures)


def test_sensitivities_go_by_ids_and_refuse_pictures(model):
    first, second = ifkv.prefill_documents(model, [page(0), page(1)])
    for measure in (measure_sensitivities, with_sensitivities):
        with pytest.raises(InvalidInputError, match="cannot be measured yet"):
            measure(model, [first])
    cache = ifkv.stitch(model, [first, second])
    rule = resolve("sensitivity-aware")
    with pytest.raises(InvalidInputError, match="cannot measure sensitivities"):
        rule.select(model, cache, Request([30], [30], [first, second], None), Budget(0.3))


def test_another_geometry_of_other_pictures_is_refused(model):
    first, second = ifkv.prefill_documents(model, [page(0), page(1)])
    cache = ifkv.stitch(model, [first, second])
    twin, _ = in_geometry(model, cache, Request([30], [30], [first, second], None), "hl-tp")
    assert twin.geometry == "hl-tp"
    with pytest.raises(InvalidInputError, match="are not those of the cache"):
        in_geometry(model, cache, Request([30], [30], [second, first], None), "hl-tp")


def test_weights_of_the_tower_are_part_of_the_fingerprint():
    own = tiny_vision_model(seed=3)
    with ifkv.patch(own) as handle:
        before = handle.identity(own)
        [document] = ifkv.prefill_documents(own, [page()])
        with torch.no_grad():
            own.get_submodule("model.visual").merger.linear_fc2.weight.mul_(1.5)
        assert handle.identity(own) != before
        with pytest.raises(ifkv.IfkvError, match="was made by model"):
            ifkv.stitch(own, [document])


# --- models ------------------------------------------------------------------------------------


def test_pictures_that_do_not_move_are_refused(monkeypatch):
    own = tiny_vision_model()
    inner: Any = type(own.model)
    right = inner.get_rope_index

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions, deltas = right(self, *args, **kwargs)
        positions[0] *= 4  # as some releases multiply the time axis of still pictures
        return positions, deltas

    monkeypatch.setattr(inner, "get_rope_index", scaled)
    with pytest.raises(UnsupportedRopeError, match="cannot be moved exactly"):
        ifkv.patch(own)


@pytest.mark.parametrize("family", sorted(set(VISION_FAMILIES) - set(vision_families())))
def test_releases_whose_pictures_cannot_be_moved_are_refused(family):
    with pytest.raises(UnsupportedRopeError, match=r"Install transformers 5\.17\.0 or later"):
        ifkv.patch(tiny_vision_model(family))


@pytest.mark.skipif("qwen2_5_vl" not in vision_families(), reason="this release is refused")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_windows_are_refused(family):
    own = tiny_vision_model(family, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        ifkv.patch(own)


def test_a_rotary_module_with_unmerged_axes_is_refused(monkeypatch):
    own = tiny_vision_model()
    kind: Any = type(own.model.language_model.rotary_emb)
    right = kind.forward

    def unmerged(self: Any, x: Any, position_ids: Any) -> Any:
        cos, sin = right(self, x, position_ids)
        return cos.expand(3, *cos.shape), sin.expand(3, *sin.shape)

    monkeypatch.setattr(kind, "forward", unmerged)
    with pytest.raises(UnsupportedRopeError, match="leaves the axes of positions"):
        ifkv.patch(own)


def test_other_sections_are_refused():
    """The runs of frequencies that belong to an axis are a fact of the file."""
    own = tiny_vision_model()
    own.model.language_model.rotary_emb.mrope_section = [2, 2, 4]
    with ifkv.patch(own):
        pass  # other sizes are the model's own
    module: Any = own.model.language_model.rotary_emb
    for name in ("recomposition_frequencies", "apply_interleaved_mrope"):
        if hasattr(module, name):  # renamed between releases
            right = getattr(module, name)
            setattr(module, name, lambda freq, *rest, r=right: r(freq.flip(0), *rest))
    with pytest.raises(UnsupportedModelError, match="by other angles"):
        ifkv.patch(own)


def test_other_rope_types_are_refused():
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    own = tiny_vision_model(rope_parameters=parameters | {"mrope_section": [3, 3, 2]})
    with pytest.raises(UnsupportedRopeError, match="'linear' is not supported"):
        ifkv.patch(own)


def test_a_tower_whose_frequencies_were_rounded_is_refused():
    own = tiny_vision_model(dtype=torch.float32)
    own.model.visual.to(torch.bfloat16)
    own.model.visual.float()
    with pytest.raises(UnsupportedRopeError, match="cast to half precision"):
        ifkv.patch(own)


def test_unknown_wrappers_are_refused():
    """Also around a decoder that is supported: no file says how this one shows it pictures."""
    text = dict(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    unknown = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="wraps a decoder of type 'llama' in a way"):
        ifkv.patch(unknown)


def test_hooks_on_the_tower_are_refused():
    own = tiny_vision_model()
    own.get_submodule("model.visual").register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="forward hook"):
        ifkv.patch(own)


def test_a_broken_wrapper_file_is_refused():
    good = (patches() / "wrappers" / "qwen3_vl.toml").read_text(encoding="utf-8")
    assert parse_wrapper(good, "mine").rope_axes == 3
    for broken, message in (
        (good.replace("rope_axes = 3", 'rope_axes = "3"'), "rope_axes is '3' but must be int"),
        (good.replace('"interleaved"', '"mixed"'), "'mixed' but must be one of"),
        (good.replace('tower = "model.visual"\n', ""), "lacks the key 'tower'"),
        (good.replace("get_rope_index", "get_index"), "upstream_hashes lacks"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"patches/wrappers/mine.toml.*{message}"):
            parse_wrapper(broken, "mine")


# --- the model's own calls beside a stitched cache ---------------------------------------------


def test_a_forward_without_positions_is_refused_where_it_would_be_wrong(model):
    ids = torch.tensor([[30, 31]])
    pictured = ifkv.stitch(model, ifkv.prefill_documents(model, [page()]))
    text = ifkv.stitch(model, ifkv.prefill_documents(model, [[5, 6, 7]]))
    with pytest.raises(InvalidInputError, match="was given no position_ids"):
        model(ids, **cache_keyword(model, pictured))
    out = model(ids, **cache_keyword(model, text))  # slots are positions, and nothing is remembered
    text.crop()
    want = ifkv.recompute(model, text, [], prompt_ids=[30, 31])
    assert_close(out.logits[0, -1], want, what="logits")
    text.crop()
    model.model.rope_deltas = torch.tensor([[9]])
    with pytest.raises(InvalidInputError, match="was given no position_ids"):
        model(ids, **cache_keyword(model, text))


def test_generate_without_positions_is_refused(model):
    model.model.rope_deltas = torch.tensor([[9]])
    cache = ifkv.stitch(model, ifkv.prefill_documents(model, [[5, 6, 7]]))
    ids = torch.cat((cache.token_ids, torch.tensor([30])))[None]
    with pytest.raises(InvalidInputError, match="do not stand where"):
        model.generate(ids, max_new_tokens=2, **cache_keyword(model, cache))


def test_prompts_have_no_pictures(model):
    cache = ifkv.stitch(model, ifkv.prefill_documents(model, [[5, 6, 7]]))
    for name, value in page().inputs.items():
        with pytest.raises(InvalidInputError, match=f"{name} cannot be given: a prompt is text"):
            ifkv.generate(model, cache, [30], **{name: value})


def test_copies_keep_their_pictures(model):
    cache: StitchedCache = ifkv.stitch(model, ifkv.prefill_documents(model, [page(0), page(1)]))
    for twin in (cache.clone(), copy.deepcopy(cache)):
        got = ifkv.recompute(model, twin, twin.candidate_slots, prompt_ids=[30])
        once = cache.clone()
        want = ifkv.recompute(model, once, once.candidate_slots, prompt_ids=[30])
        assert_close(got, want, what="logits")


@pytest.mark.parametrize("family", vision_families())
def test_every_wrapper_names_its_model(family):
    own = shared_tiny_vision_model(family)
    assert wrapper_of(own) is wrappers()[family]
    assert wrapper_of(shared_tiny_model("llama")) is None
