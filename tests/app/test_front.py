"""The door: closed but for the few paths that are named, and one envelope for every refusal behind it."""

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_tgi import FakeTGI
from tests.routes import OPEN, ROUTES, TAKE_FILES, UNKNOWN, assert_envelope, call
from tests.service import CHAT, Api, Service, description, live_service, until


@pytest.fixture(scope="module")
def log_lines() -> io.BytesIO:
    return io.BytesIO()


@pytest.fixture(scope="module")
async def service(tmp_path_factory, log_lines) -> AsyncIterator[Service]:
    directory = tmp_path_factory.mktemp("front")
    limits = {"max_document_bytes": 8_000, "max_body_bytes": 4_000}
    async with (
        FakeTGI() as tgi,
        live_service(
            directory, engine_url=tgi.url, tenants=80, settings={"limits": limits}, log_stream=log_lines
        ) as service,
    ):
        yield service


@pytest.fixture
async def nobody(service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.nobody() as client:
        yield client


@pytest.fixture
async def api(service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


async def test_no_key_is_needed_to_ask_whether_it_is_healthy_and_ready(nobody):
    for path in OPEN:
        assert (await nobody.get(path)).status_code == 200


async def test_the_description_is_open_and_the_one_that_is_printed(nobody):
    assert (await nobody.get("/openapi.json")).json() == description()


async def test_the_page_of_the_description_loads_nothing_from_elsewhere(nobody):
    page = await nobody.get("/docs")
    addresses = re.findall(r"""(?:href=|src=|url: ?)["']([^"']+)""", page.text)
    kinds = {str((await nobody.get(address)).headers["content-type"]).partition(";")[0] for address in addresses}
    assert page.status_code == 200
    assert "//" not in "".join(addresses)
    assert kinds == {"text/css", "image/png", "text/javascript", "application/json"}
    assert (await nobody.get("/docs/__init__.py")).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "//healthz",
        "/healthz/",
        "/healthz/../v1/models",
        "/healthz%2f..%2fv1/models",
        "/HEALTHZ",
        "/v1/models?x=/healthz",
        "/v1/models%3F/healthz",
        "/%2e/healthz/../../v1/documents",
        "/docs/../v1/documents",
        "/nowhere",
        "/",
    ],
)
async def test_no_spelling_of_an_open_path_opens_another(service, path):
    host, port = service.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    status = int(head.split()[1])
    if path == "/":
        assert status in (200, 404)
    else:
        assert status == 401, head
        assert json.loads(body)["error"]["code"] == "invalid_api_key"


async def test_a_path_that_is_not_there_is_a_404_and_a_wrong_method_a_405(api):
    assert_envelope(await api.client.get("/v1/nowhere"), 404, "not_found")
    assert_envelope(await api.client.get(CHAT), 405, "method_not_allowed")
    assert_envelope(await api.client.delete(CHAT), 405, "method_not_allowed")
    assert_envelope(await api.client.get("/v1/responses"), 405, "method_not_allowed")
    assert_envelope(await api.client.put("/v1/models"), 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/v1/search", {}, "query"),
        ("POST", "/v1/search", {"query": 7}, "query"),
        ("POST", "/v1/search", {"query": "x", "top_k": 0}, "top_k"),
        ("POST", "/v1/search", {"query": "x", "filter": {"a": {"$gt": 1}}}, "filter.a"),
        ("POST", "/v1/embeddings", {"input": "x"}, "model"),
        ("POST", "/v1/embeddings", {"model": "hashing", "input": []}, "input"),
        ("POST", "/v1/embeddings", {"model": "hashing", "input": "x", "dimensions": 3}, "dimensions"),
        ("POST", "/v1/documents", {"text": "x"}, "name"),
        ("POST", "/v1/documents", {"name": "a", "text": "x", "content_base64": "eA=="}, "text"),
        ("POST", "/v1/documents", {"name": "a", "content_base64": "?"}, "content_base64"),
        ("GET", "/v1/documents?limit=0", None, "limit"),
        ("GET", "/v1/predictions?limit=999", None, "limit"),
        ("GET", "/v1/predictions?before=x", None, "before"),
        ("GET", "/v1/predictions/x", None, "prediction_id"),
        ("GET", "/v1/documents/doc/passages/0", None, "n"),
    ],
)
async def test_every_route_names_the_field_that_is_wrong(api, method, path, body, param):
    error = assert_envelope(await api.client.request(method, path, json=body), 400, "invalid_request")
    assert error["param"] == param


