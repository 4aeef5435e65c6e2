"""`hallmark releases` and `hallmark rollouts` against a live service."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from tests.fake_tgi import FakeTGI
from tests.service import Service, live_service

SECOND = 'name = "hallmark"\nnotes = "second [bold]"\n[retrieval]\ntop_k = 7\n'


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with FakeTGI() as tgi, live_service(tmp_path / "data", engine_url=tgi.url) as service:
        yield service


async def run(service: Service, *arguments: str | Path) -> Result:
    """Run a command beside the service, which lives on this thread's loop."""
    given = [str(argument) for argument in arguments]
    return await asyncio.to_thread(CliRunner().invoke, app, [*given, "--url", service.url, "--key", service.key])


def written(directory: Path, text: str, name: str = "release.toml") -> Path:
    (directory / name).write_text(text)
    return directory / name


async def test_a_release_is_created_from_a_file_shown_listed_compared_and_deleted(service, tmp_path):
    made = await run(service, "releases", "create", written(tmp_path, SECOND))
    assert made.exit_code == 0, made.output
    label, _, digest = made.stdout.split()
    assert label == "hallmark@2"
    as_json = written(
        tmp_path, json.dumps({"name": "hallmark", "notes": "second [bold]", "retrieval": {"top_k": 7}}), "r.json"
    )
    assert (await run(service, "releases", "create", as_json)).stdout == made.stdout

    shown = json.loads((await run(service, "releases", "show", "hallmark@2")).stdout)
    assert shown["digest"].startswith(digest)
    listed = (await run(service, "releases", "list")).stdout
    assert "hallmark@1" in listed
    assert "second" in listed
    assert "[bold]" in listed
    assert "hallmark@1" not in (await run(service, "releases", "list", "--name", "other")).stdout
    diff = (await run(service, "releases", "diff", "hallmark@1", "hallmark@2")).stdout
    assert "retrieval.top_k\n- 5\n+ 7\n" in diff
    assert (await run(service, "releases", "diff", "hallmark@1", "hallmark@1")).stdout == "They are the same.\n"
    assert (await run(service, "releases", "delete", "hallmark@2")).stdout == "hallmark@2 is deleted\n"
    refused = await run(service, "releases", "delete", "hallmark@1")
    assert refused.exit_code == 1
    assert "serves" in refused.stderr


async def test_a_release_that_cannot_serve_yet_says_why(service, tmp_path):
    made = await run(service, "releases", "create", written(tmp_path, SECOND.replace("notes", "adapter")))
    assert made.exit_code == 1
    assert made.stdout.startswith("hallmark@2 digest ")
    assert "cannot serve yet: `adapter`" in made.stderr


async def test_a_mistake_in_a_file_is_told(service, tmp_path):
    made = await run(service, "releases", "create", written(tmp_path, SECOND.replace("top_k", "topk")))
    assert (made.exit_code, made.stdout) == (1, "")
    assert "did you mean `retrieval.top_k`" in made.stderr


async def test_a_rollout_is_led_through_its_steps(service, tmp_path):
    await run(service, "releases", "create", written(tmp_path, SECOND))
    steps = (
        (
            ("canary", "hallmark", "10%", "--release", "hallmark@2"),
            "stable hallmark@1, canary hallmark@2 0.1 (revision 2)",
        ),
        (("canary", "hallmark", "0.5"), "stable hallmark@1, canary hallmark@2 0.5 (revision 3)"),
        (("shadow", "hallmark", "25%", "--release", "hallmark@1"), "0.5, shadow hallmark@1 0.25 (revision 4)"),
        (("pause", "hallmark"), "shadow hallmark@1 0.25, paused (revision 5)"),
        (("resume", "hallmark"), "0.25 (revision 6)"),
        (("shadow", "hallmark", "0"), "canary hallmark@2 0.5 (revision 7)"),
        (("promote", "hallmark", "--why", "good [x]"), "stable hallmark@2 (revision 8)"),
        (("rollback", "hallmark", "--revision", "8"), "stable hallmark@1 (revision 9)"),
    )
    for arguments, said in steps:
        done = await run(service, "rollouts", *arguments)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("hallmark: ")
        assert done.stdout.endswith(f"{said}\n")
    assert (await run(service, "rollouts", "show")).stdout == "hallmark: stable hallmark@1 (revision 9)\n"
    shown = (await run(service, "rollouts", "show", "hallmark")).stdout
    assert "good [x]" in shown
    assert shown.count("canary") == 2


async def test_what_does_not_fit_is_refused_with_the_reason(service):
    for arguments, code, said in (
        (("promote", "hallmark"), 1, "no canary"),
        (("rollback", "nothing"), 1, "no rollout"),
        (("canary", "hallmark", "110%", "--release", "hallmark@1"), 2, "no share"),
        (("canary", "hallmark", "few", "--release", "hallmark@1"), 2, "no share"),
        (("rollback", "hallmark", "--revision", "7"), 1, "look again"),
    ):
        done = await run(service, "rollouts", *arguments)
        assert done.exit_code == code
        assert said in " ".join(done.stderr.split())
