"""The door: closed but for the few paths that are named, and one envelope for every refusal behind it."""

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_tgi import FakeTGI
from tests.service import CHAT, Api, Service, description, live_service, until

OPEN = {"/healthz", "/readyz"}
DESCRIPTION: dict[str, Any] = description()
OPERATIONS = [
    (method.upper(), path, operation)
    for path, operations in DESCRIPTION["paths"].items()
    for method, operation in operations.items()
]
IDS = [f"{method} {path}" for method, path, _ in OPERATIONS]
BODIES: dict[str, Any] = {
    "create_chat_completion": {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}]},
    "add_document": {"name": "a.md", "text": "# A\n\nText.\n"},
    "sync_documents": {"source": "folder", "documents": []},
    "search": {"query": "Hello"},
    "create_embeddings": {"model": "hashing", "input": "Hello"},
    "give_feedback": {"conversation": "c", "rating": True},
    "change_feedback": {"rating": False},
    "state_label": {"prediction_id": "0" * 8 + "-0000-7000-8000-" + "0" * 12, "class": "a"},
    "define_review_queue": {},
    "add_review_gold": {"prediction_id": "0" * 8 + "-0000-7000-8000-" + "0" * 12, "class": "a"},
    "boost_review": {"rate": 0.5, "reason": "why not", "where": {}},
    "import_review_tasks": [],
    "lease_review_items": {},
    "complete_review": {"class": "a"},
    "skip_review": {},
    "renew_review": {},
    "create_release": {"name": "other"},
    "create_erasure": {"user": "nobody"},
    "set_canary": {"share": 0.1},
    "set_shadow": {"rate": 0.1},
    "promote": {},
    "roll_back": {},
    "pause_rollout": {},
    "resume_rollout": {},
    "set_alert_rules": {"rules": []},
    "silence_alerts": {"rule": "r", "seconds": 1},
    "acknowledge_alert": {},
    "create_drift_reference": {
        "release": "other@1",
        "since": "2026-11-01T00:00:00Z",
        "until": "2026-11-02T00:00:00Z",
    },
    "build_dataset": {"recipe": {"task": "classify"}},
    "tag_dataset_version": {"version": 1},
    "define_feature_view": {"entity": "customer", "features": {"plan": "string"}},
    "put_feature_rows": {"rows": [{"entity": "c", "event_time": "2026-11-01", "values": {"plan": "pro"}}]},
    "get_feature_values": {"features": ["customer:plan"], "rows": [{"entity": {"customer": "c"}}]},
}
WANTS_MORE = frozenset({"build_dataset"})
"""Where a route's own scope is not enough: whoever builds sees what it is built of."""
SCOPES = {
    "create_chat_completion": "chat",
    "list_models": "chat",
    "get_model": "chat",
    "create_embeddings": "chat",
    "add_document": "documents:write",
    "delete_document": "documents:write",
    "sync_documents": "documents:write",
    "cancel_job": "documents:write",
    "complete_job": "documents:write",
    "list_jobs": "documents:read",
    "get_job": "documents:read",
    "list_job_documents": "documents:read",
    "list_failed_documents": "documents:read",
    "list_documents": "documents:read",
    "get_document": "documents:read",
    "get_source": "documents:read",
    "list_passages": "documents:read",
    "get_passage": "documents:read",
    "search": "documents:read",
    "list_predictions": "predictions:read",
    "count_predictions": "predictions:read",
    "export_predictions": "predictions:read",
    "get_prediction": "predictions:read",
    "trace_prediction": "predictions:read",
    "find_uses_of_document": "predictions:read",
    "find_uses_of_release": "predictions:read",
    "find_uses_of_adapter": "predictions:read",
    "find_uses_of_dataset_row": "predictions:read",
    "trace_dataset": "predictions:read",
    "register_dataset": "releases:write",
    "register_training_run": "releases:write",
    "give_feedback": "feedback:write",
    "change_feedback": "feedback:write",
    "withdraw_feedback": "feedback:write",
    "list_feedback": "feedback:read",
    "get_feedback": "feedback:read",
    "get_prediction_feedback": "feedback:read",
    "state_label": "labels:write",
    "withdraw_label": "labels:write",
    "list_labels": "labels:read",
    "get_label": "labels:read",
    "list_releases": "releases:read",
    "get_release": "releases:read",
    "diff_releases": "releases:read",
    "list_rollouts": "releases:read",
    "get_rollout": "releases:read",
    "list_rollout_changes": "releases:read",
    "get_trial": "releases:read",
    "list_trial_observations": "releases:read",
    "create_release": "releases:write",
    "delete_release": "releases:write",
    "set_canary": "releases:write",
    "set_shadow": "releases:write",
    "promote": "releases:write",
    "roll_back": "releases:write",
    "pause_rollout": "releases:write",
    "resume_rollout": "releases:write",
    "define_review_queue": "review:manage",
    "add_review_gold": "review:manage",
    "boost_review": "review:manage",
    "end_review_boost": "review:manage",
    "import_review_tasks": "review:manage",
    "lease_review_items": "review:write",
    "complete_review": "review:write",
    "skip_review": "review:write",
    "renew_review": "review:write",
    "give_review_back": "review:write",
    "list_review_queues": "review:read",
    "get_review_queue": "review:read",
    "list_review_items": "review:read",
    "get_review_item": "review:read",
    "get_review": "review:read",
    "get_review_agreement": "review:read",
    "get_review_shares": "review:read",
    "list_review_boosts": "review:read",
    "get_review_boost": "review:read",
    "export_review_tasks": "review:read",
    "get_quality": "quality:read",
    "get_drift": "quality:read",
    "create_drift_reference": "releases:write",
    "list_engines": "releases:write",
    "list_datasets": "datasets:read",
    "get_dataset": "datasets:read",
    "list_dataset_builds": "datasets:read",
    "get_dataset_build": "datasets:read",
    "list_dataset_versions": "datasets:read",
    "get_dataset_version": "datasets:read",
    "list_dataset_rows": "datasets:read",
    "get_dataset_file": "datasets:read",
    "diff_dataset_versions": "datasets:read",
    "find_dataset_rows": "datasets:read",
    "build_dataset": "datasets:write",
    "import_dataset": "datasets:write",
    "cancel_dataset_build": "datasets:write",
    "tag_dataset_version": "datasets:write",
    "untag_dataset_version": "datasets:write",
    "list_feature_views": "features:read",
    "get_feature_view": "features:read",
    "get_feature_values": "features:read",
    "put_feature_rows": "features:write",
    "define_feature_view": "releases:write",
    "delete_feature_view": "releases:write",
    "list_alerts": "alerts:read",
    "get_alert": "alerts:read",
    "acknowledge_alert": "alerts:write",
    "list_alert_rules": "alerts:read",
    "get_alert_rules": "alerts:read",
    "list_alert_rule_revisions": "alerts:read",
    "set_alert_rules": "alerts:write",
    "remove_alert_rules": "alerts:write",
    "list_alert_silences": "alerts:read",
    "silence_alerts": "alerts:write",
    "end_alert_silence": "alerts:write",
    "list_alert_notifications": "alerts:read",
    "test_alert_notification": "alerts:write",
    "create_erasure": "privacy:manage",
    "list_erasures": "privacy:manage",
    "get_erasure": "privacy:manage",
    "metrics": "metrics",
}


