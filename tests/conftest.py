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

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests.migrated import migrated
from tests.postgres import Postgres
from tests.properties import QUICK

settings.load_profile(QUICK)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's PostgreSQL server, started for the first test that wants it."""
    with Postgres() as server:
        yield server


KINDS = ("sqlite", "postgresql")
MORE_KINDS = ("sqlite", pytest.param("postgresql", marks=pytest.mark.slow))


def _url(request: pytest.FixtureRequest, folder: Callable[[], Path]) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{migrated(folder() / 'hallmark.db')}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without rows, once of each kind: for the statements themselves and who runs them."""
    return _url(request, lambda: tmp_path)


@pytest.fixture(params=MORE_KINDS)
def usual_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without rows, on PostgreSQL among the slow tests unless one is `on_either_kind`."""
    return _url(request, lambda: tmp_path)


@pytest.fixture(scope="module", params=MORE_KINDS)
def module_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As the usual one, but all tests of a module share it; each test empties it for itself."""
    return _url(request, lambda: tmp_path_factory.mktemp("module"))
