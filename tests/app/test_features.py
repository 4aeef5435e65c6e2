"""What a feature was known to be at a moment: by one rule in both databases, whoever asks, and without a leak."""

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from app.database import Database
from app.errors import Conflict, FeatureMissing, FeaturesUnavailable, InvalidRequest, NotFound, Unavailable
from app.feature_commands import read_rows
from app.features import Asker, FeatureReader, FeatureRow, FeatureValue, FeatureView, Point, SqlFeatures, rows_of, shown
from app.features.asking import Asked, ask
from app.privacy.rings import FileRing
from app.privacy.sealing import MasterKeys, new_key
from app.releases import BadRelease, FeatureUse, Prompt, Release, read_release
from tests.migrated import migrated

NOW = 1_700_000_000_000
DAY = 24 * 3600 * 1000
VIEW = FeatureView(name="customer", entity="customer", features={"plan": "string", "seats": "integer"})
NAMES = ("plan", "seats")
_tenants = itertools.count()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


class World:
    """A store of each test's own tenant."""

    def __init__(self, portal: BlockingPortal, database: Database) -> None:
        self.portal = portal
        self.database = database
        self.clock = Clock()
        self.store = SqlFeatures(database, self.clock)

    def tenant(self) -> str:
        return f"tenant-{next(_tenants)}"

    def call(self, method: Any, *args: Any) -> Any:
        return self.portal.call(method, *args)


@pytest.fixture(scope="module")
def world(module_database_url: str) -> Iterator[World]:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(Database(module_database_url)) as opened:
        world = World(portal, opened)
        for ttl in (None, 5):
            view = FeatureView(
                name=f"held-{ttl}", entity="customer", features={"plan": "string", "seats": "integer"}, ttl_seconds=ttl
            )
            world.portal.call(lambda view=view: world.store.define(view, who="test"))
        world.portal.call(lambda: world.store.define(VIEW, who="test"))
        yield world


def row(entity: str = "c", event_at: int = 0, created_at: int | None = None, **values: Any) -> FeatureRow:
    return FeatureRow(entity=entity, event_at=NOW + event_at, values=values, created_at=created_at and NOW + created_at)


# --- what was known at a moment ---


def known(rows: Sequence[FeatureRow], point: Point, ttl_seconds: int | None) -> list[FeatureValue]:
    """The rule, as plainly as it can be said."""
    then = [each for each in rows if each.entity == point.entity]
    then = [each for each in then if each.event_at <= point.at and (each.created_at or 0) <= point.at]
    if not then:
        return [FeatureValue(None, "missing")] * len(NAMES)
    last = max(then, key=lambda each: (each.event_at, each.created_at))
    times = last.event_at, last.created_at
    if ttl_seconds is not None and point.at - last.event_at > ttl_seconds * 1000:
        return [FeatureValue(None, "expired", *times)] * len(NAMES)
    return [
        FeatureValue(last.values[name], "read", *times)
        if name in last.values
        else FeatureValue(None, "missing", *times)
        for name in NAMES
    ]


