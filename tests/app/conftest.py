"""What tests of the service share: settings with a database of either kind, and the engine of a module's service."""

from typing import Any

import pytest

from tests.fake_tgi import FakeTGI


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings with a database of one's own or a shared one: quick tests of the parts use both kinds themselves."""
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("postgres").create_database()}


@pytest.fixture
def tgi(everyone: tuple[FakeTGI, Any]) -> FakeTGI:
    """The engine of the module's service `everyone`, with nothing left of the tests before."""
    tgi, _ = everyone
    tgi.acts.clear()
    tgi.requests.clear()
    return tgi
