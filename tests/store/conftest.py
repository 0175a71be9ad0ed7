"""A disk store with a document in it, and a bucket of an S3 server that can be made to fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from faulty_proxy import FaultyProxy
from ifkv.store import DiskStore, key_of
from s3_bucket import s3
from stored_documents import DOCUMENT


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    made = DiskStore(tmp_path)
    made.put(DOCUMENT)
    return made


@pytest.fixture
def file(store: DiskStore) -> Path:
    return store.folder.file_of(key_of(DOCUMENT))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    yield moto.get_host_and_port()
    moto.stop()


@pytest.fixture(scope="module")
def shared_proxy(server: tuple[str, int]) -> Iterator[FaultyProxy]:
    """One for all tests: to make an S3 client takes longer than they do."""
    made = FaultyProxy(*server)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_ENDPOINT_URL", made.url),
            ("AWS_MAX_ATTEMPTS", "1"),
        ):
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        yield made
    made.close()


@pytest.fixture
def proxy(shared_proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    yield shared_proxy
    shared_proxy.heal()
    shared_proxy.part = ""


@pytest.fixture
def bucket(proxy: FaultyProxy) -> str:
    name = f"bucket-{uuid4().hex}"
    s3(proxy).mkdir(name)
    proxy.part = name
    return name
