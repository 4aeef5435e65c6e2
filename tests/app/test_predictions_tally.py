"""What the log of predictions tells the metrics: written, refused for now, given up, found open after a crash."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from app.errors import RecordUnavailable
from app.predictions import Prediction, PredictionLog, uuid7
from tests.migrated import migrated
from tests.service import until


class Counted:
    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.seconds: list[float] = []

    def recorded(self, rows: int, seconds: float) -> None:
        self.rows["written"] += rows
        self.seconds.append(seconds)

    def unrecorded(self, result: str, rows: int = 1) -> None:
        self.rows[result] += rows


def prediction(**facts) -> Prediction:
    return Prediction(**{"id": uuid7(), "tenant": "acme", **facts})


async def test_each_closed_prediction_counts_as_written_once(tmp_path: Path):
    tally = Counted()
    async with PredictionLog(migrated(tmp_path / "log.db"), tally=tally) as log:
        for _ in range(3):
            one = prediction()
            log.open(one)
            await log.opened(one)
            one.outcome = "finished"
            await log.close(one)
    assert tally.rows == {"written": 3}
    assert len(tally.seconds) >= 3
    assert all(0 < seconds < 5 for seconds in tally.seconds)


async def test_rows_left_open_by_a_crash_count_as_interrupted(tmp_path: Path):
    path = migrated(tmp_path / "log.db")
    async with PredictionLog(path) as log:
        for _ in range(2):
            await log.close(prediction(outcome="finished"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE predictions SET outcome = 'open'")
        connection.commit()
    tally = Counted()
    async with PredictionLog(path, tally=tally):
        assert tally.rows == {"interrupted": 2}


async def test_a_refusing_disk_counts_each_row_once_until_it_is_given_up(tmp_path: Path):
    path = migrated(tmp_path / "log.db")
    tally = Counted()
    async with PredictionLog(path, commit_seconds=0.2, drain_seconds=0.3, tally=tally) as log:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("ALTER TABLE predictions RENAME TO elsewhere")

        with pytest.raises(RecordUnavailable):
            await log.close(prediction(outcome="finished"))

        async def retried() -> bool:
            return tally.rows["failed"] == 1 and not log.healthy

        await until(retried)
    assert tally.rows == {"failed": 1, "dropped": 1}