moments = st.integers(min_value=1, max_value=9)
written_rows = st.lists(
    st.builds(
        lambda entity, event, created, seats, is_known: FeatureRow(
            entity=entity,
            event_at=event * 1000,
            created_at=created * 1000,
            values={"plan": "pro", "seats": seats} if is_known else {"plan": "free"},
        ),
        st.sampled_from("ab"),
        moments,
        moments,
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=12,
    unique_by=lambda each: (each.entity, each.event_at, each.created_at),
)
points = st.lists(st.builds(Point, st.sampled_from("abc"), moments.map(lambda at: at * 1000)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(rows=written_rows, points=points, ttl=st.sampled_from([None, 5]))
def test_joining_and_reading_give_what_was_known_then(world, rows, points, ttl):
    tenant, view = world.tenant(), f"held-{ttl}"

    async def ask_all() -> tuple[list[Any], list[Any]]:
        await world.store.put(tenant, await world.store.view(view), rows)
        joined = await world.store.join(tenant, view, NAMES, points)
        return joined, [await world.store.read_at(tenant, view, NAMES, point) for point in points]

    joined, read = world.call(ask_all)
    assert joined == read == [known(rows, point, ttl) for point in points]


def test_a_join_does_not_leak_what_was_learnt_later_as_the_latest_value_does(world):
    """A customer cancels a week after the answer: the latest value would tell a model the answer to its question."""
    tenant = world.tenant()
    asked = Point("c", NOW - 7 * DAY)
    rows = [
        row("c", -30 * DAY, -30 * DAY, plan="pro", seats=5),
        row("c", -1 * DAY, -1 * DAY, plan="cancelled", seats=0),  # Happened after.
        row("c", -10 * DAY, -2 * DAY, plan="past due", seats=5),  # Happened before, and was known after.
    ]

    async def join() -> list[FeatureValue]:
        await world.store.put(tenant, VIEW, rows)
        return (await world.store.join(tenant, "customer", ["plan"], [asked]))[0]

    naive = max((each for each in rows if each.entity == asked.entity), key=lambda each: each.event_at)
    by_event_alone = max((each for each in rows if each.event_at <= asked.at), key=lambda each: each.event_at)
    (value,) = world.call(join)
    assert (naive.values["plan"], by_event_alone.values["plan"]) == ("cancelled", "past due")
    assert value.value == "pro"


def test_more_points_than_one_statement_takes_are_joined_in_their_order(world):
    tenant = world.tenant()

    async def join() -> list[list[FeatureValue]]:
        await world.store.put(tenant, VIEW, [row(f"c{n}", -1000, -1000, seats=n) for n in range(40)])
        return await world.store.join(tenant, "customer", ["seats"], [Point(f"c{n % 50}", NOW) for n in range(1_234)])

    joined = world.call(join)
    assert [value.value for (value,) in joined] == [n % 50 if n % 50 < 40 else None for n in range(1_234)]


def test_tenants_have_values_of_their_own_in_one_view(world):
    one, other = world.tenant(), world.tenant()

    async def read() -> list[Any]:
        await world.store.put(one, VIEW, [row(plan="pro")])
        await world.store.put(other, VIEW, [row(plan="free")])
        return [(await world.store.read(each, "customer", ["plan"], "c"))[0].value for each in (one, other, "nobody")]

    assert world.call(read) == ["pro", "free", None]


# --- writing ---


def test_the_same_rows_again_add_nothing_and_a_correction_adds_one(world):
    tenant = world.tenant()

    async def write() -> list[tuple[int, int]]:
        found = []
        for rows in ([row(plan="pro", seats=1)], [row(seats=1, plan="pro")], [row(plan="free", seats=1)]):
            put = await world.store.put(tenant, VIEW, rows)
            found.append((put.added, put.unchanged))
        return found

    assert world.call(write) == [(1, 0), (0, 1), (1, 0)]
    # Both were written in the same millisecond of the test's clock: the later one is known a millisecond later.
    values = world.call(world.store.read_at, tenant, "customer", ["plan"], Point("c", NOW + 1))
    assert values == [FeatureValue("free", "read", NOW, NOW + 1)]
    assert world.call(world.store.read_at, tenant, "customer", ["plan"], Point("c", NOW))[0].value == "pro"


def test_what_is_on_record_is_not_changed_and_a_refused_put_writes_nothing(world):
    tenant = world.tenant()
    world.call(world.store.put, tenant, VIEW, [row("c", -9, -5, plan="pro")])
    with pytest.raises(Conflict, match="something else is on record"):
        world.call(world.store.put, tenant, VIEW, [row("d", -9, -5, plan="pro"), row("c", -9, -5, plan="free")])
    assert world.call(world.store.read, tenant, "customer", ["plan"], "d") == [FeatureValue(None, "missing")]
    assert world.call(world.store.put, tenant, VIEW, [row("c", -9, -5, plan="pro")]).unchanged == 1


def test_a_row_replaces_all_of_the_one_before(world):
    tenant = world.tenant()
    world.call(world.store.put, tenant, VIEW, [row("c", -9, -9, plan="pro", seats=1), row("c", -5, -5, seats=2)])
    values = world.call(world.store.read, tenant, "customer", NAMES, "c")
    assert [(each.value, each.state) for each in values] == [(None, "missing"), (2, "read")]


def test_writers_at_the_same_time_lose_nothing(world):
    tenant = world.tenant()

    async def write() -> int:
        puts = [world.store.put(tenant, VIEW, [row(seats=n)]) for n in range(5)]
        return sum(put.added for put in await asyncio.gather(*puts))

    assert world.call(write) == 5


def test_a_view_keeps_what_rows_and_releases_rely_on(world):
    def define(**changes: Any) -> bool:
        facts = {"name": "stays", "entity": "customer", "features": {"plan": "string"}, **changes}
        return world.portal.call(lambda: world.store.define(FeatureView(**facts), who="test"))

    assert define()
    assert not define(features={"plan": "string", "seats": "integer"}, ttl_seconds=60, description="More.")
    for changes in ({"features": {"plan": "integer", "seats": "integer"}}, {"features": {"seats": "integer"}},
                    {"entity": "user"}, {"subject": "user"}):  # fmt: skip
        with pytest.raises(Conflict, match="stays so"):
            define(**{"features": {"plan": "string", "seats": "integer"}, **changes})
    view = world.call(world.store.view, "stays")
    assert (view.features, view.ttl_seconds, view.description) == (
        {"plan": "string", "seats": "integer"},
        60,
        "More.",
    )


def test_a_view_that_is_deleted_takes_its_values_along(world):
    tenant = world.tenant()
    view = FeatureView(name="goes", entity="customer", features={"plan": "string"})

    async def delete() -> None:
        await world.store.define(view, who="test")
        await world.store.put(tenant, view, [row(plan="pro")])
        await world.store.delete("goes")

    world.call(delete)
    for call in (world.store.view, world.store.delete):
        with pytest.raises(NotFound):
            world.call(call, "goes")
    with pytest.raises(NotFound):
        world.call(world.store.put, tenant, view, [row(plan="pro")])
    world.portal.call(lambda: world.store.define(view, who="test"))
    assert world.call(world.store.read, tenant, "goes", ["plan"], "c")[0].state == "missing"


def test_features_are_asked_for_by_view_and_name(world):
    tenant = world.tenant()
    world.call(world.store.put, tenant, VIEW, [row(plan="pro", seats=3)])
    rows = [Asked({"customer": "c"}), Asked({"customer": "c"}, NOW - DAY), Asked({"customer": 7, "user": "anna"})]
    found = world.call(ask, world.store, tenant, ["customer:seats", "customer:plan"], rows)
    assert [[each.value for each in values] for values in found] == [[3, "pro"], [None, None], [None, None]]
    for names, row_, error, message in (
        (["customer"], {"customer": "c"}, InvalidRequest, "written `view:feature`"),
        (["customer:plan"], {"user": "c"}, InvalidRequest, "rows[0].entity.customer"),
        (["nothing:plan"], {"customer": "c"}, NotFound, "no feature view"),
        (["customer:colour"], {"customer": "c"}, NotFound, "has no feature 'colour'"),
    ):
        with pytest.raises(error) as refused:
            world.call(ask, world.store, tenant, names, [Asked(row_)])
        assert message in str(refused.value)


# --- rows as they are sent ---


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"customer": "c", "event_time": "2026-11-01", "plan": 3}, "`plan`: must be text"),
        ({"customer": "c", "event_time": "2026-11-01", "plan": "x" * 2_001}, "`plan`: must be text"),
        ({"customer": "c", "event_time": "2026-11-01", "plan": "\ud800"}, "`plan`: must be text"),
        ({"customer": "c", "event_time": "2026-11-01", "seats": "3"}, "`seats`: must be a whole number"),
        ({"customer": "c", "event_time": "2026-11-01", "seats": True}, "`seats`: must be a whole number"),
        ({"customer": "c", "event_time": "2026-11-01", "seats": 2**53}, "`seats`: must be a whole number"),
        ({"customer": "c", "event_time": "2026-11-01", "colour": "red"}, "`colour`: there is no such column"),
        ({"customer": "c", "event_time": "2026-11-01"}, "it has none of the features plan, seats"),
        ({"customer": "c", "plan": "pro"}, "`event_time` is missing"),
        ({"customer": "c", "event_time": 17, "plan": "pro"}, "`event_time`: must be a time"),
        ({"customer": "c", "event_time": "0001-01-01", "plan": "pro"}, "between 1970 and 9999"),
        ({"event_time": "2026-11-01", "plan": "pro"}, "`customer`: must be the entity's key"),
        ({"customer": " ", "event_time": "2026-11-01", "plan": "pro"}, "`customer`: must be the entity's key"),
        ({"customer": "c", "event_time": "2026-11-01", "created_time": "2999-01-01", "plan": "pro"}, "in the future"),
    ],
)
def test_a_row_that_cannot_be_taken_is_told_by_its_place_and_field(given, problem):
    with pytest.raises(InvalidRequest) as refused:
        rows_of(
            VIEW, [("line 1", {"customer": "c", "event_time": "2026-11-01", "plan": "ok"}), ("line 2", given)], now=NOW
        )
    assert str(refused.value).startswith("1 row cannot be taken, so none was:\nline 2: ")
    assert problem in str(refused.value)


