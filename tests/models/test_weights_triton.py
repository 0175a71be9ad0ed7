"""The Triton kernel that reads bytes by their addresses.

Runs where Triton is: on the CPU through its interpreter (`tox -e triton`), or on a GPU under
`pytest -m gpu`.
"""

import os
from typing import Any

import pytest
import torch

from ifkv.models.fingerprint import FingerprintCache, _parameters_of
from ifkv.models.weights import WeightSample
from ifkv.testing import tiny_model

pytest.importorskip("triton", reason="Triton is tested in an environment of its own: tox -e triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check_gather_bytes(device: str) -> None:
    from ifkv.models.weights_triton import gather_bytes

    held = [torch.randn(shape, device=device) for shape in ((7, 5), (1,), (300, 3))]
    addresses, want = [], []
    generator = torch.Generator().manual_seed(0)
    for x in held:
        for at in torch.randint(0, x.nbytes, (150,), generator=generator).tolist():
            addresses.append(x.data_ptr() + at)
            want.append(int(x.cpu().flatten().view(torch.uint8)[at]))
    got = gather_bytes(torch.tensor(addresses, device=device))
    assert got.tolist() == want


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set, and no GPU is used")
def test_interpreted_it_reads_what_lies_there() -> None:
    check_gather_bytes("cpu")


@pytest.mark.gpu
def test_compiled_it_reads_what_lies_there() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_gather_bytes("cuda")


@pytest.mark.gpu
def test_a_fingerprint_on_a_card_notices_what_torch_does_not_count() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model: Any = tiny_model("llama", dtype=torch.bfloat16).to("cuda")
    parameters = _parameters_of(model.base_model)
    assert WeightSample(parameters)._addresses is not None
    kept = FingerprintCache()
    before = kept.of(model)
    assert kept.of(model) == before
    weight = model.base_model.layers[1].mlp.up_proj.weight
    weight.data.mul_(2)
    after = kept.of(model)
    assert after != before
    weight.data.div_(2)
    assert kept.of(model) == before
