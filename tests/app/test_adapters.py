"""Adapters of releases on engines that take them while they run: what answers is what the release names."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.engine_wiring import embedded_engine
from app.engines.local import EngineSettings as LocalEngineSettings
from app.settings.answering import EmbeddedSettings
from tests.adapter_folder import write_adapter
from tests.fake_successors import FakeSuccessor
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import Api, live_service, until

OFF = {"retrieval": {"mode": "off"}}


class Reads:
    """Of a stand-in: what it loads is read, as by a real engine, and answers."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, default=lambda body: Tokens(self.held.get(body["model"], "base")), **options)
        self.held: dict[str, str] = {}
        self.during_load: Any = lambda folder: None

    def load_adapter(self, body: dict[str, Any]) -> tuple[int, str, bytes]:
        folder = Path(body["lora_path"])
        reply = super().load_adapter(body)  # type: ignore[misc]
        if reply[0] == 200:
            self.during_load(folder)
            self.held[body["lora_name"]] = (folder / "adapter_model.safetensors").read_text()
        return reply  # type: ignore[no-any-return]


class Embedded(Reads, FakeTGI):
    def __init__(self, **options: Any) -> None:
        super().__init__(lists_adapters=True, **options)


class VLLM(Reads, FakeSuccessor):
    def __init__(self, **options: Any) -> None:
        super().__init__("vllm", **options)


@pytest.fixture(params=["embedded", "vllm"])
async def engine(request) -> AsyncIterator[Embedded | VLLM]:
    async with Embedded() if request.param == "embedded" else VLLM() as engine:
        yield engine


@contextlib.asynccontextmanager
async def serve(folder: Path, *engines: FakeTGI, **settings: Any) -> AsyncIterator[Api]:
    """A service before these engines, whose adapters lie in `folder / "adapters"`."""
    first, *others = engines
    dialect = getattr(first, "dialect", "embedded")
    others_too = [f"{dialect}+{each.url}" for each in others]
    given = {"dialect": dialect, "adapter_folder": folder / "adapters", "urls": others_too}
    async with (
        live_service(folder / "data", engine_url=first.url, settings={"engine": given | settings}) as service,
        service.client() as client,
    ):
        yield Api(client, "default", service.key)


async def create(api: Api, name: str, **fields: Any) -> dict[str, Any]:
    response = await api.client.post("/v1/releases", json={"name": name, **OFF, **fields})
    assert response.status_code == 201, response.text
    return dict(response.json())


async def promote(api: Api, label: str, *, status: int = 200) -> None:
    name = label.partition("@")[0]
    response = await api.client.post(f"/v1/rollouts/{name}/promote", json={"release": label, "why": "test"})
    assert response.status_code == status, response.text


async def until_ready(api: Api, status: int) -> None:
    async def looks_so() -> bool:
        return (await api.client.get("/readyz")).status_code == status

    await until(looks_so)


def changes(engine: FakeTGI) -> list[str]:
    """What it was told to load and to unload, without the digests, in order."""
    return [
        f"{request.path.split('/')[-1].split('_')[0]} {request.json['lora_name'].partition('@')[0]}"
        for request in engine.requests
        if request.path.endswith("load_lora_adapter")
    ]


async def said(api: Api, model: str) -> str:
    return str((await api.answer("Hello", model=model))["choices"][0]["message"]["content"])


async def test_a_folder_with_other_weights_under_the_same_name_answers_for_its_own_release_only(engine, tmp_path):
    folder = tmp_path / "adapters" / "tone"
    async with serve(tmp_path, engine) as api:
        for weights in ("first", "second"):
            digest = write_adapter(folder, None, weights=weights)
            made = await create(api, "support", adapter="tone", adapter_digest=digest)
            assert made["problems"] == []
            if weights == "first":
                await promote(api, made["id"])
        assert await said(api, "support") == "first"
        await promote(api, made["id"])
        assert await said(api, "support") == "second"
        assert await said(api, "support@1") == "first"


async def test_an_adapter_of_unknown_content_does_not_answer_for_a_digest(engine, tmp_path):
    digest = write_adapter(tmp_path / "adapters" / "tone", None, weights="right")
    engine.adapters = ("tone",)
    engine.held["tone"] = "of the engine's start"
    async with serve(tmp_path, engine) as api:
        made = await create(api, "support", adapter="tone", adapter_digest=digest)
        await promote(api, made["id"])
        assert await said(api, "support") == "right"


async def test_a_release_is_refused_where_the_engine_does_not_load_what_it_names(engine, tmp_path):
    digest = write_adapter(tmp_path / "adapters" / "tone", None)
    engine.adapters = ("tone",)
    engine.load_adapter = lambda body: (404, "", b"")
    async with serve(tmp_path, engine) as api:
        made = await create(api, "support", adapter="tone", adapter_digest=digest)
        assert f"not known to serve 'tone@{digest[:16]}', but tone" in " ".join(made["problems"])
        await promote(api, made["id"], status=409)


