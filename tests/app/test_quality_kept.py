"""The report that is made apart, kept, and shown on `/metrics`."""

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import psutil
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser
from sqlalchemy import delete

from app.access import KeyStore
from app.database import Database, quality_reports, rollouts
from app.errors import InvalidRequest, ServiceError, Unavailable
from app.feedback import Stated
from app.predictions import Prediction, Where, uuid7
from app.predictions.history import first_id
from app.quality import Apart, Asked, Gauges, Keeper, Kept, ReleaseQuality, Report
from app.quality.answers import SHARES
from app.quality.apart import Order
from app.quality.figures import MAX_RELEASES, figure
from app.quality.gauges import samples_of
from app.quality.making import Maker
from app.repeating import Repeating
from app.rollouts import Rollout
from observability.estimates import mean, proportion
from observability.metrics import Metrics
from tests.benchmarks import quality as benchmark
from tests.fake_tgi import FakeTGI
from tests.review_world import Clock, World, emptied, person, prediction, replica
from tests.service import CHAT, until
from tests.service_process import service_process
from tests.worker_process import worker_process

NOW = datetime.now(UTC)


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    async with replica(await emptied(module_database_url)) as world:
        yield world


def made(at: datetime, **facts: Any) -> Prediction:
    return prediction(id=first_id(at)[:14] + uuid7()[14:], **facts)


# --- on /metrics ---


async def serving(world: World, *served: Rollout) -> None:
    await serving_in(world.database, *served)


async def serving_in(database: Database, *served: Rollout) -> None:
    async with database.writing() as connection:
        for table in (rollouts, quality_reports):
            await connection.execute(delete(table))
        for each in served:
            state = msgspec.json.encode(each).decode()
            await connection.execute(rollouts.insert().values(name=each.name, revision=1, state=state))


def keeper(world: World, **options: Any) -> Keeper:
    return Keeper(world.database, Maker(world.database).make, lambda: round(time.time() * 1000), **options)


PARSERS = {
    "text/plain": parser.text_string_to_metric_families,
    "application/openmetrics-text; version=1.0.0": openmetrics_parser.text_string_to_metric_families,
}


@pytest.mark.parametrize("accept", PARSERS)
async def test_metrics_show_the_shares_of_serving_releases_and_nothing_that_users_name(world, accept):
    await world.ship([prediction(release_name=f"hallmark@{n % 3 + 1}", user=f"u{n}") for n in range(30)])
    await world.ship([prediction(tenant="other", verdict="abstained:nothing_relevant")])
    await world.ship([made(NOW - timedelta(hours=25))])
    for id_ in await world.predict(2, answer="billing"):
        await world.labels.state(person("anna"), Stated(prediction_id=id_, class_name="billing"))
    for tenant in ("acme", "other"):
        await KeyStore(world.database).create(name="k", tenant=tenant, scopes=["chat"])
    await serving(
        world,
        Rollout(name="hallmark", revision=1, stable=1, canary=3),
        Rollout(name="idle", revision=1, stable=1),
    )
    metrics = Metrics(version="0", process=False)
    gauges = Gauges(Kept(world.database), show=metrics.judged)
    await gauges.refresh()
    assert metrics.registry.get_sample_value("hallmark_quality_timestamp_seconds") == 0.0
    await keeper(world).step()
    await gauges.refresh()
    families = {each.name: each for each in PARSERS[accept](metrics.render(accept)[0].decode())}
    shown = {
        (each.labels["release"], each.labels["figure"]): each.value
        for each in families["hallmark_quality_answers"].samples
    }
    assert {release for release, _ in shown} == {"hallmark@1", "hallmark@3"}
    for name in ("hallmark_quality", "hallmark_quality_low", "hallmark_quality_high", "hallmark_quality_answers"):
        assert all(set(each.labels) == {"release", "figure"} for each in families[name].samples)
        assert len(families[name].samples) <= 2 * (len(SHARES) + 20)
    assert shown["hallmark@1", "abstained"] == 13  # Ten, one of the other tenant, two that are labelled.
    assert shown["hallmark@1", "accuracy"] == 2
    assert ("hallmark@1", "class_share") not in shown
    values = {
        (each.labels["release"], each.labels["figure"]): each.value for each in families["hallmark_quality"].samples
    }
    assert values["hallmark@1", "abstained"] == pytest.approx(1 / 13)
    (at,) = families["hallmark_quality_timestamp_seconds"].samples
    assert abs(at.value - datetime.now(UTC).timestamp()) < 60


