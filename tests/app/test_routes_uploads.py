"""Large uploads as JSON are decoded in steps, which must not be seen in what comes out."""

import base64
from collections.abc import AsyncIterator

import pytest

from tests.fake_tgi import FakeTGI
from tests.service import Api, live_service

STEP = 196_608
"""Bytes that are decoded at once."""


@pytest.fixture
async def api(tmp_path) -> AsyncIterator[Api]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path, engine_url=tgi.url) as service,
        service.client() as client,
    ):
        yield Api(client, "default", service.key)


@pytest.mark.parametrize("size", [STEP - 1, STEP, STEP + 1, 3 * STEP + 7])
async def test_base64_of_any_length_is_the_bytes_it_stands_for(api, size):
    content = b"# Guide\n\nA hallmark is a stamp.\n".ljust(size)
    packed = base64.b64encode(content).decode()
    added = await api.client.post("/v1/documents?wait=20", json={"name": "guide.md", "content_base64": packed})
    assert added.status_code == 201, added.text
    again = await api.client.post("/v1/documents?wait=20", files={"file": ("guide.md", content)})
    assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")


@pytest.mark.parametrize("media_type", [None, "text/html", "text/html; charset=iso-8859-1"])
async def test_text_is_the_characters_it_is_whatever_charset_it_declares(api, media_type):
    page = "<html><head><meta charset='iso-8859-1'></head><body><p>Zürich – 12 €</p></body></html>"
    body = {"name": "a.html", "text": page} | ({"media_type": media_type} if media_type else {})
    added = (await api.client.post("/v1/documents?wait=20", json=body)).json()["document"]
    found = await api.client.get(f"/v1/documents/{added['id']}/source")
    assert found.json()["text"] == "Zürich – 12 €"


@pytest.mark.parametrize("middle", [b"\0" * (STEP - 1), b"\0" * (STEP - 2)])
async def test_padding_in_the_middle_is_no_base64(api, middle):
    packed = base64.b64encode(middle).decode() + base64.b64encode(b"more").decode()
    refused = await api.client.post("/v1/documents?wait=20", json={"name": "a.md", "content_base64": packed})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "content_base64")


async def test_a_url_is_not_fetched_unless_the_operator_says_so(api):
    refused = await api.client.post("/v1/documents", json={"url": "https://example.com/a.md"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "url")
    assert "`ingestion.fetch_urls`" in refused.json()["error"]["message"]
