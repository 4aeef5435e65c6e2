"""Web pages of other origins: let in where the settings name them, and streams reach them as they arrive."""

import asyncio
from typing import Any

import pytest

from tests.fake_tgi import FakeTGI, Tokens
from tests.service import CHAT, Api, live_service

PAGE = {"origin": "https://chat.example"}
PREFLIGHT = {**PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def settings(*origins: str) -> dict[str, Any]:
    return {"cors_origins": origins}


@pytest.mark.parametrize("path", [CHAT, "/v1/documents"])
async def test_a_page_that_the_settings_name_may_ask_and_another_may_not(tmp_path, path):
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path, engine_url=tgi.url, settings=settings("https://chat.example")) as service,
        service.nobody() as browser,
    ):
        asked = await browser.options(path, headers=PREFLIGHT)  # Without a key, as browsers do.
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://chat.example")
        assert asked.headers["access-control-allow-headers"] == "authorization"
        assert {"PUT", "PATCH"} <= set(asked.headers["access-control-allow-methods"].split(", "))
        assert "access-control-allow-credentials" not in asked.headers
        refused = await browser.options(path, headers={**PREFLIGHT, "origin": "https://evil.example"})
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        unauthorised = await browser.post(path, headers=PAGE, json={})
        assert (unauthorised.status_code, unauthorised.json()["error"]["code"]) == (401, "invalid_api_key")
        assert unauthorised.headers["access-control-allow-origin"] == "https://chat.example"
        assert "x-request-id" in unauthorised.headers["access-control-expose-headers"]


async def test_a_page_gets_a_stream_piece_by_piece(tmp_path):
    gate = asyncio.Event()
    async with (
        FakeTGI(Tokens("Hello", " world", gates={1: gate})) as tgi,
        live_service(tmp_path, engine_url=tgi.url, settings=settings("*")) as service,
        service.client(headers=PAGE) as browser,
    ):
        api = Api(browser, "default", service.key)
        async with api.streaming("Hi") as (stream, events):
            async for _ in events:
                if stream.text == "Hello":
                    gate.set()
        assert stream.response.headers["access-control-allow-origin"] == "*"
        assert (stream.text, stream.done) == ("Hello world", True)


async def test_by_default_no_page_is_let_in(tmp_path):
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path, engine_url=tgi.url) as service,
        service.nobody() as browser,
    ):
        for response in (await browser.options(CHAT, headers=PREFLIGHT), await browser.get("/healthz", headers=PAGE)):
            assert "access-control-allow-origin" not in response.headers