def report(at: datetime, releases: list[ReleaseQuality] | None = None) -> Report:
    return Report(since=at, until=at, computed_at=at, labels_are_cut=False, releases=releases or [])


async def test_the_report_is_computed_when_it_is_due_by_one_worker_and_again_a_minute_after_a_failure(world):
    await serving(world)
    clock, asked = Clock(), []

    async def make(what: Asked) -> Report:
        asked.append(what)
        if len(asked) == 1:
            raise Unavailable("The database is away.", retry_after_seconds=1.0)
        return report(NOW + timedelta(seconds=len(asked)))

    first, second = (Keeper(world.database, make, clock, every_seconds=300) for _ in range(2))
    with pytest.raises(Unavailable):
        await first.step()
    clock.pass_seconds(59)
    await first.step()
    assert len(asked) == 1
    clock.pass_seconds(1)
    await first.step()
    await second.step()
    assert len(asked) == 2
    clock.pass_seconds(299)
    await second.step()
    clock.pass_seconds(1)
    await second.step()
    await first.step()
    assert len(asked) == 3
    assert all(each.tenant is None and each.only == () for each in asked)


async def test_a_clock_that_was_far_ahead_does_not_stop_the_reports(world):
    await serving(world)
    await Kept(world.database).replace(report(NOW), due_at=Clock().now + 10**12)
    asked = []

    async def make(what: Asked) -> Report:
        asked.append(what)
        return report(NOW + timedelta(seconds=1))

    await Keeper(world.database, make, Clock()).step()
    assert len(asked) == 1


async def test_a_report_that_came_late_does_not_take_the_place_of_a_newer_one(world):
    await serving(world)
    kept = Kept(world.database)
    await kept.replace(report(NOW), due_at=1)
    await kept.replace(report(NOW - timedelta(seconds=1)), due_at=2)
    assert (await kept.report(), await kept.due_at()) == (report(NOW), 1)


async def test_what_is_shown_survives_an_outage_and_what_is_new_is_shown_after_it():
    kept = [report(NOW), Unavailable("The database is away.", retry_after_seconds=1.0), RuntimeError("a defect")]
    kept.append(report(NOW + timedelta(seconds=9)))
    shown, seen = [], asyncio.Event()

    class Flaky(Kept):
        async def computed_at(self):
            return len(kept)

        async def report(self):
            if len(kept) == 1:
                seen.set()
                return kept[0]
            if isinstance(found := kept.pop(0), Exception):
                raise found
            return found

    gauges = Gauges(Flaky(Database("sqlite://")), show=lambda _, at: shown.append(at))
    async with Repeating(gauges.refresh, failing="The report cannot be read", every_seconds=0.0):
        await asyncio.wait_for(seen.wait(), 20)
        await asyncio.sleep(0)
    assert shown[0] == NOW.timestamp()
    assert set(shown[1:]) <= {(NOW + timedelta(seconds=9)).timestamp()}


def test_guesses_that_are_in_doubt_and_classes_are_not_shown():
    figures = [
        figure("abstained", proportion(1, 9)),
        figure("accuracy_guessed", proportion(1, 9)),
        figure("exact_match_guessed", proportion(1, 9), doubts=["drifted"]),
        figure("class_share", proportion(1, 9), class_name="what a user said"),
        figure("prompt_tokens", mean([1.0, 2.0]), unit="tokens"),
    ]
    release = ReleaseQuality(release="a@1", answers=9, labelled=0, labels_left_out=0, sampled=False, figures=figures)
    assert [each.figure for each in samples_of(report(NOW, [release]))] == ["abstained", "accuracy_guessed"]