async def test_a_body_that_is_no_json_is_a_400_everywhere(api):
    for path in ("/v1/search", "/v1/embeddings", "/v1/documents", CHAT):
        response = await api.client.post(path, content=b"{", headers={"content-type": "application/json"})
        assert_envelope(response, 400, "invalid_request")


async def test_a_body_over_the_limit_is_a_413_everywhere(api):
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b'{"query": "' + b"a" * 1_000

    for path in ("/v1/search", "/v1/embeddings", "/v1/documents", CHAT):
        headers = {"content-type": "application/json"}
        assert_envelope(await api.client.post(path, content=parts(), headers=headers), 413, "payload_too_large")
        body = b'{"query": "' + b"a" * 20_000 + b'"}'
        assert_envelope(await api.client.post(path, content=body, headers=headers), 413, "payload_too_large")
    assert_envelope(
        await api.client.post("/v1/documents", json={"name": "a.md", "text": "a" * 8_001}), 413, "payload_too_large"
    )


JSON = {"content-type": "application/json"}
BODIES = [route for route in ROUTES if route.startswith(("POST", "PUT", "PATCH"))]


async def test_a_body_over_the_limit_is_a_413_wherever_no_file_is_taken(api):
    for route in BODIES:
        method, path = route.split(" ")
        response = await api.client.request(method, path.format(**UNKNOWN), content=b"[" + b"0," * 3_000, headers=JSON)
        if route in TAKE_FILES:
            assert response.status_code in (400, 404, 415), route
        else:
            error = assert_envelope(response, 413, "payload_too_large")
            assert "`limits.max_body_bytes`" in error["message"]


async def test_a_body_that_does_not_say_its_length_is_cut_off_at_the_limit(api):
    async def parts(opening: bytes, thousands: int) -> AsyncIterator[bytes]:
        yield opening
        for _ in range(thousands):
            yield b"0," * 500

    await call(api.client, "PUT /v1/features/{view}", UNKNOWN)  # Its rows are read where it is there.
    for route in BODIES:
        method, path = route.split(" ")
        if "requestBody" in description()["paths"][path][method.lower()]:
            thousands = 16 if route in TAKE_FILES else 4
            headers, opening = JSON, b"["
            if path.endswith("/imports"):
                headers = {"content-type": "multipart/form-data; boundary=x"}
                opening = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a"\r\n\r\n'
            content = parts(opening, thousands)
            response = await api.client.request(method, path.format(**UNKNOWN), content=content, headers=headers)
            error = assert_envelope(response, 413, "payload_too_large")
            assert f"{thousands}000 bytes" in error["message"]


async def test_what_takes_files_asks_for_its_scope_before_it_reads_one(service, api):
    key = await service.new_key(tenant=api.name, scopes=("chat",))
    for route in TAKE_FILES:
        path, headers = route.removeprefix("POST ").format(**UNKNOWN), {"authorization": f"Bearer {key}", **JSON}
        assert_envelope(await api.client.post(path, content=b"{", headers=headers), 403, "insufficient_scope")


LISTS = [
    "documents",
    "jobs",
    "feedback",
    "labels",
    "datasets",
    "releases",
    "drift",
    "alerts",
    "predictions",
    "erasures",
]


@pytest.mark.parametrize("of", LISTS)
async def test_a_list_of_less_than_is_asked_for_is_not_one_of_everything(api, of):
    response = await api.client.get(f"/v1/{of}?misspelt=x")
    error = assert_envelope(response, 400, "invalid_request")
    assert error["param"] == "misspelt"
    assert "misspelt" in error["message"]
    assert (await api.client.get(f"/v1/{of}")).status_code == 200