async def test_an_adapter_whose_folder_changes_while_it_is_read_is_not_served(engine, tmp_path):
    digest = write_adapter(tmp_path / "adapters" / "tone", None, weights="before")
    engine.during_load = lambda folder: write_adapter(folder, None, weights="after")
    async with serve(tmp_path, engine) as api:
        made = await create(api, "support", adapter="tone", adapter_digest=digest)
        assert "its folder has changed while it was read" in " ".join(made["problems"])
        assert engine.adapters == ()


async def test_an_engine_that_was_started_again_has_its_adapters_before_it_is_asked(tmp_path):
    digest = write_adapter(tmp_path / "adapters" / "tone", None, weights="tuned")
    async with Embedded() as before, serve(tmp_path, before, start_wait_seconds=30.0) as api:
        made = await create(api, "support", adapter="tone", adapter_digest=digest)
        await promote(api, made["id"])
        assert await said(api, "support") == "tuned"
        await before.stop()
        asked = asyncio.create_task(said(api, "support"))
        await until_ready(api, 503)
        async with Embedded(port=int(before.url.rpartition(":")[2])) as after:
            assert await asked == "tuned"
            paths = [request.path for request in after.requests]
            assert paths.index("/v1/load_lora_adapter") < paths.index("/v1/chat/completions")


async def test_an_engine_without_the_adapter_of_a_release_is_a_503_that_says_when_to_come_back(tmp_path):
    digest = write_adapter(tmp_path / "adapters" / "tone", None)
    async with Embedded() as engine, serve(tmp_path, engine) as api:
        made = await create(api, "support", adapter="tone", adapter_digest=digest)
        await promote(api, made["id"])
        engine.load_adapter = lambda body: (500, "", b"")  # type: ignore[method-assign]
        engine.adapters = ()
        response = await api.ask("Hello", model="support")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert await said(api, "hallmark") == "base"


async def test_no_adapter_of_what_answers_makes_room_for_another(tmp_path):
    async with Embedded() as engine, serve(tmp_path, engine) as api:
        engine.max_adapters = 2
        made = []
        for number in range(3):
            weights = f"weights {number}"
            digest = write_adapter(tmp_path / "adapters" / f"tone-{number}", None, weights=weights)
            made.append(await create(api, f"support-{number}", adapter=f"tone-{number}", adapter_digest=digest))
            if number < 2:
                await promote(api, made[-1]["id"])
        assert "it has room for 2 adapters" in " ".join(made[-1]["problems"])
        assert "HALLMARK_EMBEDDED_MAX_ADAPTERS" in " ".join(made[-1]["problems"])
        await promote(api, made[-1]["id"], status=409)
        assert [await said(api, f"support-{number}") for number in (0, 1)] == ["weights 0", "weights 1"]
        assert changes(engine) == ["load tone-0", "load tone-1"]


async def test_the_adapter_that_nothing_needs_and_that_rested_longest_makes_room(tmp_path):
    async with Embedded() as engine, serve(tmp_path, engine) as api:
        engine.max_adapters = 3
        made = []
        for number in range(4):
            digest = write_adapter(tmp_path / "adapters" / f"tone-{number}", None, weights=f"weights {number}")
            made.append(await create(api, f"support-{number}", adapter=f"tone-{number}", adapter_digest=digest))
            assert made[-1]["problems"] == []
            if number == 0:
                await promote(api, made[0]["id"])
        assert changes(engine) == ["load tone-0", "load tone-1", "load tone-2", "unload tone-1", "load tone-3"]
        assert await said(api, "support-0") == "weights 0"


async def test_adapters_that_find_no_room_put_out_none_of_what_answers(tmp_path):
    async with Embedded() as engine, serve(tmp_path, engine) as api:
        for number in range(3):
            digest = write_adapter(tmp_path / "adapters" / f"tone-{number}", None)
            made = await create(api, f"support-{number}", adapter=f"tone-{number}", adapter_digest=digest)
            await promote(api, made["id"])
        engine.max_adapters, engine.adapters = 2, ()
        engine.requests.clear()
        await engine.until(lambda: len(changes(engine)) == 2)
        looks = len(engine.requests)
        await engine.until(lambda: len(engine.requests) > looks + 12)
        assert len(changes(engine)) == len(engine.adapters) == 2


def test_what_the_settings_say_of_the_embedded_engine_reaches_it():
    assert embedded_engine(EmbeddedSettings(max_adapters=7, max_batch=3)) == LocalEngineSettings(
        max_adapters=7, max_batch=3
    )
