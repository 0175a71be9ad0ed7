"""Options and fixtures shared by all tests."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel

import tried
from ifkv.testing import shared_tiny_model

# Tiny tensors: threads cost more than they give, and results must not depend on their number.
torch.set_num_threads(1)

# No deadline: the first example of a test builds its model. Without a deadline slow examples are
# fine too, and a large request is not a sign of a bad strategy.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=15, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=1000, **_COMMON)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--profile",
        choices=("quick", "long"),
        default="quick",
        help="how many examples each property is tried on: quick 15 (the same in every run), "
        "long 1000 (new ones in every run)",
    )
    parser.addoption(
        "--families",
        choices=("few", "all"),
        help="few: one family of each arithmetic, the default of the quick profile; all: every "
        "family, the default of the long one",
    )


def pytest_configure(config: pytest.Config) -> None:
    profile = config.getoption("--profile")
    settings.load_profile(profile)
    tried.choose(config.getoption("--families") or ("few" if profile == "quick" else "all"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what tries a family that this release of transformers cannot make."""
    for item in items:
        made_of = getattr(item, "callspec", None)
        if made_of is not None and made_of.params.get("family") in tried.UNMADE:
            item.add_marker(pytest.mark.skip(reason="transformers refuses this family's config"))


@pytest.fixture(scope="session", autouse=True)
def no_users_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not even a fixture of a whole module writes documents into the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFKV_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test finds no other test's documents."""
    monkeypatch.setenv("IFKV_STORE", str(tmp_path_factory.getbasetemp() / "store" / uuid4().hex))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Tiny models by family and options, each built once per session.

    The models are shared: a test that patches one must unpatch it (`with ifkv.patch(model):`), and
    one that changes weights or config builds its own with `tiny_model`.
    """
    return shared_tiny_model
