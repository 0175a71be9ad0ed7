"""Names that differ between releases of transformers."""

import warnings
from contextlib import nullcontext

import pytest
from torch import nn
from transformers import DynamicCache

import ifkv
from ifkv.errors import UpstreamWarning
from ifkv.models.compat import cache_keyword
from ifkv.testing import tiny_model


class Older(nn.Module):
    def forward(self, hidden, past_key_values=None, use_cache=False): ...


class Newer(nn.Module):
    def forward(self, hidden, cache=None, use_cache=False, **kwargs): ...


class HandingOn(Newer):
    def forward(self, *args, **kwargs): ...


@pytest.mark.parametrize(
    ("module", "name"),
    [(Older(), "past_key_values"), (Newer(), "cache"), (HandingOn(), "cache")],
)
def test_a_cache_goes_by_the_name_that_the_forward_has(module, name):
    cache = DynamicCache()
    assert cache_keyword(module, cache) == {name: cache}


class Wrapped(nn.Module):
    """A layer behind a forward that names nothing, as compiled ones are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_request_runs_without_a_deprecated_name(wrapped):
    model = tiny_model("llama")
    if wrapped:
        model.model.layers = nn.ModuleList(map(Wrapped, model.model.layers))
    # Whatever stands around a layer has not been read.
    expected = pytest.warns(UpstreamWarning, match="Wrapped") if wrapped else nullcontext()
    with expected:
        ifkv.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        documents = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9, 10]], prefix=[1])
        cache = ifkv.stitch(model, documents)
        slots = ifkv.select(cache, ifkv.score(model, cache, [20, 21]), ratio=0.5)
        ifkv.recompute(model, cache, slots)
        output = ifkv.generate(model, cache, [20, 21], max_new_tokens=3, do_sample=False)
    assert 3 <= output.shape[1] <= 5