# --- in a process of its own ---


async def test_a_report_made_apart_is_the_same_as_one_made_here(world):
    for number in range(20):
        (id_,) = await world.predict(release_name=f"desk@{number % 2 + 1}", completion_tokens=number)
        await world.labels.state(person("anna"), Stated(prediction_id=id_, class_name=f"class {number % 3}"))
    here = await Maker(world.database).make(Asked(tenant="acme", where=Where(release="desk")))
    asked = Asked(tenant="acme", where=Where(release="desk", since=here.since, until=here.until))
    there = await Apart(world.database.secret_url).make(asked)
    assert there.releases == here.releases


async def test_what_speaks_against_a_report_comes_back_from_the_process(world):
    await world.ship([prediction(release_name=f"r@{n}") for n in range(MAX_RELEASES + 1)])
    with pytest.raises(InvalidRequest, match="release") as refusal:
        await Apart(world.database.secret_url).make(Asked(tenant="acme", where=Where()))
    assert refusal.value.param == "release"


async def test_a_database_that_is_away_a_report_that_takes_too_long_and_a_broken_process_are_errors(tmp_path):
    asked = Asked(tenant="acme", where=Where())
    with pytest.raises(Unavailable, match="database"):
        await Apart(f"sqlite:///{tmp_path}").make(asked)
    with pytest.raises(Unavailable, match="shorter window"):
        await Apart(f"sqlite:///{tmp_path / 'new.db'}", longest_seconds=0.0).make(asked)
    with pytest.raises(ServiceError, match="ValueError"):
        await Apart("mysql://nowhere").make(asked)


async def test_the_process_gives_way_to_all_others_and_ends_with_who_started_it():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.quality", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    # A database that does not answer for a while: nothing listens, and the port is taken.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        order = Order(url=url, asked=Asked(tenant="acme", where=Where()), rest=0.0, idle=True)
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        await process.stdin.drain()
        silent.settimeout(40)
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            assert psutil.Process(process.pid).nice() == 19
            process.stdin.close()
            assert await asyncio.wait_for(process.wait(), 20) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_memory_does_not_grow_with_the_predictions(tmp_path):
    peaks = {}
    for rows in (30_000, 75_000):  # Enough labels for guesses, which load scikit-learn.
        path = tmp_path / f"{rows}.db"
        await asyncio.to_thread(benchmark.fill, path, rows)
        async with Database.of_file(path) as database:
            await serving_in(database, Rollout(name="hallmark", revision=1, stable=1))
        found = await benchmark.job(f"sqlite:///{path}")
        assert found["answers"] == rows
        peaks[rows] = found["peak_mebibytes"]
    # A release's sums are full at 8,192 sessions and its samples at 10,000 answers: more rows add nothing after that.
    assert peaks[75_000] < peaks[30_000] + 40
    assert peaks[75_000] < 400


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_worker_computes_what_the_service_shows_and_the_service_loads_no_statistics(tmp_path):
    async with (
        FakeTGI() as tgi,
        service_process(tmp_path, tgi.url, {"open_metrics": True}) as process,
        process.client() as client,
    ):
        asked = {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}]}
        assert (await client.post(CHAT, json=asked)).status_code == 200
        shown = 'hallmark_quality_answers{figure="failed",release="hallmark@1"} 1.0'

        async def look() -> bool:
            return shown in (await client.get("/metrics")).text

        async with worker_process(tmp_path):
            await until(look, seconds=120)
        assert (await client.get("/v1/quality")).json()["data"][0]["answers"] == 1
        loaded = [each.path for each in psutil.Process(process.pid).memory_maps() if "/sklearn/" in each.path]
        assert loaded == []
