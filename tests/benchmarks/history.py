"""What it costs to find predictions: a page, an export's page and a count, by each filter, on SQLite and PostgreSQL.

Run it as `python -m tests.benchmarks.history [--predictions N] [--kind sqlite|postgresql]`. The predictions are of one
tenant, some 3 KB each. A filter is asked where it finds a few, many or all of them, and for nothing at all: then a page
is looked for through everything there is. The median of five calls is printed in milliseconds, at the log's newest end
and in the middle of it, and as the last line JSON.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from app.database import Database, feedback, labels, predictions
from app.predictions import History, Prediction, Where, uuid7
from app.predictions.history import ANY
from app.predictions.rows import to_row
from app.predictions.shipper import shippable
from tests.postgres import Postgres

TENANT = "acme"
TEXT = "How long is a record kept after it was closed? " * 20
SHARES = (0.0, 0.001, 0.1, 1.0)
FILTERS = {
    "none": ANY,
    "user of 1 in 1,000": Where(user="user 7"),
    "user who is nobody": Where(user="nobody"),
    "conversation": Where(conversation="chat 77"),
    "failed, 1 in 100": Where(outcome="failed"),
    "release": Where(release="hallmark@2"),
    "abstained": Where(verdict="abstained"),
}

Row = dict[str, Any]


def make(chance: random.Random) -> Prediction:
    """Make a prediction with passages, as large as a typical one."""
    passages = [
        {"id": uuid7(), "document_id": f"d{chance.randrange(500)}", "document_version": "v1", "n": n, "score": 0.5}
        for n in range(5)
    ]
    return Prediction(
        id=uuid7(),
        tenant=TENANT,
        outcome="failed" if chance.random() < 0.01 else "finished",
        user=f"user {chance.randrange(1_000)}",
        conversation=f"chat {chance.randrange(20_000)}",
        release_name=f"hallmark@{chance.choice((1, 2))}",
        release_digest="d" * 64,
        verdict=chance.choice(("answered", "abstained:nothing_relevant")),
        passages=passages,
        request=json.dumps({"messages": [{"role": "user", "content": TEXT}]}).encode(),
        question=TEXT,
        answer=TEXT,
    )


async def fill(database: Database, count: int) -> list[str]:
    """Put predictions into the database; give their ids."""
    chance = random.Random(1)
    ids = []
    for at in range(0, count, 1_000):
        made = [make(chance) for _ in range(min(1_000, count - at))]
        ids += [each.id for each in made]
        rows = [shippable([bytes(key), *rest]) for key, *rest in map(to_row, made)]
        async with database.writing() as connection:
            await connection.execute(predictions.insert(), rows)
    return ids


def revisions(chance: random.Random, about: str, said: Row) -> list[Row]:
    """What one author said of a prediction: most once, some twice, and of these some took it back."""
    author = {"id": uuid7(), "slot": chance.randbytes(16), "tenant": TENANT, "prediction_id": about, "author": "ann"}
    told = {"key_id": "k", "at": 1, "said_at": 1, "stamps": "{}", **said}
    return [
        {**author, **told, "revision": n, "digest": chance.randbytes(16), "withdrawn": n == 2 and chance.random() < 0.3}
        for n in range(1, chance.choice((1, 1, 1, 2)) + 1)
    ]


async def say(database: Database, ids: list[str], share: float) -> None:
    """Have so large a share of the predictions labelled and disliked, and nothing else said."""
    chance = random.Random(2)
    about = [each for each in ids if chance.random() < share]
    stated = [row for each in about for row in revisions(chance, each, {"source": "reviewer", "class": "refund"})]
    disliked = {"source": "end_user", "rating": 0.0, "rating_type": "boolean"}
    given = [row for each in about for row in revisions(chance, each, disliked)]
    for table, rows in ((labels, stated), (feedback, given)):
        async with database.writing() as connection:
            await connection.execute(table.delete())
        for at in range(0, len(rows), 5_000):
            async with database.writing() as connection:
                await connection.execute(table.insert(), rows[at : at + 5_000])
    if database.kind == "postgresql":
        async with database.writing() as connection:
            await connection.exec_driver_sql("ANALYZE")  # Its autovacuum does it within a minute.


async def milliseconds(call: Callable[[], Awaitable[Any]]) -> float:
    """The median of five calls."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


async def measure(history: History, where: Where, middle: str) -> dict[str, float]:
    """What a filter costs."""

    async def export_page() -> None:
        async for _ in history.pages(TENANT, where):
            return

    return {
        "found": await history.count(TENANT, where),
        "page": await milliseconds(lambda: history.find(TENANT, where)),
        "page in the middle": await milliseconds(lambda: history.find(TENANT, where, before=middle)),
        "page of an export": await milliseconds(export_page),
        "count": await milliseconds(lambda: history.count(TENANT, where)),
    }


async def run(database: Database, count: int) -> dict[str, dict[str, float]]:
    """Measure every filter, and print it."""
    await database.prepare()
    ids = await fill(database, count)
    history, found = History(database), {}

    async def report(name: str, where: Where) -> None:
        found[name] = told = await measure(history, where, ids[len(ids) // 2])
        line = "  ".join(f"{what} {value:.1f}" for what, value in list(told.items())[1:])
        print(f"{database.kind:10}  {name:34} {told['found']:>7.0f} found, ms: {line}", flush=True)

    await say(database, ids, 0.0)
    for name, where in FILTERS.items():
        await report(name, where)
    for share in SHARES:
        await say(database, ids, share)
        for state in ("labelled", "unlabelled"):
            await report(f"{state}, {share:.1%} of all", Where(label_state=state))
        await report(f"negative, {share:.1%} of all", Where(feedback_state="negative"))
    return found


@asynccontextmanager
async def opened(kind: str) -> AsyncIterator[Database]:
    """An empty database of that kind."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            async with Database.of_file(Path(folder) / "hallmark.db", timeout_seconds=120) as database:
                yield database
    else:
        with Postgres() as server:
            async with Database(server.create_database(), timeout_seconds=120) as database:
                yield database


async def main(arguments: argparse.Namespace) -> None:
    """Measure, and print the figures as JSON last."""
    print(f"Python {platform.python_version()} on {platform.machine()}, {arguments.predictions} predictions")
    told: dict[str, Any] = {}
    for kind in arguments.kind or ("sqlite", "postgresql"):
        async with opened(kind) as database:
            told[kind] = await run(database, arguments.predictions)
    print(json.dumps({"predictions": arguments.predictions, "milliseconds": told}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=100_000)
    parser.add_argument("--kind", action="append", choices=("sqlite", "postgresql"))
    asyncio.run(main(parser.parse_args(sys.argv[1:])))
