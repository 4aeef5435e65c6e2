"""Faults of models and data, made on a running service with a worker: each raises its alert, and the webhook is told.

Whatever goes wrong here, every request is answered: these are the faults that no status shows.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.access import create_key
from app.vetting import folder_digest
from tests.app.test_webhook import SECRET, verified
from tests.app.test_webhook import Receiver as Server
from tests.app.test_webhook import listening as server_of
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import CHAT, EVERYTHING, until
from tests.service_process import ServiceProcess, service_process
from tests.worker_process import worker_process

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

WINDOW = {"window_seconds": 60, "min_n": 20, "keep_seconds": 0}
RULES = [
    {"name": "refusals", "kind": "threshold", "figure": "refused", "above": 0.2, "severity": "page", **WINDOW},
    {"name": "abstentions", "kind": "threshold", "figure": "abstained", "above": 0.5, **WINDOW},
    {
        "name": "unsupported",
        "kind": "burn_rate",
        "share": "unsupported",
        "objective": 0.9,
        "min_n": 20,
        "keep_seconds": 0,
        "windows": [{"long_seconds": 60, "short_seconds": 10, "factor": 3}],
    },
    {"name": "drift", "kind": "drift", "keep_seconds": 0},
]
QUESTION = "How tall is the tower?"
TOWER = "The tower is 330 metres tall. It stands in Paris."
BANANAS = "Bananas ripen quickly beside apples. Keep both in a cool cellar."
DECLINE = "I'm sorry, but I can't help with that."
BACK_WITHIN_SECONDS = 5.0
PACE_SECONDS = 1 / 30


@dataclass
class Model:
    """What stands for the model: it says what it reads of the tower, unless something is wrong with it."""

    refuses: bool = False
    reads_characters: int = 1_000_000
    """Of the end of the prompt."""
    adapter_is_corrupt: bool = False

    def __call__(self, body: dict[str, Any]) -> Tokens:
        if body.get("model") == "new" and self.adapter_is_corrupt:
            return Tokens(*(["!"] * 64), finish="length")
        if self.refuses:
            return Tokens(DECLINE)
        prompt = json.dumps([message["content"] for message in body["messages"]])[-self.reads_characters :]
        if "330 metres" in prompt:
            return Tokens("The tower is 330 metres", " tall.")
        return Tokens("The tower was painted green by", " Dutch engineers in 1702.")


@dataclass
class Deployment:
    """The service, its worker, the webhook's receiver, and what can go wrong."""

    process: ServiceProcess
    data_dir: Path
    model: Model
    hook: Server
    adapter: Path
    tenants: int = 0
    names: list[str] = field(default_factory=list)

    def told(self, **wanted: Any) -> dict[str, Any] | None:
        """What the webhook was told of such an alert, each message checked as its receiver should."""
        for headers, body in self.hook.got:
            assert verified(SECRET, headers, body, time.time())
            message = json.loads(body)
            known = {**message["data"], "type": message["type"]}
            if all(known.get(name) == value for name, value in wanted.items()):
                return known
        return None

    async def is_told(self, seconds: float = 60, **wanted: Any) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            return self.told(**wanted)

        return dict(await until(look, seconds=seconds))

    @asynccontextmanager
    async def tenant(self) -> AsyncIterator["Tenant"]:
        """A tenant of its own, whose figures nobody else's answers touch."""
        self.tenants += 1
        name = f"tenant-{self.tenants}"
        made = await asyncio.to_thread(
            create_key, self.data_dir / "hallmark.db", name=name, tenant=name, scopes=EVERYTHING
        )
        limits = httpx.Limits(keepalive_expiry=2.0)  # Before the service closes them, which a request could cross.
        headers = {"authorization": f"Bearer {made[1]}"}
        async with httpx.AsyncClient(base_url=self.process.url, headers=headers, timeout=60, limits=limits) as client:

            async def is_known() -> bool:
                return (await client.get("/v1/models")).status_code == 200

            await until(is_known, seconds=20)
            yield Tenant(name, client)