def test_many_bad_rows_are_counted_and_the_first_are_told():
    bad = [(f"line {n}", {"customer": "c", "event_time": str(n), "plan": "pro"}) for n in range(30)]
    with pytest.raises(InvalidRequest) as refused:
        rows_of(VIEW, bad, now=NOW)
    assert str(refused.value).startswith("30 rows cannot be taken")
    assert str(refused.value).endswith("and 10 more")


def test_two_rows_of_one_entity_and_time_are_refused():
    same = {"customer": "c", "event_time": "2026-11-01", "plan": "pro"}
    with pytest.raises(InvalidRequest, match="line 3: it is of the same entity and times as line 1"):
        rows_of(VIEW, [("line 1", same), ("line 3", same)], now=NOW)


def test_what_a_csv_file_has_as_text_is_read_as_what_the_view_says():
    view = FeatureView(name="v", entity="id", features={"n": "integer", "x": "number", "b": "boolean", "s": "string"})
    line = {"id": "7", "event_time": "2023-01-01T01:00:00+01:00", "n": "+12", "x": "1e3", "b": "True", "s": "12"}
    (read,) = rows_of(view, [("line 2", line)], now=NOW, is_text=True)
    assert read.values == {"n": 12, "x": 1000.0, "b": True, "s": "12"}
    assert read.event_at == 1_672_531_200_000
    for name, text in (("n", "1.5"), ("n", "1_0"), ("x", "nan"), ("x", "many"), ("b", "yes")):
        with pytest.raises(InvalidRequest, match=f"`{name}`: must be"):
            rows_of(view, [("line 2", line | {name: text})], now=NOW, is_text=True)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_file_of_any_kind_can_say_that_nothing_is_known_any_more(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    lines = [{"customer": "c", "event_time": "2026-01-01", "plan": "pro", "seats": 5},
             {"customer": "c", "event_time": "2026-02-01", "plan": None, "seats": None}]  # fmt: skip
    if kind == "csv":
        file.write_text("customer,event_time,plan,seats,\nc,2026-01-01,pro,5,\nc,2026-02-01,,,\n")
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(lines), file)
    else:
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [read.values for read in read_rows(VIEW, file)] == [{"plan": "pro", "seats": 5}, {}]


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"features": {"customer": "string"}}, "'customer' is what a file calls something else"),
        ({"features": {"event_time": "string"}}, "'event_time' is what a file calls something else"),
        ({"entity": "created_time"}, "`entity`: is what a file calls a time"),
    ],
)
def test_a_view_whose_columns_could_not_be_told_apart_is_refused(facts, problem):
    with pytest.raises(ValueError, match=problem):
        FeatureView(**{"name": "v", "entity": "customer", "features": {"plan": "string"}, **facts})


