"""What every test gets: the asyncio backend, no way to a model hub, and a database of either kind that asks for one."""

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# pytest-xdist tells its workers how wide the terminal is, which would be how wide every command's tables are.
os.environ.pop("COLUMNS", None)
# Every commit of a database waits for its disk, and there are twenty thousand: memory does not make them wait.
if os.access(memory := Path("/dev/shm"), os.W_OK) and shutil.disk_usage(memory).free > 2 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.migrated import migrated
from tests.postgres import Postgres

# How long an example takes says more about the machine than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's PostgreSQL server, started for the first test that wants it."""
    with Postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without rows, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{migrated(tmp_path / 'hallmark.db')}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def module_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a database that all tests of a module share, once of each kind; each test empties it for itself."""
    if request.param == "sqlite":
        return f"sqlite:///{migrated(tmp_path_factory.mktemp('module') / 'hallmark.db')}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()