async def test_what_others_defined_takes_what_they_add(api):
    for path in ("/v1/models?api-version=1", "/healthz?at=1", "/readyz?at=1"):
        assert (await api.client.get(path)).status_code == 200
    document = await api.add("door.md", "# Door\n\nThe door opens at nine.\n")
    answer = await api.answer("When does the door open?")
    assert answer["citations"][0]["document_id"] == document["id"]
    assert (await api.client.get(answer["citations"][0]["url"])).status_code == 200  # Signed, though there is a key.


async def test_every_response_has_an_id_of_its_own(api, nobody):
    responses = [await api.client.get("/v1/models") for _ in range(3)]
    responses += [await api.ask("Hello"), await nobody.get("/v1/models"), await nobody.get("/healthz")]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == len(ids)


async def test_the_id_of_an_error_finds_its_line_in_the_log(api, nobody, log_lines):
    failed = [
        await api.client.post("/v1/search", json={"query": 5}),
        await nobody.get("/v1/documents"),
        await nobody.post(CHAT, json={}),
        await api.client.post(CHAT, json={"messages": 5}),
    ]
    ids = [response.json()["error"]["request_id"] for response in failed]

    async def told() -> bool:
        return all(each.encode() in log_lines.getvalue() for each in ids)

    await until(told)


async def test_metrics_and_logs_name_routes_and_never_paths_keys_or_words(api, nobody, log_lines):
    secret = "marzipan"
    document = await api.add(f"{secret}.md", f"# {secret}\n\nThe {secret} weighs 3 kilograms.\n")
    asked = await api.answer(f"How much does the {secret} weigh?")
    await api.client.get(f"/v1/documents/{document['id']}")
    await api.client.post("/v1/search", json={"query": secret})
    await api.client.get(f"/v1/{secret}")
    await nobody.get(f"/v1/documents/{secret}", headers={"authorization": "Bearer hm_nobody_secret"})
    metrics = (await api.client.get("/metrics")).text
    routes = {
        sample.labels["route"]
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if "route" in sample.labels
    }
    known = set(description()["paths"])
    assert routes <= {*known, "unmatched", "/openapi.json", "/docs"}
    assert {"/v1/documents/{document_id}", "unmatched", CHAT} <= routes

    async def written() -> bytes | None:
        lines = log_lines.getvalue()
        mine = lines.find(asked["id"].encode())
        return lines if mine >= 0 and b"/metrics" in lines[mine:] else None

    lines = await until(written)
    for shown in (metrics.encode(), lines):
        assert secret.encode() not in shown
        assert api.key.split("_")[2].encode() not in shown
        assert document["id"].encode() not in shown
    accesses = [json.loads(line) for line in lines.splitlines() if b"/v1/chat/completions" in line]
    assert asked["id"] in [each["prediction_id"] for each in accesses]


@pytest.mark.parametrize("is_open", [False, True])
async def test_metrics_are_open_only_when_the_settings_say_so(tmp_path, is_open):
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path, engine_url=tgi.url, settings={"open_metrics": is_open}) as service,
        service.nobody() as nobody,
    ):
        assert (await nobody.get("/metrics")).status_code == (200 if is_open else 401)
        assert (await nobody.get("/v1/models")).status_code == 401


async def test_one_tenant_s_things_do_not_exist_for_another(service, api):
    document = await api.add("mine.md", "# Mine\n\nThis is mine.\n")
    prediction = await api.answer("What is this?")
    async with service.tenant() as other:
        for path in ("", "/source", "/passages", "/passages/1"):
            assert_envelope(await other.client.get(f"/v1/documents/{document['id']}{path}"), 404, "not_found")
        assert_envelope(await other.client.delete(f"/v1/documents/{document['id']}"), 404, "not_found")
        assert_envelope(await other.client.get(f"/v1/predictions/{prediction['id']}"), 404, "not_found")
        assert (await other.client.get("/v1/documents")).json()["data"] == []
        assert (await other.client.get("/v1/predictions")).json()["data"] == []
    assert (await api.client.get(f"/v1/documents/{document['id']}")).status_code == 200