# --- people's features ---


def files_of(folder: Path) -> bytes:
    return b"".join(each.read_bytes() for each in folder.rglob("*") if each.is_file())


async def test_features_of_people_are_sealed_and_kept_by_their_pseudonym(tmp_path: Path):
    masters = MasterKeys.parse(new_key())
    view = FeatureView(name="person", entity="user", features={"note": "string"}, subject="user")
    path = migrated(tmp_path / "hallmark.db")
    async with Database.of_file(path) as database:
        ring = FileRing(tmp_path / "keys.db", masters)
        store = SqlFeatures(database, Clock(), ring=ring, pseudonym=masters.pseudonym)
        await store.define(view, who="test")
        rows = [row("anna@mail.example", -5, note="canary-note")]
        assert (await store.put("t", view, rows)).added == 1
        assert (await store.put("t", view, rows)).unchanged == 1
        for name in ("anna@mail.example", masters.pseudonym("t", "anna@mail.example")):
            assert (await store.read("t", "person", ["note"], name))[0].value == "canary-note"
        (joined,) = await store.join("t", "person", ["note"], [Point("anna@mail.example", NOW)])
        assert joined[0].value == "canary-note"
        await database.empty_log()
        files = files_of(tmp_path)
        assert b"canary-note" not in files
        assert b"anna@mail.example" not in path.read_bytes()
        # Whoever has the file without the keys, or after the key was destroyed, reads nothing.
        assert (await SqlFeatures(database, Clock(), pseudonym=masters.pseudonym).read(
            "t", "person", ["note"], "anna@mail.example"))[0].state == "missing"  # fmt: skip
        await ring.destroy("t", [masters.pseudonym("t", "anna@mail.example")])
        assert (await store.read("t", "person", ["note"], "anna@mail.example"))[0].state == "missing"


