"""What every test gets: the asyncio backend, and no way to a model hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
