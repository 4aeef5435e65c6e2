"""What tests of the service share: settings with a database of either kind."""

from typing import Any

import pytest


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings with a database of one's own or a shared one: quick tests of the parts use both kinds themselves."""
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("postgres").create_database()}