# --- what a release makes of them ---


class Shelf:
    """A store of the test's choice."""

    def __init__(self, values: dict[str, FeatureValue] | None = None, error: Exception | None = None) -> None:
        self.values = values or {}
        self.error = error
        self.asked: list[tuple[str, str, tuple[str, ...], str]] = []
        self.hangs = asyncio.Event()
        self.is_slow = False

    async def read(self, tenant: str, view: str, names: Sequence[str], entity: str) -> list[FeatureValue]:
        self.asked.append((tenant, view, tuple(names), entity))
        if self.error is not None:
            raise self.error
        if self.is_slow:
            await self.hangs.wait()
        return [self.values.get(f"{view}:{name}", FeatureValue(None, "missing")) for name in names]

    async def join(self, *_: Any) -> Any:
        raise NotImplementedError

    async def describe(self) -> list[FeatureView]:
        return [VIEW]


def use(**facts: Any) -> FeatureUse:
    return FeatureUse(**{"view": "customer", "entity": "customer", "names": NAMES, **facts})


PRO = {"customer:plan": FeatureValue("pro", "read", NOW, NOW + 5)}


async def test_what_is_read_and_what_stands_for_the_rest_goes_on_record():
    facts = await FeatureReader(Shelf(PRO)).read("t", [use(defaults={"seats": 1})], Asker({"customer": 17}))
    assert facts == [
        {
            "feature": "customer:plan",
            "entity": "17",
            "value": "pro",
            "state": "read",
            "event_at": "2023-11-14T22:13:20.000Z",
            "created_at": "2023-11-14T22:13:20.005Z",
        },
        {"feature": "customer:seats", "entity": "17", "value": 1, "state": "missing"},
    ]
    assert shown(facts) == [("customer:plan", "pro"), ("customer:seats", 1)]


@pytest.mark.parametrize(
    ("key", "asker", "entity"),
    [
        ("request", Asker({"customer": "c-1", "user": "anna"}), "c-1"),
        ("user", Asker({"customer": "c-1"}, user="anna"), "anna"),
        ("conversation", Asker(conversation="talk"), "talk"),
        ("header:x-customer-id", Asker(headers={b"x-customer-id": b" c-9 "}), "c-9"),
    ],
)
async def test_a_release_says_where_the_entity_is_from(key, asker, entity):
    shelf = Shelf(PRO)
    await FeatureReader(shelf).read("t", [use(key=key)], asker)
    assert shelf.asked == [("t", "customer", NAMES, entity)]
    assert await FeatureReader(shelf).read("t", [use(key=key, names=["plan"])], Asker()) == [
        {"feature": "customer:plan", "entity": None, "value": None, "state": "missing"}
    ]
    assert len(shelf.asked) == 1


@pytest.mark.parametrize("entity", ["\0", "\ud800", "c\0"])
async def test_a_key_that_no_database_takes_is_one_that_nobody_has(entity):
    shelf = Shelf(PRO)
    (plan, _) = await FeatureReader(shelf).read("t", [use()], Asker({"customer": entity}))
    assert (plan["state"], shelf.asked) == ("missing", [])


