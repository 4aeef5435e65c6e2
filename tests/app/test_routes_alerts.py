"""Alerts over HTTP and by the command line: rules set with the release, what fires, silences, a test of the webhook."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from app.alerts import DEFAULT_RULES, Evaluator, Notifier
from app.cli import app
from app.database import Database
from app.quality.making import Maker
from app.worker import now
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import CHAT, Service, live_service, until

RULE: dict[str, Any] = {"name": "cut", "kind": "threshold", "figure": "truncated", "above": 0.2, "min_n": 5}
TOML = """
name = "hallmark"
notes = "with rules"

[[alerts]]
name = "cut"
kind = "threshold"
figure = "truncated"
above = 0.2
min_n = 5
severity = "page"

[[alerts]]
name = "errors"
kind = "burn_rate"
share = "failed"
objective = 0.995
"""


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with (
        FakeTGI(default=Tokens("Hello", " wor", finish="length")) as tgi,
        live_service(tmp_path_factory.mktemp("alerts"), engine_url=tgi.url, tenants=6) as service,
    ):
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.client() as client:
        yield client
        await client.delete("/v1/alert-rules/hallmark")


async def run(service: Service, *arguments: str, key: str | None = None) -> Result:
    given = ["alerts", *arguments, "--url", service.url, "--key", key or service.key]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": "250"}).invoke, app, given)


async def look(service: Service, *, tells: bool = False) -> None:
    """What a worker does."""
    assert isinstance(service.database, Path)
    async with Database.of_file(service.database) as database:
        evaluator = Evaluator(database, Maker(database).make, now, tells=tells)
        while await evaluator.step():
            pass


async def ask(client: httpx.AsyncClient, count: int = 10) -> None:
    for _ in range(count):
        body = {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}]}
        assert (await client.post(CHAT, json=body)).status_code == 200


def problem(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["param"]


# --- rules ---


async def test_a_release_brings_its_rules_along_and_they_are_no_part_of_its_digest(client):
    toml = {"content-type": "application/toml"}
    plain = TOML.split("[[alerts]]", maxsplit=1)[0]
    made = (await client.post("/v1/releases", content=plain, headers=toml)).json()
    assert (await client.get(f"/v1/alert-rules/{made['id']}")).json()["holds_from"] is None
    with_rules = await client.post("/v1/releases", content=TOML, headers=toml)
    assert (with_rules.status_code, with_rules.json()["digest"]) == (200, made["digest"])
    assert "alerts" not in with_rules.json()["content"]
    found = (await client.get(f"/v1/alert-rules/{made['id']}")).json()
    assert found["holds_from"] == made["id"]
    assert [(each["name"], each["severity"]) for each in found["rules"]] == [("cut", "page"), ("errors", "ticket")]
    # The same again is no new revision; a JSON description may bring them too.
    as_json = {"name": "hallmark", "notes": "with rules", "alerts": found["rules"]}
    again = await client.post("/v1/releases", json=as_json)
    assert again.status_code == 200, again.text
    (revision,) = (await client.get(f"/v1/alert-rules/{made['id']}/revisions")).json()["data"]
    assert (revision["revision"], revision["why"]) == (1, "set with the release")
    assert revision["who"].startswith("test (key ")


async def test_a_release_with_wrong_rules_is_not_made_and_one_with_rules_needs_their_scope(client, service):
    before = (await client.get("/v1/releases")).json()["data"]
    wrong = {"name": "hallmark", "notes": "wrong", "alerts": [{**RULE, "above": None}]}
    assert problem(await client.post("/v1/releases", json=wrong)) == (400, "alerts[0].above")
    key = await service.new_key(scopes=("releases:write",))
    async with service.client(key) as other:
        given = {"name": "hallmark", "notes": "wrong", "alerts": [RULE]}
        assert (await other.post("/v1/releases", json=given)).status_code == 403
    assert (await client.get("/v1/releases")).json()["data"] == before


async def test_rules_of_a_name_are_set_shown_and_taken_away(client):
    usual = (await client.get("/v1/alert-rules/mine")).json()
    assert (usual["holds_from"], len(usual["rules"])) == (None, len(DEFAULT_RULES))
    made = await client.put("/v1/alert-rules/mine", json={"rules": [RULE], "why": "stricter", "revision": 0})
    assert made.status_code == 200, made.text
    assert (made.json()["revision"], made.json()["why"]) == (1, "stricter")
    stale = await client.put("/v1/alert-rules/mine", json={"rules": [], "revision": 0})
    assert problem(stale) == (409, "revision")
    assert "mine" in {each["target"] for each in (await client.get("/v1/alert-rules")).json()["data"]}
    shown = (await client.get("/v1/alert-rules/mine")).json()["rules"]
    # What is shown can be set again as it is.
    assert (await client.put("/v1/alert-rules/mine", json={"rules": shown})).json()["revision"] == 1
    back = await client.delete("/v1/alert-rules/mine")
    assert (back.json()["holds_from"], len(back.json()["rules"])) == (None, len(DEFAULT_RULES))


@pytest.mark.parametrize(
    ("rule", "param"),
    [
        ({**RULE, "figure": None}, "rules[0].figure"),
        ({**RULE, "kind": "vibes"}, "rules.0.kind"),
        ({**RULE, "abov": 1}, "rules.0.abov"),
        ({**RULE, "min_n": 0}, "rules.0.min_n"),
        ({**RULE, "windows": []}, "rules.0.windows"),
    ],
)
async def test_a_wrong_rule_is_refused_with_its_field(client, rule, param):
    response = await client.put("/v1/alert-rules/hallmark", json={"rules": [rule]})
    assert response.status_code == 400
    assert response.json()["error"]["param"].replace(".0.", "[0].") == param.replace(".0.", "[0].")


async def test_rules_for_a_release_that_there_is_none_of_are_refused(client):
    assert problem(await client.put("/v1/alert-rules/hallmark@99", json={"rules": []})) == (404, "target")
    assert (await client.put("/v1/alert-rules/Not a name", json={"rules": []})).status_code == 400


# --- alerts ---


async def test_what_fires_is_listed_shown_and_acknowledged(client, service):
    await client.put("/v1/alert-rules/hallmark", json={"rules": [RULE]})
    async with service.tenant() as api:
        await ask(api.client)
        await look(service)
        (alert,) = (await api.client.get("/v1/alerts")).json()["data"]
        assert (alert["rule"], alert["release"], alert["state"]) == ("cut", "hallmark@1", "firing")
        assert (alert["facts"]["n"], alert["facts"]["value"], alert["is_deployments"]) == (10, 1.0, False)
        # It is its tenant's, and nobody else's.
        assert (await client.get("/v1/alerts")).json()["data"] == []
        assert (await client.get(f"/v1/alerts/{alert['id']}")).status_code == 404
        assert (await client.post(f"/v1/alerts/{alert['id']}/acknowledge", json={})).status_code == 404
        assert (await api.client.get("/v1/alerts", params={"state": "resolved"})).json()["data"] == []
        assert (await api.client.get("/v1/alerts", params={"release": "hallmark@2"})).json()["data"] == []
        listed = await run(service, "list", key=api.key)
        assert alert["id"] in listed.stdout
        assert "truncated is 1" in listed.stdout
        done = await run(service, "acknowledge", alert["id"], "--why", "looking", key=api.key)
        assert "is acknowledged by test" in done.stdout
        shown = json.loads((await run(service, "show", alert["id"], key=api.key)).stdout)
        assert [each["action"] for each in shown["events"]] == ["firing", "acknowledged"]
        # A rule that is gone ends its alert.
        await client.put("/v1/alert-rules/hallmark", json={"rules": []})
        await look(service)
        (ended,) = (await api.client.get("/v1/alerts", params={"state": "any"})).json()["data"]
        assert ended["resolved_at"] is not None
        assert (await api.client.post(f"/v1/alerts/{alert['id']}/acknowledge", json={})).status_code == 409


async def test_silences_are_made_listed_and_ended(client, service):
    async with service.tenant() as api:
        made = await run(service, "silence", "cut", "2", "--why", "known", key=api.key)
        assert made.exit_code == 0, made.output
        (silence,) = (await api.client.get("/v1/alert-silences")).json()["data"]
        assert (silence["rule"], silence["release"], silence["why"]) == ("cut", "*", "known")
        assert (await client.get("/v1/alert-silences")).json()["data"] == []
        assert (await client.delete(f"/v1/alert-silences/{silence['id']}")).status_code == 404
        assert (await api.client.delete(f"/v1/alert-silences/{silence['id']}")).json()["ended"] is True
        assert (await api.client.get("/v1/alert-silences")).json()["data"] == []
        wrong = await api.client.post("/v1/alert-silences", json={"rule": "cut", "seconds": 10**9})
        assert problem(wrong) == (400, "seconds")


class Receiver:
    async def send(self, message_id: str, body: bytes) -> None:
        self.got = json.loads(body)


async def test_a_test_of_the_webhook_says_whether_it_was_taken(client, service):
    receiver = Receiver()
    testing = asyncio.create_task(run(service, "test"))
    async with Database.of_file(service.database) as database:
        await until(Notifier(database, receiver, now).step)
    done = await testing
    assert (done.exit_code, "was taken" in done.stdout) == (0, True), done.output
    assert receiver.got["type"] == "alert.test"
    (kept,) = (await client.get("/v1/alert-notifications", params={"state": "delivered"})).json()["data"]
    assert (kept["attempts"], kept["body"], kept["problem"]) == (1, receiver.got, None)
    async with service.tenant() as api:
        assert (await api.client.get("/v1/alert-notifications")).json()["data"] == []


# --- the command line ---


async def test_rules_are_shown_and_set_by_a_file(client, service, tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(TOML[TOML.index("[[alerts]]") :])
    done = await run(service, "rules", "hallmark", "--set", str(file), "--why", "ours")
    assert done.exit_code == 0, done.output
    assert "hallmark has the rules of hallmark:" in done.stdout
    assert "truncated of 3600 s is above 0.2, its whole interval, n >= 5" in done.stdout
    assert "failed burns 0.005 faster than 14.4 in 3600 s, 6 in 21600 s" in done.stdout
    reset = await run(service, "rules", "hallmark", "--reset")
    assert "no answers in 86400 s" in reset.stdout
    file.write_text("[[alerts]")
    assert (await run(service, "rules", "hallmark", "--set", str(file))).exit_code == 2
    printed = CliRunner().invoke(app, ["alerts", "prometheus", str(file)])
    assert printed.exit_code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TOML.replace("[[alerts]]", "[[rules]]"), "'rules' is unknown"),
        (TOML.replace("[[alerts]]", "[[rules]]", 1), "'rules' is unknown"),
        (TOML.split("[[alerts]]", maxsplit=1)[0], "`alerts = []` is no rules"),
        ("alerts = [1]", "`alerts = []` is no rules"),
        ("[alerts]", "`alerts = []` is no rules"),
        ("", "`alerts = []` is no rules"),
    ],
)
async def test_a_file_whose_rules_are_called_otherwise_changes_none(service, tmp_path, text, said):
    file = tmp_path / "rules.toml"
    file.write_text(text)
    before = (await run(service, "rules", "hallmark")).stdout
    refused = await run(service, "rules", "hallmark", "--set", str(file))
    assert refused.exit_code == 2
    assert f"{file}: " in refused.stderr
    assert said in refused.stderr
    assert "[[alerts]]" in refused.stderr
    assert (await run(service, "rules", "hallmark")).stdout == before
    assert CliRunner().invoke(app, ["alerts", "prometheus", str(file)]).exit_code == 2


async def test_no_rules_are_set_where_a_file_says_so_and_those_of_a_release_by_its_file(client, service, tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(TOML)
    assert "failed burns" in (await run(service, "rules", "hallmark", "--set", str(file))).stdout
    file.write_text("alerts = []")
    assert (await run(service, "rules", "hallmark", "--set", str(file))).exit_code == 0
    assert (await client.get("/v1/alert-rules/hallmark")).json()["rules"] == []


def test_a_secret_is_made_and_a_worker_with_a_bad_one_does_not_start(tmp_path, monkeypatch):
    made = CliRunner().invoke(app, ["alerts", "secret"]).stdout.strip()
    assert made.startswith("whsec_")
    monkeypatch.setenv("HALLMARK_ALERTS_WEBHOOK_URL", "https://hooks.example.com/")
    for name, value in (("SECRET", "short"), ("ALLOW", '["http://inner"]')):
        with monkeypatch.context() as context:
            context.setenv("HALLMARK_ALERTS_WEBHOOK_SECRET", made)
            context.setenv(f"HALLMARK_ALERTS_WEBHOOK_{name}", value)
            done = CliRunner().invoke(app, ["worker", "--data-dir", str(tmp_path)])
        assert done.exit_code == 2
        assert f"alerts.webhook_{name.lower()}" in done.stderr
