"""The adapter against a real Feast with its SQLite online store and files; skipped where Feast is not installed.

Feast 0.67 needs an older pandas and an older prometheus-client than are pinned here, so it has an environment of its
own: docs/features.md says how to run this there.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.errors import Conflict, NotFound, Unavailable
from app.features.feast import CannotUseFeast, FeastFeatures
from app.features.store import FeatureValue, Point

feast = pytest.importorskip("feast", reason="Feast is not installed beside the pinned versions: see docs/features.md")

pytestmark = pytest.mark.filterwarnings("default")

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
REPO = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float64, Int64, String

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.INT64)
shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.STRING)
source = FileSource(path="customers.parquet", timestamp_field="event_timestamp", created_timestamp_column="created")
plans = FeatureView(name="plans", entities=[customer], ttl=timedelta(days=30), source=source, schema=[
    Field(name="plan", dtype=String), Field(name="seats", dtype=Int64), Field(name="score", dtype=Float64),
    Field(name="tags", dtype=Array(String)), Field(name="customer_id", dtype=Int64)])
both = FeatureView(name="both", entities=[customer, shop], source=source, schema=[
    Field(name="seats", dtype=Int64), Field(name="customer_id", dtype=Int64), Field(name="shop_id", dtype=String)])
"""
STORE = """
project: test
provider: local
registry: data/registry.db
online_store: {type: sqlite, path: data/online.db}
entity_key_serialization_version: 3
"""
ROWS: list[dict[str, Any]] = [
    {"customer_id": 1, "plan": "pro", "seats": 5, "event": -20, "created": -20},
    {"customer_id": 1, "plan": "past due", "seats": 5, "event": -10, "created": -2},
    {"customer_id": 1, "plan": "cancelled", "seats": 0, "event": -1, "created": -1},
    {"customer_id": 2, "plan": "old", "seats": 1, "event": -40, "created": -40},
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pandas

    folder = tmp_path_factory.mktemp("feast")
    (folder / "data").mkdir()
    (folder / "feature_store.yaml").write_text(STORE)
    (folder / "definitions.py").write_text(REPO.replace("customers.parquet", str(folder / "customers.parquet")))
    frame = pandas.DataFrame(
        {
            "customer_id": [row["customer_id"] for row in ROWS],
            "shop_id": ["s"] * len(ROWS),
            "plan": [row["plan"] for row in ROWS],
            "seats": [row["seats"] for row in ROWS],
            "score": [0.5] * len(ROWS),
            "tags": [["a"]] * len(ROWS),
            "event_timestamp": [NOW + timedelta(days=row["event"]) for row in ROWS],
            "created": [NOW + timedelta(days=row["created"]) for row in ROWS],
        }
    )
    frame.to_parquet(folder / "customers.parquet")
    import subprocess
    import sys

    command = Path(sys.executable).with_name("feast")
    subprocess.run([command, "-c", folder, "apply"], check=True, capture_output=True)
    store = feast.FeatureStore(repo_path=str(folder))
    store.materialize(NOW - timedelta(days=50), NOW, feature_views=["plans"])
    return folder


@pytest.fixture(scope="module")
async def store(repo: Path) -> AsyncIterator[FeastFeatures]:
    async with FeastFeatures(repo, tenants=["default"], clock=NOW.timestamp) as store:
        yield store


def at(days: float) -> int:
    return round((NOW + timedelta(days=days)).timestamp() * 1000)


async def test_views_with_one_entity_are_described_with_what_can_be_told(store):
    (plans,) = await store.describe()
    assert (plans.name, plans.entity, plans.ttl_seconds) == ("plans", "customer_id", 30 * 24 * 3600)
    assert plans.features == {"plan": "string", "seats": "integer", "score": "number"}


async def test_features_are_read_as_they_are_now(store):
    assert await store.read("default", "plans", ["seats", "plan"], "1") == [
        FeatureValue(0, "read", at(-1)),
        FeatureValue("cancelled", "read", at(-1)),
    ]


async def test_what_is_too_old_unknown_or_another_tenants_is_not_read(store):
    assert [each.state for each in await store.read("default", "plans", ["plan", "score"], "2")] == ["expired"] * 2
    for tenant, entity in (("default", "3"), ("default", "no number"), ("other", "1")):
        assert await store.read(tenant, "plans", ["plan"], entity) == [FeatureValue(None, "missing")]
    assert await store.join("other", "plans", ["plan"], [Point("1", at(0))]) == [[FeatureValue(None, "missing")]]


async def test_a_join_gives_what_was_known_then(store):
    """The same case as ours: the latest value leaks what happened after, and the latest event what was learnt after."""
    points = [Point("1", at(-5)), Point("1", at(-1.5)), Point("1", at(0)), Point("1", at(-30)), Point("1", at(-5))]
    joined = await store.join("default", "plans", ["plan", "seats"], [*points, Point("2", at(0)), Point("x", at(0))])
    assert [[value.value for value in values] for values in joined] == [
        ["pro", 5],
        ["past due", 5],
        ["cancelled", 0],
        [None, None],
        ["pro", 5],
        [None, None],
        [None, None],
    ]


async def test_a_view_or_feature_that_there_is_not_is_not_found(store):
    for view, name in (("both", "seats"), ("plans", "tags"), ("nothing", "plan")):
        with pytest.raises(NotFound):
            await store.read("default", view, [name], "1")


async def test_a_read_too_many_finds_the_store_away_and_the_loop_is_free(repo):
    go_on = threading.Event()
    async with FeastFeatures(repo, tenants=["default"], threads=1, clock=NOW.timestamp) as store:
        await store.describe()
        inner = store._store

        class Slow:
            def get_online_features(self, **options: Any) -> Any:
                go_on.wait(30)
                return inner.get_online_features(**options)

        store._store = Slow()
        first = asyncio.create_task(store.read("default", "plans", ["plan"], "1"))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="busy"):
            await store.read("default", "plans", ["plan"], "1")
        go_on.set()
        assert (await first)[0].value == "cancelled"
        assert (await store.read("default", "plans", ["plan"], "1"))[0].value == "cancelled"


async def test_a_read_does_not_wait_for_the_registry_behind_a_join(repo):
    """What there is in the repository is looked at again now and then: beside reads, not before them."""
    go_on, moment = threading.Event(), NOW.timestamp()
    async with FeastFeatures(repo, tenants=["default"], clock=lambda: moment) as store:
        assert (await store.read("default", "plans", ["plan"], "1"))[0].value == "cancelled"
        held = store._slow.submit(go_on.wait, 30)
        moment += 60
        assert (await store.read("default", "plans", ["plan"], "1"))[0].value == "cancelled"
        assert not held.done()
        go_on.set()
        assert [view.name for view in await store.describe()] == ["plans"]


@pytest.mark.parametrize(
    ("raised", "told"), [(ValueError("canary"), Unavailable), (NotImplementedError(), Conflict)], ids=["error", "no"]
)
async def test_what_feast_raises_is_told_without_its_words(repo, caplog, raised, told):
    async with FeastFeatures(repo, tenants=["default"], clock=NOW.timestamp) as store:
        await store.describe()

        class Broken:
            def get_historical_features(self, **_: Any) -> Any:
                raise raised

        store._store = Broken()
        with pytest.raises(told) as error:
            await store.join("default", "plans", ["plan"], [Point("1", at(0))])
    assert "canary" not in f"{error.value}{caplog.text}"


async def test_a_folder_without_a_repository_is_refused(tmp_path):
    with pytest.raises(CannotUseFeast, match=r"has no `feature_store.yaml`"):
        async with FeastFeatures(tmp_path, tenants=[]):
            pass
