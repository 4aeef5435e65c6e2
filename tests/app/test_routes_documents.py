"""Documents over HTTP: added, replaced, listed, read and deleted, and what is refused."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.fake_tgi import FakeTGI
from tests.service import NO_TLS, Api, Service, live_service

ADD = "/v1/documents?wait=20"
GUIDE = """# Assay guide

A hallmark is a stamp on gold that says who made it.

## Marks

The maker's mark has two letters. The fineness mark says how pure the metal is.
"""
MAX_BYTES = 20_000


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    given = {"limits": {"max_document_bytes": MAX_BYTES}, "retrieval": {"passage_tokens": 32}}
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("docs"), engine_url=tgi.url, tenants=80, settings=given) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


async def upload(api: Api, **body: Any) -> httpx.Response:
    return await api.client.post(ADD, json=body)


async def search(api: Api, query: str, **body: Any) -> list[dict[str, Any]]:
    response = await api.client.post("/v1/search", json={"query": query, **body})
    assert response.status_code == 200, response.text
    return list(response.json()["hits"])


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of an error that has this status, code and field."""
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    assert error["request_id"] == response.headers["x-request-id"]
    return str(error["message"])


# --- adding ---


async def test_a_text_is_added_and_described(api):
    response = await upload(api, name="guide.md", text=GUIDE, metadata={"year": 1478, "kind": "guide", "draft": False})
    assert response.status_code == 201
    body = response.json()
    document = body["document"]
    assert body["outcome"] == "created"
    assert body["embedded_passages"] == document["passages"] > 1
    assert (document["name"], document["title"], document["media_type"]) == ("guide.md", "Assay guide", "text/markdown")
    assert document["metadata"] == {"year": 1478, "kind": "guide", "draft": False}
    assert document["size_bytes"] == document["characters"] == len(GUIDE)
    again = await api.client.get(f"/v1/documents/{document['id']}")
    assert again.json() == document


async def test_text_base64_and_a_form_are_the_same_document(api):
    first = (await upload(api, name="guide.md", text=GUIDE)).json()["document"]
    packed = await upload(api, name="guide.md", content_base64=base64.b64encode(GUIDE.encode()).decode())
    form = await api.client.post(ADD, files={"file": ("guide.md", GUIDE.encode())})
    for response in (packed, form):
        assert response.status_code == 200
        job = response.json().pop("job")
        assert response.json() == {"document": first, "outcome": "unchanged", "embedded_passages": 0, "job": job}


async def test_a_form_takes_a_name_and_metadata(api):
    response = await api.client.post(
        ADD,
        files={"file": ("C:\\fakepath\\x.md", GUIDE.encode(), "application/octet-stream")},
        data={"name": "guides/assay.md", "metadata": '{"year": 1478}'},
    )
    assert response.status_code == 201
    document = response.json()["document"]
    assert (document["name"], document["metadata"]) == ("guides/assay.md", {"year": 1478})


async def test_a_text_without_a_suffix_is_plain_text(api):
    document = (await upload(api, name="note", text="# not a heading")).json()["document"]
    assert (document["media_type"], document["title"]) == ("text/plain", "")


async def test_the_same_bytes_again_change_nothing(api):
    first = await upload(api, name="guide.md", text=GUIDE)
    again = await upload(api, name="guide.md", text=GUIDE)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == {
        **first.json(),
        "outcome": "unchanged",
        "embedded_passages": 0,
        "job": again.json()["job"],
    }


async def test_a_changed_document_is_replaced_and_its_old_link_is_gone(api):
    old = (await upload(api, name="guide.md", text=GUIDE)).json()["document"]
    link = (await search(api, "maker's mark two letters"))[0]["url"]
    response = await upload(api, name="guide.md", text=GUIDE.replace("two letters", "three letters"))
    assert response.status_code == 201
    body = response.json()
    assert body["outcome"] == "replaced"
    assert body["document"]["id"] == old["id"]
    assert body["document"]["version"] != old["version"]
    assert 1 <= body["embedded_passages"] < body["document"]["passages"]  # Only what changed is embedded anew.
    assert "three letters" in (await search(api, "maker's mark two letters"))[0]["passage"]["text"]
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as browser:
        message = refused(await browser.get(link), 410, "gone")
    assert "was replaced" in message


async def test_a_deleted_document_is_nowhere(api):
    document = (await upload(api, name="guide.md", text=GUIDE)).json()["document"]
    hit = (await search(api, "hallmark gold stamp"))[0]
    deleted = await api.client.delete(f"/v1/documents/{document['id']}")
    assert deleted.json() == {"id": document["id"], "object": "document.deleted", "deleted": True}
    assert await search(api, "hallmark gold stamp") == []
    assert (await api.client.get("/v1/documents")).json()["data"] == []
    for path in ("", "/source", "/passages", "/passages/1"):
        refused(await api.client.get(f"/v1/documents/{document['id']}{path}"), 404, "not_found")
    refused(await api.client.delete(f"/v1/documents/{document['id']}"), 404, "not_found")
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as browser:
        refused(await browser.get(hit["url"]), 404, "not_found")