@pytest.mark.parametrize("error", [Unavailable("away"), None], ids=["away", "slow"])
async def test_a_store_that_is_away_or_slow_costs_a_request_no_more_than_its_time(error):
    shelf = Shelf(error=error)
    shelf.is_slow = error is None
    reader = FeatureReader(shelf, timeout_seconds=0.01)
    facts = await reader.read("t", [use(defaults={"plan": "unknown"})], Asker({"customer": "c"}))
    assert [(each["value"], each["state"]) for each in facts] == [("unknown", "unavailable"), (None, "unavailable")]
    with pytest.raises(FeaturesUnavailable) as refused:
        await reader.read("t", [use(required=True)], Asker({"customer": "c"}))
    assert (refused.value.status, refused.value.code, refused.value.retry_after_seconds) == (
        503,
        "features_unavailable",
        1.0,
    )


@pytest.mark.parametrize(
    ("shelf", "asker", "param", "message"),
    [
        (Shelf(PRO), Asker(), "features.entity.customer", "say which one the request is about"),
        (
            Shelf(PRO),
            Asker({"customer": "c"}),
            "features",
            "'customer:seats', which this release requires, is not known",
        ),
        (
            Shelf({name: FeatureValue(None, "expired", 1, 1) for name in ("customer:plan", "customer:seats")}),
            Asker({"customer": "c"}),
            "features",
            "is too old",
        ),
        (Shelf(error=NotFound("gone")), Asker({"customer": "c"}), "features", "is not known of this customer"),
    ],
)
async def test_what_is_required_and_not_known_refuses_the_request(shelf, asker, param, message):
    with pytest.raises(FeatureMissing) as refused:
        await FeatureReader(shelf).read("t", [use(required=True)], asker)
    assert (refused.value.status, refused.value.code, refused.value.param) == (422, "feature_missing", param)
    assert message in refused.value.message


def release(*uses: FeatureUse) -> Release:
    return Release("r", 1, "tgi", Prompt("p", "{sources}{features}{question}"), features=uses)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (use(view="driver"), "there is no view 'driver'; there are customer"),
        (use(entity="user"), "`features.entity` is 'user'; the view 'customer' is of 'customer'"),
        (use(names=["plan", "colour"]), "the view 'customer' has no 'colour'; it has plan, seats"),
        (
            use(defaults={"seats": "many"}),
            "`features.defaults.seats` is 'many'; 'customer:seats' is of the type 'integer'",
        ),
    ],
)
async def test_vetting_finds_features_that_there_are_not(wanted, problem):
    (told,) = await FeatureReader(Shelf()).problems(release(wanted))
    assert problem in told
    assert await FeatureReader(Shelf()).problems(release(use(defaults={"seats": 1}))) == []


def test_without_features_a_release_has_the_digest_it_had():
    plain = Release("hallmark", 1, "tgi", Prompt("p", "{sources}{question}"))
    assert b"features" not in plain.canonical
    assert b'"features":[{' in release(use()).canonical


@pytest.mark.parametrize(
    ("features", "template", "problem"),
    [
        ([{}], "{sources}{question}", r"has no \{features\}"),
        ([{"names": ["plan", "plan"]}], "{sources}{features}{question}", "is named twice"),
        ([{"defaults": {"colour": "red"}}], "{sources}{features}{question}", "none of the `names`"),
        ([{"required": True, "defaults": {"plan": "x"}}], "{sources}{features}{question}", "nothing stands for them"),
        ([{}, {}], "{sources}{features}{question}", "all features of a view in one place"),
        ([{"key": "header:X Y"}], "{sources}{features}{question}", "features"),
        ([{"colour": 1}], "{sources}{features}{question}", "colour"),
        ([{}], "{features}{question}", r"has no \{sources\}"),
    ],
)
def test_a_release_whose_features_do_not_fit_it_is_refused(features, template, problem):
    given = {"view": "customer", "entity": "customer", "names": ["plan"]}
    body = {
        "name": "r",
        "engine": "tgi",
        "prompt": {"version": "p", "template": template},
        "features": [{**given, **each} for each in features],
    }
    with pytest.raises((InvalidRequest, BadRelease), match=problem):
        read_release(json.dumps(body).encode(), is_toml=False, defaults={"retrieval": {}})
