"""The profile of a request's steps, on a tiny model."""

import time

import torch

import milliseconds


def test_every_operator_has_one_kind():
    kinds = {
        name: milliseconds.kind_of(name)
        for name in ("aten::mm", "aten::copy_", "aten::mul", "aten::mkldnn_linear")
    }
    assert kinds["aten::mm"] == "matrix products"
    assert kinds["aten::copy_"] == "moving rows"
    assert kinds["aten::mul"] == kinds["aten::mkldnn_linear"] == "other operators"


def test_a_matrix_product_is_counted_as_one():
    x = torch.randn(256, 256)
    found = milliseconds.spent(lambda: x @ x, 3)
    assert found["kinds"]["matrix products"] > 0
    assert found["kinds"]["attention kernel"] == found["kinds"]["moving rows"] == 0
    assert found["operators"] >= 2  # matmul, and the mm that it calls


def test_time_outside_of_operators_is_between_them():
    def waiting():
        time.sleep(0.05)
        return torch.ones(2) + 1

    found = milliseconds.spent(waiting, 3)
    assert found["seconds"] >= 0.05
    assert found["kinds"]["between operators"] > 0.04


def test_each_step_and_full_prefill_have_a_row():
    setting = milliseconds.Setting(*milliseconds.load("tiny", torch.float32), 300)
    rows = milliseconds.measure(setting, 0.15, 2)
    assert [row["step"] for row in rows] == ["stitch", "score", "recompute, prompt", "full prefill"]
    assert all(row["seconds"] > 0 for row in rows)
    products = {row["step"]: row["kinds"]["matrix products"] for row in rows}
    assert all(products[step] > 0 for step in ("score", "recompute, prompt", "full prefill"))
    about = dict.fromkeys(
        ("model", "dtype", "date", "processor", "threads", "torch", "transformers", "repeats"), "x"
    )
    page = milliseconds.as_markdown(about | {"ratio": 0.15}, rows)
    assert page.count("\n| 300 | ") == 4