# --- reading ---


async def test_passages_are_spans_of_the_source(api):
    document = (await upload(api, name="guide.md", text=GUIDE)).json()["document"]
    source = (await api.client.get(f"/v1/documents/{document['id']}/source")).json()
    assert source == {"document_id": document["id"], "text": GUIDE}
    passages = (await api.client.get(f"/v1/documents/{document['id']}/passages")).json()["data"]
    assert [passage["n"] for passage in passages] == list(range(1, document["passages"] + 1))
    for passage in passages:
        assert passage["text"] == GUIDE[passage["start"] : passage["end"]]
        one = await api.client.get(f"/v1/documents/{document['id']}/passages/{passage['n']}")
        assert one.json() == passage
    assert passages[-1]["heading_path"] == ["Assay guide", "Marks"]


async def test_documents_are_listed_in_pages(api):
    ids = {
        (await upload(api, name=f"{n}.txt", text=f"Document number {n}.")).json()["document"]["id"] for n in range(5)
    }
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = (await api.client.get("/v1/documents", params=query)).json()
        assert page["object"] == "list"
        seen += [document["id"] for document in page["data"]]
        if page["next"] is None:
            break
        query["after"] = page["next"]
    assert len(seen) == len(set(seen)) == 5
    assert set(seen) == ids


async def test_a_browser_gets_a_passage_as_text_it_will_not_run(api):
    await upload(api, name="evil.md", text="# Evil\n\n<script>alert(1)</script> is what the page says.")
    link = (await search(api, "what the page says"))[0]["url"]
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as browser:
        response = await browser.get(link, headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "<script>alert(1)</script>" in response.text
    assert response.text.startswith("Evil\nevil.md, passage 1\n")


async def test_a_link_opens_its_own_passage_and_nothing_else(api):
    await upload(api, name="guide.md", text=GUIDE)
    link = httpx.URL((await search(api, "maker's mark two letters"))[0]["url"])
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as browser:
        assert (await browser.get(link)).status_code == 200
        other = "1" if not link.path.endswith("/1") else "2"
        changed = [
            link.copy_with(path=link.path.rpartition("/")[0] + f"/{other}"),
            link.copy_with(path=link.path.rpartition("/")[0]),
            link.copy_set_param("tenant", "default"),
            link.copy_set_param("version", "0" * 16),
            link.copy_set_param("signature", "0" * 32),
            link.copy_remove_param("signature"),
        ]
        for url in changed:
            refused(await browser.get(url), 401, "invalid_api_key")
        refused(await browser.delete(link), 401, "invalid_api_key")


# --- refusing ---


WRONG = {
    "no name": ({"text": "x"}, "name"),
    "empty name": ({"name": "", "text": "x"}, "name"),
    "a name with a control character": ({"name": "a\0b", "text": "x"}, "name"),
    "a long name": ({"name": "n" * 513, "text": "x"}, "name"),
    "no content": ({"name": "a"}, "text"),
    "two contents": ({"name": "a", "text": "x", "content_base64": "eA=="}, "text"),
    "no base64": ({"name": "a", "content_base64": "not base64!"}, "content_base64"),
    "a number for a text": ({"name": "a", "text": 5}, "text"),
    "an unknown field": ({"name": "a", "text": "x", "colour": "red"}, "colour"),
    "a list as a fact": ({"name": "a", "text": "x", "metadata": {"tags": ["a"]}}, "metadata.tags"),
    "null as a fact": ({"name": "a", "text": "x", "metadata": {"none": None}}, "metadata.none"),
    "too many facts": ({"name": "a", "text": "x", "metadata": {str(n): n for n in range(33)}}, "metadata"),
}


@pytest.mark.parametrize(("body", "param"), WRONG.values(), ids=WRONG)
async def test_a_wrong_field_is_named(api, body, param):
    assert f"`{param}`" in refused(await upload(api, **body), 400, "invalid_request", param)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"name": "a", "text": "\xff"}', b'{"name": "a", "text": "\\ud800"}', b"[" * 30_000],
    ids=["empty", "list", "broken", "not UTF-8", "half a pair", "deep"],
)
async def test_a_body_that_is_no_json_object_is_refused(api, body):
    response = await api.client.post(
        "/v1/documents?wait=20", content=body, headers={"content-type": "application/json"}
    )
    assert "body" in refused(response, 400, "invalid_request")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5_000], ids=lambda number: number[:8])
