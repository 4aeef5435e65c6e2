"""The table of docs/reliability.md, executed: what a client sees of each dependency that fails in each way."""

import asyncio
import itertools
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from tests.faults import Fault
from tests.reliability.faulty_world import DEPENDENCIES, Gate, Seen, World, faulty_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"

HOLD_SECONDS = 2.0
"""How long a fault lasts at least: whatever is done in the background meets it too."""

INSTEAD = {"stream under way": "streamed chat", "chat beyond the key's limit": "chat", "upload": "upload and wait"}
"""What is asked to see whether all is well, where the request itself would not tell."""


@dataclass(frozen=True)
class Row:
    """What the table promises of one request."""

    dependency: str
    asked: str
    status: int
    code: str | None
    has_retry_after: bool
    outcome: str | None
    passages: str | None
    told_within: float
    well_within: float

    @property
    def request(self) -> str:
        return self.asked.removesuffix(", later")

    @property
    def is_later(self) -> bool:
        return self.asked != self.request


def read_table() -> dict[tuple[str, Fault], list[Row]]:
    """The rows by dependency and fault."""
    found = defaultdict(list)
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 9 or cells[1] in ("fault", "---"):
            continue
        dependency, faults, requests, status, code, retry_after, record, told, well = cells
        outcome, passages, *_ = [*re.findall(r"`(\w+)`", record), None, None]
        for fault, asked in itertools.product(faults.split(", "), re.split(r", (?!later)", requests)):
            row = Row(
                dependency=dependency,
                asked=asked,
                status=int(status[:3]),
                code=code.strip("`") or None,
                has_retry_after=retry_after == "yes",
                outcome=outcome,
                passages=passages,
                told_within=float(told),
                well_within=float(well),
            )
            found[dependency, fault].append(row)
    return dict(found)


TABLE = read_table()


@pytest.fixture(scope="module")
async def world(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with faulty_world(tmp_path_factory.mktemp("faults")) as world:
        yield world


def test_every_dependency_is_in_the_table_with_every_fault() -> None:
    assert TABLE.keys() == set(itertools.product(DEPENDENCIES, get_args(Fault)))


@pytest.mark.parametrize(("dependency", "fault"), TABLE, ids=lambda value: value.replace(" ", "_"))
async def test_a_client_sees_what_the_table_says(world: World, dependency: str, fault: Fault, capsys) -> None:
    rows = TABLE[dependency, fault]
    await asyncio.gather(*(well_again(world, row, at_most=30.0) for row in rows))
    seen = await seen_during(world, rows, fault)
    well = await asyncio.gather(*(well_again(world, row, at_most=60.0) for row in rows))
    with capsys.disabled():
        told = [f"{row.asked} {seen[row][1]:.1f}/{seconds:.1f}" for row, seconds in zip(rows, well, strict=True)]
        print(f"\n{dependency}, {fault}, seconds until told/well: {', '.join(told)}", end=" ")
    for row, well_seconds in zip(rows, well, strict=True):
        got, told_seconds = seen[row]
        assert (got.status, got.code, got.has_retry_after) == (row.status, row.code, row.has_retry_after), row
        assert told_seconds <= 2 * row.told_within + 2, row
        assert well_seconds <= 2 * row.well_within + 2, row
        if row.outcome is not None:
            assert got.prediction_id is not None
            record = await world.record_of(got.prediction_id)
            assert (record["outcome"], record["error_code"]) == (row.outcome, row.code), row
            assert row.passages in (None, record["retrieval_outcome"]), row


async def seen_during(world: World, rows: list[Row], fault: Fault) -> dict[Row, tuple[Seen, float]]:
    """What clients see while the rows' dependency fails, and the seconds it took."""
    proxy = world.proxies[rows[0].dependency]
    over_at = time.perf_counter() + HOLD_SECONDS
    try:
        seen = await ask_all(world, [row for row in rows if not row.is_later], lambda: proxy.become(fault))
        if later := [row for row in rows if row.is_later]:
            await world.notice(rows[0].dependency)
            seen |= await ask_all(world, later)
        await asyncio.sleep(max(0.0, over_at - time.perf_counter()))
    finally:
        await proxy.become(None)
    return seen


async def ask_all(
    world: World, rows: list[Row], begin: Callable[[], Awaitable[None]] | None = None
) -> dict[Row, tuple[Seen, float]]:
    """Make the requests of these rows beside each other, once `begin` has begun the fault."""
    gate = Gate()

    async def ask(row: Row) -> tuple[Seen, float]:
        seen = await world.ask(row.dependency, row.request, gate)
        return seen, time.perf_counter() - began

    asking = [asyncio.create_task(ask(row)) for row in rows]
    await gate.waited_at_by(len(rows))
    if begin is not None:
        await begin()
    began = time.perf_counter()
    await gate.open()
    return dict(zip(rows, await asyncio.gather(*asking), strict=True))


async def well_again(world: World, row: Row, *, at_most: float) -> float:
    """How long it takes until the request succeeds with all that it should be given."""
    began = time.perf_counter()
    before = await world.used(row.dependency)
    async with asyncio.timeout(at_most):
        while not await is_well(world, row, before):
            await asyncio.sleep(0.1)
    return time.perf_counter() - began


async def is_well(world: World, row: Row, before: int | None) -> bool:
    gate = Gate()
    await gate.open()
    seen = await world.ask(row.dependency, INSTEAD.get(row.request, row.request), gate)
    if seen.status not in (200, 201) or seen.code is not None:
        return False
    if row.passages is not None:
        assert seen.prediction_id is not None
        return bool((await world.record_of(seen.prediction_id))["retrieval_outcome"] == "used")
    used = await world.used(row.dependency)
    if row.dependency == "one engine of two":
        return used == 1
    return used is None or before is None or used > before