@dataclass
class Tenant:
    """Somebody who asks, and who answered: when it was asked, by which release, with which status."""

    name: str
    client: httpx.AsyncClient
    answers: list[tuple[float, str, int]] = field(default_factory=list)

    async def add(self, text: str) -> str:
        response = await self.client.post("/v1/documents?wait=20", json={"name": "facts.txt", "text": text})
        assert response.status_code in (200, 201), response.text
        return str(response.json()["document"]["id"])

    async def ask(self, number: int, question: str = QUESTION, model: str = "hallmark") -> None:
        body = {"model": model, "messages": [{"role": "user", "content": question}]}
        asked_at = time.time()
        response = await self.client.post(CHAT, json=body, headers={"x-conversation-id": f"{self.name} {number}"})
        self.answers.append((asked_at, response.headers.get("x-release", ""), response.status_code))

    @asynccontextmanager
    async def asking(self, **how: Any) -> AsyncIterator[None]:
        """Ask at a steady pace, each time in another conversation; nothing may fail."""
        tasks: list[asyncio.Task[None]] = []
        first = len(self.answers)

        async def pace() -> None:
            while True:
                tasks.append(asyncio.create_task(self.ask(first + len(tasks), **how)))
                await asyncio.sleep(PACE_SECONDS)

        pacing = asyncio.create_task(pace())
        try:
            yield
        finally:
            pacing.cancel()
            await asyncio.gather(pacing, return_exceptions=True)
            await asyncio.gather(*tasks)
        assert {status for *_, status in self.answers} == {200}

    async def has_asked(self, count: int) -> None:
        wanted = len(self.answers) + count

        async def enough() -> bool:
            return len(self.answers) >= wanted

        await until(enough, seconds=60)

    async def alerts(self, state: str = "active") -> list[dict[str, Any]]:
        return list((await self.client.get("/v1/alerts", params={"state": state})).json()["data"])


