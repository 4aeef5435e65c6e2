"""`GET /v1/quality` and `hallmark quality` against a live service: what was answered, labelled and rated."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from observability.estimates import proportion
from tests.fake_tgi import FakeTGI
from tests.service import Api, Service, live_service


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("quality"), engine_url=tgi.url, tenants=4) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


async def judged(api: Api, count: int = 4) -> list[str]:
    """Answers of which the first is wrong and disliked."""
    ids = []
    for number in range(count):
        ids.append((await api.answer(f"Question {number}?", user=f"user {number}"))["id"])
        said = {"prediction_id": ids[-1], "rating": number > 0}
        assert (await api.client.post("/v1/feedback", json=said)).status_code == 201
        stated = {"prediction_id": ids[-1], "class": "[b]right[/b]" if number else "wrong"}
        assert (await api.client.post("/v1/labels", json=stated)).status_code == 201
    return ids


async def run(service: Service, api: Api, *arguments: str, columns: str = "200") -> Result:
    given = ["quality", *arguments, "--url", service.url, "--key", api.key]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": columns}).invoke, app, given)


async def test_a_report_has_every_figure_with_its_interval(api):
    await judged(api)
    response = await api.client.get("/v1/quality", params={"release": "hallmark"})
    assert response.status_code == 200, response.text
    report = response.json()
    (release,) = report["data"]
    assert (release["release"], release["answers"], release["labelled"], release["sampled"]) == (
        "hallmark@1",
        4,
        4,
        False,
    )
    figures = {(each["figure"], each["class"]): each for each in release["figures"]}
    expected = proportion(3, 4)
    for name in (("thumbs_up", None), ("class_share", "[b]right[/b]")):
        found = figures[name]
        assert (found["value"], found["n"], found["unit"], found["method"]) == (0.75, 4, "share", "wilson")
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert figures["failed", None]["value"] == 0.0
    assert figures["total_seconds_median", None]["value"] > 0
    assert report["since"] < report["until"] <= report["computed_at"]


@pytest.mark.parametrize(
    ("query", "field"),
    [({"release": "no release!"}, "release"), ({"since": "yesterday"}, "since"), ({"days": "3"}, "days")],
)
async def test_a_window_that_cannot_be_is_refused_by_field(service, query, field):
    async with service.client() as client:
        response = await client.get("/v1/quality", params=query)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert "Value error" not in response.json()["error"]["message"]  # What pydantic says before our own words.


async def test_a_tenant_without_answers_gets_an_empty_report(api):
    response = await api.client.get("/v1/quality")
    assert (response.status_code, response.json()["data"]) == (200, [])


async def test_the_command_shows_a_table_for_each_release(service, api):
    await judged(api)
    shown = await run(service, api)
    assert shown.exit_code == 0, shown.output
    assert "hallmark@1: 4 answers" in shown.stdout
    (line,) = [line for line in shown.stdout.splitlines() if "[b]right[/b]" in line and "guessed" not in line]
    assert " ".join(line.split()) == "class_share [b]right[/b] 75.0 % 30.1 % to 95.4 % 4 4 wilson"
    assert "calibrated, in doubt: too_few_labels" in shown.stdout
    assert "4 labelled answers, chosen nobody knows how" in shown.stdout
    narrow = (await run(service, api, columns="80")).stdout.splitlines()
    (line,) = [line for line in narrow if "75.0 %" in line and "thumbs_up" in line]
    assert " ".join(line.split()) == "thumbs_up 75.0 % 30.1 % to 95.4 % 4 4 wilson"
    assert "…" not in "".join(narrow)
    report = json.loads((await run(service, api, "--json")).stdout)
    assert report["data"][0]["release"] == "hallmark@1"


async def test_the_command_says_when_there_is_nothing_and_why_it_failed(service, api):
    empty = await run(service, api, "--release", "other")
    assert (empty.exit_code, "no answers from" in empty.stdout) == (0, True)
    refused = await run(service, api, "--since", "yesterday")
    assert refused.exit_code == 1
    assert "since" in refused.stderr
