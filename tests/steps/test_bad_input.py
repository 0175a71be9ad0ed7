"""Bad input is refused with the value found, the rule and the remedy, and nothing changes."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

import ifkv
from ifkv.errors import FingerprintMismatchError, GeometryError, InvalidInputError
from ifkv.testing import assert_bit_equal, tiny_model, tiny_tokenizer

PREFIX = [1, 2]
DOCUMENTS = [[3, 14, 15, 92, 6], [53, 58], [79, 32, 38]]
PROMPT = [26, 43]
LONGEST = 40


@dataclasses.dataclass
class Bench:
    """A patched model and everything made with it, and the same by a stranger."""

    model: PreTrainedModel
    documents: list[ifkv.DocumentCache]
    cache: ifkv.StitchedCache
    scored_only: ifkv.StitchedCache
    stranger: PreTrainedModel
    strange_documents: list[ifkv.DocumentCache]
    strange_cache: ifkv.StitchedCache

    def prefill(self, *documents: Any, **options: Any) -> Any:
        return self.prefill_all(list(documents), **options)

    def prefill_all(self, documents: Any, **options: Any) -> Any:
        return ifkv.prefill_documents(self.model, documents, **options)

    def stitch(self, documents: Any = None, **options: Any) -> Any:
        chosen = self.documents if documents is None else documents
        return ifkv.stitch(self.model, chosen, **options)

    def score(self, query: Any = PROMPT, **options: Any) -> Any:
        return ifkv.score(self.model, self.cache, query, **options)

    def select(self, **options: Any) -> Any:
        return ifkv.select(self.cache, torch.arange(12.0), **options)

    def recompute(self, slots: Any, **options: Any) -> Any:
        return ifkv.recompute(self.model, self.cache, slots, **options)

    def generate(self, prompt: Any = PROMPT, **options: Any) -> Any:
        return ifkv.generate(self.model, self.cache, prompt, **options)

    def by_hand(self, cache: Any) -> Any:
        ids = torch.cat((cache.token_ids, torch.tensor(PROMPT)))[None]
        return self.model.generate(ids, past_key_values=cache, max_new_tokens=2)

    def tampered(self, **changes: Any) -> list[ifkv.DocumentCache]:
        return [self.documents[0], dataclasses.replace(self.documents[1], **changes)]

    def tampered_prefix(self, **changes: Any) -> list[ifkv.DocumentCache]:
        prefix = self.documents[1].prefix
        assert prefix is not None
        return self.tampered(prefix=dataclasses.replace(prefix, **changes))

    @property
    def rows(self) -> list[Tensor]:
        caches = (self.cache, self.scored_only, self.strange_cache)
        return [t for c in caches for layer in c.layers for t in (layer.keys, layer.values)]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """One for all cases: that they may share it is part of what is tested."""
    made: list[Any] = []
    models = [
        tiny_model("llama", dtype=torch.float32, seed=seed, max_position_embeddings=LONGEST)
        for seed in (0, 1)
    ]
    for model in models:
        ifkv.patch(model)
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        made.append((documents, ifkv.stitch(model, documents)))
    scored_only = ifkv.stitch(models[0], made[0][0], geometry="hl-tp")
    yield Bench(models[0], *made[0], scored_only, models[1], *made[1])
    for model in models:
        ifkv.unpatch(model)


Case = tuple[type[Exception], str, Callable[[Bench], Any]]
INPUT, MISMATCH, GEOMETRY = InvalidInputError, FingerprintMismatchError, GeometryError

CASES: dict[str, Case] = {
    # ids
    "no document id": (INPUT, r"document 1 is empty.*at least one", lambda b: b.prefill([5], [])),
    "id too large": (INPUT, r"document 0 .*id 97.*0 to 96", lambda b: b.prefill([3, 97])),
    "id negative": (INPUT, r"document 0 .*id -1.*0 to 96", lambda b: b.prefill([3, -1])),
    "id huge": (INPUT, r"document 0 is not a sequence", lambda b: b.prefill([2**70])),
    "ids of floats": (INPUT, r"float32.*integers", lambda b: b.prefill([1.0, 2.0])),
    "ids of truth values": (INPUT, r"bool.*integers", lambda b: b.prefill([True, False])),
    "ids of strings": (INPUT, r"document 0 is not a sequence", lambda b: b.prefill(["a", "b"])),
    "text for ids": (INPUT, r"document 0 is a string.*Session", lambda b: b.prefill("a text")),
    "none for ids": (INPUT, r"document 0 is not a sequence", lambda b: b.prefill(None)),
    "ids of two sequences": (INPUT, r"\(2, 2\).*\[n\]", lambda b: b.prefill([[1, 2], [3, 4]])),
    "ids as one document": (
        INPUT,
        r"document 0 has shape \(\)",
        lambda b: b.prefill_all(DOCUMENTS[0]),
    ),
    "documents as one text": (
        INPUT,
        r"documents is one string.*list",
        lambda b: b.prefill_all("text"),
    ),
    "documents none": (
        INPUT,
        r"documents is None.*list",
        lambda b: b.prefill_all(None),
    ),
    "prefix id too large": (INPUT, r"the prefix.*id 99", lambda b: b.prefill([3], prefix=[99])),
    "document too long": (
        INPUT,
        rf"41 positions.*document 1 with its prefix.*{LONGEST}.*[Ff]ewer",
        lambda b: b.prefill([3], [4] * (LONGEST - 1), prefix=PREFIX),
    ),
    "prefix of another model": (
        MISMATCH,
        r"prefix was made by model [0-9a-f]{8}.*token ids",
        lambda b: b.prefill([3], prefix=b.strange_documents[0].prefix),
    ),
    "document for a prefix": (
        INPUT,
        r"encoded behind 2 tokens.*\.prefix",
        lambda b: b.prefill([3], prefix=b.documents[0]),
    ),
    "batch_tokens 0": (
        INPUT,
        r"batch_tokens is 0.*at least 1",
        lambda b: b.prefill(batch_tokens=0),
    ),
    "batch_tokens 2.5": (INPUT, r"batch_tokens is 2\.5", lambda b: b.prefill(batch_tokens=2.5)),
    # stitch
    "nothing to stitch": (INPUT, r"no documents.*at least one", lambda b: b.stitch([])),
    "one document, no list": (INPUT, r"DocumentCache.*list", lambda b: b.stitch(b.documents[0])),
    "ids for documents": (
        INPUT,
        r"document 0 is of type list.*prefill",
        lambda b: b.stitch([[1, 2]]),
    ),
    "order too short": (INPUT, r"order is \[0, 1\].*3 documents", lambda b: b.stitch(order=[0, 1])),
    "order twice": (INPUT, r"order is \[0, 1, 1\]", lambda b: b.stitch(order=[0, 1, 1])),
    "order from 1": (INPUT, r"order is \[1, 2, 3\].*from 0", lambda b: b.stitch(order=[1, 2, 3])),
    "order of floats": (INPUT, r"order holds 0\.9", lambda b: b.stitch(order=[0.9, 1.0, 2.0])),
    "order of strings": (INPUT, r"order holds '0'", lambda b: b.stitch(order="012")),
    "geometry": (INPUT, r"'local' is unknown.*global", lambda b: b.stitch(geometry="local")),
    "geometry none": (INPUT, r"None is unknown.*global", lambda b: b.stitch(geometry=None)),
    "documents of another model": (
        MISMATCH,
        r"document 1 was made by model [0-9a-f]{8}, this one is [0-9a-f]{8}.*[Pp]refill",
        lambda b: b.stitch([b.documents[0], b.strange_documents[1]]),
    ),
    "prefixes that differ": (
        MISMATCH,
        r"document 1.*\[7\].*document 0.*\[1, 2\].*one prefix",
        lambda b: b.stitch([b.documents[0], *b.prefill([3], prefix=[7])]),
    ),
    "prefix and none": (
        MISMATCH,
        r"document 1.*prefix \[\].*one prefix",
        lambda b: b.stitch([b.documents[0], *b.prefill([3])]),
    ),
    "prefix lost": (
        INPUT,
        r"2 prefix tokens.*rows of 0",
        lambda b: b.stitch(b.tampered(prefix=None)),
    ),
    "half a prefix's ids": (
        INPUT,
        r"2 prefix tokens.*rows of 1.*keep \.prefix",
        lambda b: b.stitch(b.tampered_prefix(token_ids=torch.tensor([1]))),
    ),
    "half a prefix's keys": (
        INPUT,
        r"prefix of document 1 has 2 tokens.*\(3, 2, 1, 8\)",
        lambda b: b.stitch(b.tampered_prefix(keys=b.documents[0].prefix.keys[:, :, :1])),
    ),
    "rows of another model's prefix": (
        MISMATCH,
        r"prefix of document 1 was made by",
        lambda b: b.stitch(b.tampered(prefix=b.strange_documents[1].prefix)),
    ),
    "rows missing": (
        INPUT,
        r"document 1 has 2 tokens.*\(3, 2, 1, 8\)",
        lambda b: b.stitch(b.tampered(values=b.documents[1].values[:, :, :1])),
    ),
    "rows of another dtype": (
        INPUT,
        r"document 1.*float16.*same.*dtype",
        lambda b: b.stitch(
            b.tampered(keys=b.documents[1].keys.half(), values=b.documents[1].values.half())
        ),
    ),
    "context too long": (
        INPUT,
        rf"42 positions.*stitched context.*max_position_embeddings is {LONGEST}",
        lambda b: b.stitch(b.documents[:1] * 8),
    ),
    # score, select, reorder
    "query empty": (INPUT, r"query is empty", lambda b: b.score([])),
    "query a string": (INPUT, r"query is a string", lambda b: b.score("what?")),
    "query too long": (INPUT, rf"42 positions.*query.*{LONGEST}", lambda b: b.score([5] * 30)),
    "layers none": (INPUT, r"layers is \[\].*at least one", lambda b: b.score(layers=[])),
    "layer 3 of 3": (INPUT, r"layers is \[3\].*0 to 2.*-3", lambda b: b.score(layers=[3])),
    "layer -4 of 3": (INPUT, r"layers is \[-4\].*0 to 2", lambda b: b.score(layers=[-4])),
    "layers a number": (INPUT, r"layers is 1.*sequence", lambda b: b.score(layers=1)),
    "layers of floats": (INPUT, r"layers holds 1\.0", lambda b: b.score(layers=[1.0])),
    "layers of truth values": (INPUT, r"layers holds True", lambda b: b.score(layers=[True])),
    "layers of strings": (INPUT, r"layers holds 'all'", lambda b: b.score(layers=["all"])),
    "reduction": (INPUT, r"'max' is unknown.*l2, sum", lambda b: b.score(reduction="max")),
    "ratio 1.01": (INPUT, r"ratio is 1\.01.*number from 0.*to 1", lambda b: b.select(ratio=1.01)),
    "ratio negative": (INPUT, r"ratio is -0\.1", lambda b: b.select(ratio=-0.1)),
    "ratio nan": (INPUT, r"ratio is nan", lambda b: b.select(ratio=float("nan"))),
    "ratio infinite": (INPUT, r"ratio is inf", lambda b: b.select(ratio=float("inf"))),
    "ratio true": (INPUT, r"ratio is True", lambda b: b.select(ratio=True)),
    "ratio a string": (INPUT, r"ratio is '0\.15'", lambda b: b.select(ratio="0.15")),
    "ratio none": (INPUT, r"ratio is None", lambda b: b.select(ratio=None)),
    "ratio of reorder": (
        INPUT,
        r"ratio is 2,",
        lambda b: ifkv.reorder(b.model, b.documents, PROMPT, ratio=2),
    ),
    "scores of another cache": (
        INPUT,
        r"shape \(5,\).*12 slots",
        lambda b: ifkv.select(b.cache, torch.zeros(5)),
    ),
    "scores of nan": (
        INPUT,
        r"NaN",
        lambda b: ifkv.select(b.cache, torch.full((12,), float("nan"))),
    ),
    "scores a list": (
        INPUT,
        r"scores are of type list.*tensor",
        lambda b: ifkv.select(b.cache, [0.0] * 12),
    ),
    "select in no cache": (
        INPUT,
        r"NoneType.*ifkv\.stitch",
        lambda b: ifkv.select(None, torch.zeros(12)),  # type: ignore[arg-type]  # tested
    ),
    # recompute
    "slot too large": (INPUT, r"slot 12 is out of range.*0 to 11", lambda b: b.recompute([3, 12])),
    "slot negative": (INPUT, r"slot -1 is out of range.*0 to 11", lambda b: b.recompute([-1])),
    "slot twice": (INPUT, r"slot 4 is given more than once", lambda b: b.recompute([4, 3, 4])),
    "slots as a mask": (INPUT, r"bool.*integers", lambda b: b.recompute(torch.ones(12) > 0)),
    "slots of floats": (INPUT, r"float32.*integers", lambda b: b.recompute([3.0])),
    "slots of two rows": (INPUT, r"\(1, 1\).*\[k\]", lambda b: b.recompute([[3]])),
    "slots a number": (INPUT, r"shape \(\).*\[k\]", lambda b: b.recompute(3)),
    "slots a string": (INPUT, r"slots is no sequence", lambda b: b.recompute("3")),
    "slots none": (INPUT, r"slots is no sequence", lambda b: b.recompute(None)),
    "block_tokens 0": (INPUT, r"block_tokens is 0", lambda b: b.recompute([3], block_tokens=0)),
    "block_tokens 1.5": (
        INPUT,
        r"block_tokens is 1\.5",
        lambda b: b.recompute([3], block_tokens=1.5),
    ),
    "prompt empty": (INPUT, r"prompt is empty", lambda b: b.recompute([3], prompt_ids=[])),
    "prompt id": (INPUT, r"prompt holds token id 97", lambda b: b.recompute([3], prompt_ids=[97])),
    "prompt too long": (
        INPUT,
        rf"41 positions.*context and prompt.*{LONGEST}",
        lambda b: b.recompute([3], prompt_ids=[5] * 29),
    ),
    "recompute in no cache": (
        INPUT,
        r"DynamicCache was given.*ifkv\.stitch",
        lambda b: ifkv.recompute(b.model, DynamicCache(), [3]),  # type: ignore[arg-type]  # tested
    ),
    # caches of others, and of geometries that can only be scored
    "score a stranger's cache": (
        MISMATCH,
        r"cache belongs to model [0-9a-f]{8}, this one is [0-9a-f]{8}",
        lambda b: ifkv.score(b.model, b.strange_cache, PROMPT),
    ),
    "recompute a stranger's cache": (
        MISMATCH,
        r"cache belongs to model",
        lambda b: ifkv.recompute(b.model, b.strange_cache, [3]),
    ),
    "answer from a stranger's cache": (
        MISMATCH,
        r"cache belongs to model",
        lambda b: ifkv.generate(b.model, b.strange_cache, PROMPT),
    ),
    "recompute an overlapping geometry": (
        GEOMETRY,
        r"recompute needs.*'global'.*'hl-tp'.*[Ss]titch",
        lambda b: ifkv.recompute(b.model, b.scored_only, [3]),
    ),
    "answer from an overlapping geometry": (
        GEOMETRY,
        r"generate needs.*'global'.*'hl-tp'.*[Ss]titch",
        lambda b: ifkv.generate(b.model, b.scored_only, PROMPT),
    ),
    "answer from an overlapping geometry by hand": (
        GEOMETRY,
        r"'hl-tp'.*overlap.*geometry='global'",
        lambda b: b.by_hand(b.scored_only),
    ),
    "run over an overlapping geometry by hand": (
        GEOMETRY,
        r"'hl-tp'.*overlap.*geometry='global'",
        lambda b: b.model(torch.tensor([PROMPT]), past_key_values=b.scored_only),
    ),
    "crop into the context": (
        INPUT,
        r"crop\(-1\).*at most the 0",
        lambda b: b.cache.crop(-1),
    ),
    "crop to a length": (INPUT, r"crop\(12\).*negative", lambda b: b.cache.crop(12)),
    # generate
    "prompts of two sequences": (
        INPUT,
        r"\(2, 1\).*one sequence",
        lambda b: b.generate([[1], [2]]),
    ),
    "no new tokens": (INPUT, r"max_new_tokens is 0", lambda b: b.generate(max_new_tokens=0)),
    "assisted decoding": (
        INPUT,
        r"prompt_lookup_num_tokens.*leave it out",
        lambda b: b.generate(prompt_lookup_num_tokens=3),
    ),
    "assisted decoding in a config": (
        INPUT,
        r"prompt_lookup_num_tokens.*leave it out",
        lambda b: b.generate(generation_config=GenerationConfig(prompt_lookup_num_tokens=3)),
    ),
    "a cache of another kind in a config": (
        INPUT,
        r"cache_implementation is 'static' in the generation config.*to None",
        lambda b: b.generate(generation_config=GenerationConfig(cache_implementation="static")),
    ),
    "token healing": (
        INPUT,
        r"token_healing changes the prompt.*leave it out",
        lambda b: b.generate(token_healing=True, tokenizer=tiny_tokenizer()),
    ),
    "token healing in a config": (
        INPUT,
        r"token_healing changes the prompt.*leave it out",
        lambda b: b.generate(generation_config=GenerationConfig(token_healing=True)),
    ),
    "an unknown keyword": (
        ValueError,  # transformers' own
        r"made_up",
        lambda b: b.generate(made_up=1),
    ),
}

RESERVED: dict[str, Any] = {
    "attention_mask": torch.ones(1, 14),
    "cache_implementation": "static",
    "input_ids": torch.ones(1, 2).long(),
    "inputs": torch.ones(1, 2).long(),
    "inputs_embeds": torch.ones(1, 2, 32),
    "past_key_values": DynamicCache(),
    "position_ids": torch.arange(14)[None],
    "use_cache": False,
}
for keyword, value in RESERVED.items():
    CASES[f"reserved keyword {keyword}"] = (
        INPUT,
        rf"{keyword} cannot be given",
        lambda b, kwargs={keyword: value}: b.generate(**kwargs),
    )


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments_are_refused_and_nothing_changes(bench: Bench, name: str) -> None:
    error, message, call = CASES[name]
    before = [rows.clone() for rows in bench.rows]
    config = copy.deepcopy(vars(bench.model.generation_config))
    with pytest.raises(error, match=rf"(?s){message}"):
        call(bench)
    for got, want in zip(bench.rows, before, strict=True):
        assert_bit_equal(got, want, what="a cache after the refusal")
    assert vars(bench.model.generation_config) == config
    assert bench.cache.get_seq_length() == bench.cache.context_length == 12


def test_rows_appended_before_recomputing_or_answering() -> None:
    with ifkv.patch(model := tiny_model("llama")):
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX))
        model(torch.tensor([PROMPT]), past_key_values=cache)
        for call in (
            lambda: ifkv.recompute(model, cache, [3]),
            lambda: ifkv.generate(model, cache, PROMPT),
        ):
            with pytest.raises(InvalidInputError, match=r"2 slots.*cache\.crop\(\)"):
                call()
        assert cache.get_seq_length() == 14
        cache.crop()
        ifkv.recompute(model, cache, [3], prompt_ids=PROMPT)
        with pytest.raises(InvalidInputError, match=r"2 slots.*cache\.crop\(\)"):
            ifkv.generate(model, cache, [5, 6])  # another prompt than the one that has run


def test_every_error_is_an_ifkv_error_and_bad_arguments_are_value_errors() -> None:
    classes = [v for v in vars(ifkv.errors).values() if isinstance(v, type)]
    errors = [each for each in classes if not issubclass(each, Warning)]
    assert all(issubclass(error, ifkv.IfkvError) for error in errors)
    assert issubclass(InvalidInputError, ValueError)