async def test_numbers_that_json_cannot_send_back_are_refused(api, number):
    body = f'{{"name": "a", "text": "x", "metadata": {{"n": {number}}}}}'.encode()
    response = await api.client.post(
        "/v1/documents?wait=20", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text


MARKDOWN = ("a.md", b"x")
WRONG_FORMS = {
    "no file": ({"files": {"other": MARKDOWN}}, "file"),
    "a field for a file": ({"files": {"file": (None, "just a field")}}, "file"),
    "metadata cut off": ({"files": {"file": MARKDOWN}, "data": {"metadata": "{"}}, "metadata"),
    "metadata as a list": ({"files": {"file": MARKDOWN}, "data": {"metadata": "[]"}}, "metadata"),
    "a list as a fact": ({"files": {"file": MARKDOWN}, "data": {"metadata": '{"k": [1]}'}}, "metadata.k"),
    "metadata as a file": ({"files": {"file": MARKDOWN, "metadata": ("m.json", b"{}")}}, None),
    "a long name": ({"files": {"file": ("n" * 513, b"x")}}, "name"),
    "two files": ({"files": [("file", MARKDOWN), ("file", ("b.md", b"x"))]}, None),
    "many fields": ({"files": [("file", MARKDOWN), *((f"f{n}", (None, "x")) for n in range(20))]}, None),
}


@pytest.mark.parametrize(("form", "param"), WRONG_FORMS.values(), ids=WRONG_FORMS)
async def test_a_wrong_form_is_refused(api, form, param):
    refused(await api.client.post(ADD, **form), 400, "invalid_request", param)


@pytest.mark.parametrize("header", ["multipart/form-data", "multipart/form-data; boundary=x"])
async def test_a_broken_form_is_refused(api, header):
    response = await api.client.post(ADD, content=b"abc", headers={"content-type": header})
    refused(response, 400, "invalid_request")


async def test_a_file_without_readable_text_is_refused_and_says_why(api):
    for name, content in (("a.pdf", b"%PDF-1.7\n" + b"garbage " * 50), ("a.txt", b"a\0b"), ("a.docx", b"PK\x03\x04")):
        packed = base64.b64encode(content).decode()
        message = refused(await upload(api, name=name, content_base64=packed), 422, "unreadable_document")
        assert name in message
    assert (await api.client.get("/v1/documents")).json()["data"] == []


async def test_a_type_that_is_not_read_is_refused(api):
    packed = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    message = refused(await upload(api, name="a.png", content_base64=packed), 415, "unsupported_media_type")
    assert "Markdown" in message
    response = await api.client.post(ADD, content=b"<a/>", headers={"content-type": "text/xml"})
    assert "text/xml" in refused(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("form", ["text", "base64", "multipart"])
async def test_a_document_over_the_limit_is_refused(api, form):
    content = b"x " * (MAX_BYTES // 2)
    assert len(content) == MAX_BYTES
    for extra, status in ((b"", 201), (b"x", 413)):
        if form == "multipart":
            response = await api.client.post(ADD, files={"file": ("big.txt", content + extra)})
        elif form == "text":
            response = await upload(api, name="big.txt", text=(content + extra).decode())
        else:
            response = await upload(api, name="big.txt", content_base64=base64.b64encode(content + extra).decode())
        assert response.status_code == status, response.text
    assert "limits.max_document_bytes" in refused(response, 413, "payload_too_large")


async def test_a_body_that_cannot_hold_a_document_is_refused_before_it_is_read(api):
    body = json.dumps({"name": "a", "text": "x" * 3 * MAX_BYTES}).encode()

    async def unannounced() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 1_000):
            yield body[at : at + 1_000]

    headers = {"content-type": "application/json"}
    for content in (body, unannounced()):
        response = await api.client.post(ADD, content=content, headers=headers)
        refused(response, 413, "payload_too_large")


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", f"limit={'9' * 30}", f"after={'a' * 129}"])
async def test_a_wrong_page_is_refused(api, query):
    refused(await api.client.get(f"/v1/documents?{query}"), 400, "invalid_request", query.partition("=")[0])


@pytest.mark.parametrize("path", ["%00", "%ff", "a%20b", "a" * 129])
async def test_what_is_no_id_is_refused(api, path):
    refused(await api.client.get(f"/v1/documents/{path}"), 400, "invalid_request", "document_id")


async def test_a_passage_that_is_not_there_is_not_found(api):
    document = (await upload(api, name="guide.md", text=GUIDE)).json()["document"]
    path = f"/v1/documents/{document['id']}/passages"
    refused(await api.client.get(f"{path}/99"), 404, "not_found")
    refused(await api.client.get(f"{path}/0"), 400, "invalid_request", "n")
    refused(await api.client.get(f"{path}/1?version=zz"), 400, "invalid_request", "version")
    refused(await api.client.get(f"{path}/1?version={'0' * 16}"), 410, "gone")
    assert (await api.client.get(f"{path}/1?version={document['version']}")).status_code == 200