@pytest.fixture(scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    folder = tmp_path_factory.mktemp("faults")
    data_dir, adapter, model = folder / "data", folder / "adapters" / "new", Model()
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    engine = {"adapters": ["new"], "adapter_folder": str(adapter.parent)}
    async with FakeTGI(default=model, adapters=("new",)) as tgi, server_of(Server()) as hook:
        variables = {
            "HALLMARK_ALERTS_WEBHOOK_URL": f"http://127.0.0.1:{hook.port}/alerts",
            "HALLMARK_ALERTS_WEBHOOK_SECRET": SECRET,
            "HALLMARK_ALERTS_WEBHOOK_ALLOW": '["127.0.0.1"]',
            "HALLMARK_ALERTS_EVERY_SECONDS": "0.5",
            "HALLMARK_ENGINE_ADAPTER_FOLDER": str(adapter.parent),
            **WORKER_DRIFT,
        }
        async with (
            service_process(data_dir, tgi.url, {"engine": engine}) as process,
            worker_process(data_dir, settings=variables),
            process.client() as client,
        ):
            rules = await client.put("/v1/alert-rules/hallmark", json={"rules": RULES, "why": "before it serves"})
            assert rules.status_code == 200, rules.text
            yield Deployment(process, data_dir, model, hook, adapter)


WORKER_DRIFT = {"HALLMARK_DRIFT_REFERENCE_SESSIONS": "400", "HALLMARK_DRIFT_WINDOW_SESSIONS": "200"}


async def healthy(tenant: Tenant) -> None:
    """Ask for a while, and nothing is wrong."""
    await tenant.has_asked(60)
    assert [alert for alert in await tenant.alerts() if not alert["is_deployments"]] == []


Fault = Callable[[Deployment, Tenant, str], Coroutine[Any, Any, None]]


async def refuse(deployment: Deployment, _: Tenant, __: str) -> None:
    deployment.model.refuses = True


async def truncate_the_prompt(deployment: Deployment, _: Tenant, __: str) -> None:
    deployment.model.reads_characters = 40


async def swap_the_index(_: Deployment, tenant: Tenant, document: str) -> None:
    assert (await tenant.client.delete(f"/v1/documents/{document}")).status_code == 200
    await tenant.add(BANANAS)


@pytest.mark.parametrize(
    ("fault", "rule"),
    [(refuse, "refusals"), (truncate_the_prompt, "unsupported"), (swap_the_index, "abstentions")],
)
async def test_a_stable_release_that_goes_bad_raises_its_alert_and_the_webhook_is_told(
    deployment: Deployment, fault: Fault, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with deployment.tenant() as tenant:
        document = await tenant.add(TOWER)
        try:
            async with tenant.asking():
                await healthy(tenant)
                await fault(deployment, tenant, document)
                begun, asked = time.time(), len(tenant.answers)
                told = await deployment.is_told(type="alert.firing", rule=rule, tenant=tenant.name)
                seconds, answers = time.time() - begun, len(tenant.answers) - asked
        finally:
            deployment.model.refuses, deployment.model.reads_characters = False, 1_000_000
        (alert,) = [each for each in await tenant.alerts() if each["rule"] == rule]
        assert (alert["id"], alert["release"], told["release"]) == (told["id"], "hallmark@1", "hallmark@1")
        assert told["facts"]["low"] > (0.2 if rule != "abstentions" else 0.5)
        assert "tower" not in json.dumps(told).lower()
        with capsys.disabled():
            print(f"\n{fault.__name__}: told {seconds:.1f} s and {answers} answers after it began: {told['why']}")


async def trial_of_new(deployment: Deployment, client: httpx.AsyncClient, name: str) -> None:
    """Give a name a stable release of the base model, and a canary of the adapter."""
    plain = {"name": name, "retrieval": {"mode": "off"}}
    digest = folder_digest(deployment.adapter)
    tuned = {**plain, "adapter": "new", "adapter_digest": digest, "alerts": RULES}
    for release in (plain, tuned):
        made = await client.post("/v1/releases", json=release)
        assert made.json()["approved"], made.text
    assert (await client.post(f"/v1/rollouts/{name}/promote", json={"release": f"{name}@1"})).status_code == 200
    step = await client.post(f"/v1/rollouts/{name}/canary", json={"release": f"{name}@2", "share": 0.4})
    assert step.status_code == 200, step.text


async def corrupt_the_file(deployment: Deployment) -> None:
    (deployment.adapter / "adapter_model.safetensors").write_bytes(b"wrights")


async def corrupt_in_memory(deployment: Deployment) -> None:
    deployment.model.adapter_is_corrupt = True


@pytest.mark.parametrize(
    ("corrupt", "guard", "name"),
    [(corrupt_the_file, "adapter_digest", "on-disk"), (corrupt_in_memory, "degenerate_output", "in-memory")],
)
async def test_a_corrupted_adapter_is_at_nothing_within_five_seconds_and_somebody_is_told(
    deployment: Deployment,
    corrupt: Callable[[Deployment], Coroutine[Any, Any, None]],
    guard: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with deployment.tenant() as tenant:
        client = tenant.client
        await trial_of_new(deployment, client, name)

        async def trial(status: str) -> dict[str, Any] | None:
            response = await client.get(f"/v1/rollouts/{name}/trial")
            found = response.json() if response.status_code == 200 else {}
            return found if found.get("status") == status else None

        try:
            async with tenant.asking(model=name):
                await until(lambda: trial("running"), seconds=30)
                await tenant.has_asked(60)
                await corrupt(deployment)
                begun = time.time()
                ended = await until(lambda: trial("rolled_back"), seconds=60)
                await asyncio.sleep(1.0)
                told = await deployment.is_told(type="alert.firing", rule="rollback", release=f"{name}@2")
        finally:
            deployment.model.adapter_is_corrupt = False
            (deployment.adapter / "adapter_model.safetensors").write_bytes(b"weights")
        assert ended["decision"]["guard"] == guard == told["facts"]["guard"]
        assert (told["tenant"], told["severity"]) == (None, "page")
        decided_at = begun
        if ended["decision"]["observation"]:
            heard = (await client.get(f"/v1/rollouts/{name}/trial/observations")).json()["data"]
            nth = sum(each["arm"] == "canary" for each in heard)
            decided_at = sorted(at for at, release, _ in tenant.answers if release == f"{name}@2")[nth - 1]
        last = max(at for at, release, _ in tenant.answers if release == f"{name}@2")
        with capsys.disabled():
            print(f"\n{guard}: the last canary answer {last - decided_at:.2f} s after what decided")
        assert last - decided_at < BACK_WITHIN_SECONDS
        assert (await client.get(f"/v1/rollouts/{name}")).json()["canary"] is None


TOPICS = ("tower", "bridge", "harbour", "station", "museum", "theatre", "cathedral", "lighthouse")
NEW_TOPICS = ("refund", "invoice", "payment", "receipt", "discount", "voucher", "subscription", "surcharge")


async def test_a_new_topic_in_the_questions_raises_an_alert_that_names_examples(
    deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference of 400 sessions, and then at least two windows of 200 in a row with other questions."""
    async with deployment.tenant() as tenant:
        await tenant.add(TOWER)
        gate = asyncio.Semaphore(8)

        async def ask(number: int, question: str) -> None:
            async with gate:
                await tenant.ask(number, question)

        async def ask_all(count: int, topics: tuple[str, ...], words: str) -> None:
            first = len(tenant.answers)
            asked = (f"{words} {topics[n % 8]} {n % 17} {topics[n % 3]}?" for n in range(first, first + count))
            await asyncio.gather(*(ask(first + n, question) for n, question in enumerate(asked)))

        async def is_followed() -> bool:
            await ask_all(5, TOPICS, "How tall is the")
            return bool((await tenant.client.get("/v1/drift")).json()["data"])

        await until(is_followed, seconds=90)
        await ask_all(600, TOPICS, "How tall is the")
        assert [alert for alert in await tenant.alerts() if alert["kind"] == "drift"] == []
        await ask_all(601, NEW_TOPICS, "Why was I charged twice for my")
        told = await deployment.is_told(150, type="alert.firing", rule="drift", tenant=tenant.name)
        assert {status for *_, status in tenant.answers} == {200}
        assert "inputs" in told["facts"]["kinds"]
        (example, *_) = told["facts"]["examples"]
        shown = (await tenant.client.get(f"/v1/predictions/{example}")).json()
        assert any(topic in shown["question"] for topic in NEW_TOPICS)
        assert "charged" not in json.dumps(told)
        with capsys.disabled():
            print(f"\na new topic: told after 601 sessions with it: {told['why']}")