def concrete(path: str) -> str:
    values = {"document_id": "doc", "n": "1", "prediction_id": "0" * 8 + "-0000-7000-8000-" + "0" * 12, "model": "x"}
    values |= dict.fromkeys(
        (
            "feedback_id",
            "label_id",
            "review_id",
            "item_id",
            "boost_id",
            "alert_id",
            "silence_id",
            "erasure_id",
            "build_id",
            "job_id",
        ),
        values["prediction_id"],
    )
    values |= {"release": "other@1", "name": "other", "queue": "other", "target": "other", "digest": "0" * 64}
    values |= {"dataset": "other", "version": "1", "file": "train.jsonl", "tag": "best", "view": "other"}
    asked = {"/v1/releases/diff": "?a=other@1&b=other@1", "/v1/datasets/{dataset}/diff": "?old=1"}
    path += asked.get(path, "")
    return re.sub(r"\{(\w+)\}", lambda name: values[name[1]], path)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def log_lines() -> io.BytesIO:
    return io.BytesIO()


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory, log_lines) -> AsyncIterator[tuple[FakeTGI, Service, dict[str, str]]]:
    directory = tmp_path_factory.mktemp("front")
    limits = {"max_document_bytes": 2_000, "max_body_bytes": 4_000}
    async with (
        FakeTGI() as tgi,
        live_service(
            directory, engine_url=tgi.url, tenants=80, settings={"limits": limits}, log_stream=log_lines
        ) as service,
    ):
        keys = {
            scope: await asyncio.to_thread(service.new_key, scopes=(scope,)) for scope in {*SCOPES.values(), "admin"}
        }
        yield tgi, service, keys


@pytest.fixture
def service(everyone) -> Service:
    return everyone[1]


@pytest.fixture
async def nobody(service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:
        yield client


@pytest.fixture
async def api(service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


def assert_envelope(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
async def test_every_route_but_those_named_is_closed_without_a_key(nobody, method, path, operation):
    response = await nobody.request(method, concrete(path), json=BODIES.get(operation["operationId"]))
    if path in OPEN:
        assert response.status_code == 200
        assert operation["security"] == []
    else:
        assert_envelope(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert operation["security"] == [{"key": []}]


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
async def test_every_route_asks_for_its_scope_and_for_no_other(everyone, method, path, operation):
    _, service, keys = everyone
    name = operation["operationId"]
    if path in OPEN or name == "who_am_i":
        assert name not in SCOPES
        return
    for scope, key in keys.items():
        async with service.client(key) as client:
            response = await client.request(method, concrete(path), json=BODIES.get(name))
        if scope == SCOPES[name] and name in WANTS_MORE:
            assert repr(scope) not in assert_envelope(response, 403, "insufficient_scope")["message"]
        elif scope in (SCOPES[name], "admin"):
            assert response.status_code not in (401, 403), response.text
        else:
            assert repr(SCOPES[name]) in assert_envelope(response, 403, "insufficient_scope")["message"]


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
async def test_the_description_is_open(nobody, path):
    assert (await nobody.get(path)).status_code == 200


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
        await api.client.post("/v1/documents", json={"name": "a.md", "text": "a" * 2_001}), 413, "payload_too_large"
    )


async def test_every_response_has_an_id_of_its_own(api, nobody):
    responses = [await api.client.get("/v1/models") for _ in range(3)]
    responses += [await api.ask("Hello"), await nobody.get("/v1/models"), await nobody.get("/healthz")]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == len(ids)


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
    known = set(DESCRIPTION["paths"])
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
        httpx.AsyncClient(base_url=service.url, trust_env=False) as nobody,
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
