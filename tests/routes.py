"""Every route of the description, the scope that it asks for, and a call of it: a new route gets a line in `SCOPES`.

The things that a path names are given by whoever calls; `UNKNOWN` are some that nobody has.
"""

from typing import Any

import httpx
import msgspec

from tests.lineage_world import dataset_of, row_of, run_of
from tests.service import description

OPEN = {"/healthz", "/readyz"}
"""What anybody may ask; it stands here again, so that opening another path is noticed."""
STEPS = ("canary", "shadow", "promote", "rollback", "pause", "resume")
SCOPES = {
    "chat": [
        "POST /v1/chat/completions",
        "POST /v1/responses",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "POST /v1/embeddings",
    ],
    "documents:read": [
        "GET /v1/documents",
        "GET /v1/documents/{document_id}",
        "GET /v1/documents/{document_id}/source",
        "GET /v1/documents/{document_id}/passages",
        "GET /v1/documents/{document_id}/passages/{n}",
        "POST /v1/search",
        "GET /v1/failed-documents",
        "GET /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "GET /v1/jobs/{job_id}/documents",
    ],
    "documents:write": [
        "POST /v1/documents",
        "DELETE /v1/documents/{document_id}",
        "POST /v1/documents/sync",
        "POST /v1/jobs/{job_id}/cancel",
        "POST /v1/jobs/{job_id}/complete",
    ],
    "indexes:manage": [
        "GET /v1/indexes",
        "POST /v1/indexes",
        "POST /v1/indexes/rollback",
        "GET /v1/indexes/{index_version}",
        "POST /v1/indexes/{index_version}/compare",
        "POST /v1/indexes/{index_version}/switch",
        "DELETE /v1/indexes/{index_version}",
    ],
    "predictions:read": [
        "GET /v1/predictions",
        "GET /v1/predictions/count",
        "GET /v1/predictions/export",
        "GET /v1/predictions/{prediction_id}",
        "GET /v1/responses/{response_id}",
        "GET /v1/predictions/{prediction_id}/lineage",
        "GET /v1/lineage/documents/{document_id}",
        "GET /v1/lineage/releases/{release}",
        "GET /v1/lineage/adapters/{digest}",
        "GET /v1/lineage/dataset-rows/{digest}",
        "GET /v1/lineage/datasets/{digest}",
    ],
    "feedback:write": [
        "POST /v1/feedback",
        "PATCH /v1/feedback/{feedback_id}",
        "DELETE /v1/feedback/{feedback_id}",
    ],
    "feedback:read": [
        "GET /v1/feedback",
        "GET /v1/feedback/{feedback_id}",
        "GET /v1/predictions/{prediction_id}/feedback",
    ],
    "labels:write": ["POST /v1/labels", "DELETE /v1/labels/{label_id}"],
    "labels:read": ["GET /v1/labels", "GET /v1/labels/{label_id}"],
    "releases:read": [
        "GET /v1/releases",
        "GET /v1/releases/diff",
        "GET /v1/releases/{release}",
        "GET /v1/rollouts",
        "GET /v1/rollouts/{name}",
        "GET /v1/rollouts/{name}/changes",
        "GET /v1/rollouts/{name}/trial",
        "GET /v1/rollouts/{name}/trial/observations",
    ],
    "releases:write": [
        "GET /v1/engines",
        "POST /v1/releases",
        "DELETE /v1/releases/{release}",
        *(f"POST /v1/rollouts/{{name}}/{step}" for step in STEPS),
        "POST /v1/lineage/datasets",
        "POST /v1/lineage/training-runs",
        "POST /v1/drift/references",
        "PUT /v1/features/{view}",
        "DELETE /v1/features/{view}",
    ],
    "features:read": ["GET /v1/features", "GET /v1/features/{view}", "POST /v1/feature-values"],
    "features:write": ["POST /v1/features/{view}/rows"],
    "review:manage": [
        "PUT /v1/review/queues/{queue}",
        "POST /v1/review/queues/{queue}/gold",
        "POST /v1/review/queues/{queue}/boosts",
        "DELETE /v1/review/queues/{queue}/boosts/{boost_id}",
        "POST /v1/review/queues/{queue}/import",
    ],
    "review:write": [
        "POST /v1/review/queues/{queue}/leases",
        "POST /v1/review/reviews/{review_id}/complete",
        "POST /v1/review/reviews/{review_id}/skip",
        "POST /v1/review/reviews/{review_id}/renew",
        "DELETE /v1/review/reviews/{review_id}",
    ],
    "review:read": [
        "GET /v1/review/queues",
        "GET /v1/review/queues/{queue}",
        "GET /v1/review/queues/{queue}/items",
        "GET /v1/review/items/{item_id}",
        "GET /v1/review/reviews/{review_id}",
        "GET /v1/review/queues/{queue}/agreement",
        "GET /v1/review/queues/{queue}/shares",
        "GET /v1/review/queues/{queue}/boosts",
        "GET /v1/review/queues/{queue}/boosts/{boost_id}",
        "GET /v1/review/queues/{queue}/export",
    ],
    "quality:read": ["GET /v1/quality", "GET /v1/drift"],
    "alerts:read": [
        "GET /v1/alerts",
        "GET /v1/alerts/{alert_id}",
        "GET /v1/alert-rules",
        "GET /v1/alert-rules/{target}",
        "GET /v1/alert-rules/{target}/revisions",
        "GET /v1/alert-silences",
        "GET /v1/alert-notifications",
    ],
    "alerts:write": [
        "POST /v1/alerts/{alert_id}/acknowledge",
        "PUT /v1/alert-rules/{target}",
        "DELETE /v1/alert-rules/{target}",
        "POST /v1/alert-silences",
        "DELETE /v1/alert-silences/{silence_id}",
        "POST /v1/alert-notifications/test",
    ],
    "datasets:read": [
        "GET /v1/datasets",
        "GET /v1/datasets/{dataset}",
        "GET /v1/datasets/{dataset}/builds",
        "GET /v1/datasets/{dataset}/builds/{build_id}",
        "GET /v1/datasets/{dataset}/versions",
        "GET /v1/datasets/{dataset}/versions/{version}",
        "GET /v1/datasets/{dataset}/versions/{version}/rows",
        "GET /v1/datasets/{dataset}/versions/{version}/files/{file}",
        "GET /v1/datasets/{dataset}/diff",
        "GET /v1/dataset-rows",
    ],
    "datasets:write": [
        "POST /v1/datasets/{dataset}/builds",
        "DELETE /v1/datasets/{dataset}/builds/{build_id}",
        "POST /v1/datasets/{dataset}/imports",
        "PUT /v1/datasets/{dataset}/tags/{tag}",
        "DELETE /v1/datasets/{dataset}/tags/{tag}",
    ],
    "privacy:manage": ["POST /v1/erasures", "GET /v1/erasures", "GET /v1/erasures/{erasure_id}"],
    "metrics": ["GET /metrics"],
    "": ["GET /v1/me"],
}
"""The routes by the scope that they ask for."""
TAKE_FILES = {
    "POST /v1/documents",
    "POST /v1/documents/sync",
    "POST /v1/datasets/{dataset}/imports",
    "POST /v1/drift/references",
    "POST /v1/features/{view}/rows",
    "POST /v1/lineage/datasets",
    "POST /v1/review/queues/{queue}/import",
}
"""What takes more than the largest body; it stands here again, so that opening another path is noticed."""
WANT_MORE = {"POST /v1/datasets/{dataset}/builds"}
"""Where a scope is not enough: whoever builds sees what it is built of."""
NOBODYS = "01900000-0000-7000-8000-000000000000"
ROW = row_of("An example.")
DATASET = dataset_of("tone", "1", [ROW])
TRAINING_RUN = run_of("tone-run", "a" * 64, DATASET.manifest["digest"])
DIGESTS = {"adapters": "a" * 64, "dataset-rows": ROW.digest, "datasets": DATASET.manifest["digest"]}
NEEDED = {route: scope for scope, routes in SCOPES.items() for route in routes}
BODIES = {
    "POST /v1/responses": {"model": "hallmark", "input": "Hello"},
    "POST /v1/chat/completions": {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}]},
    "POST /v1/embeddings": {"model": "hashing", "input": "x"},
    "POST /v1/search": {"query": "gold"},
    "POST /v1/documents": {"name": "mine.txt", "text": "My own text."},
    "POST /v1/documents/sync": {"source": "folder", "documents": []},
    "POST /v1/indexes/{index_version}/compare": {"questions": [{"question": "Who?", "documents": {"a.txt": 1}}]},
    "POST /v1/indexes/{index_version}/switch": {},
    "PUT /v1/features/{view}": {"entity": "customer", "features": {"plan": "string"}},
    "POST /v1/features/{view}/rows": {"rows": [{"entity": "c", "event_time": "2026-11-01", "values": {"plan": "pro"}}]},
    "POST /v1/feature-values": {"features": ["customer:plan"], "rows": [{"entity": {"customer": "c"}}]},
    "POST /v1/feedback": {"conversation": "c", "rating": True},
    "PATCH /v1/feedback/{feedback_id}": {"rating": False},
    "POST /v1/labels": {"prediction_id": NOBODYS, "class": "a"},
    "PUT /v1/review/queues/{queue}": {"classes": ["right", "wrong"]},
    "POST /v1/review/queues/{queue}/leases": {},
    "POST /v1/review/queues/{queue}/gold": {"prediction_id": NOBODYS, "class": "right"},
    "POST /v1/review/queues/{queue}/boosts": {"rate": 0.5, "reason": "why not", "where": {}},
    "POST /v1/review/queues/{queue}/import": [],
    "POST /v1/review/reviews/{review_id}/complete": {"class": "right"},
    "POST /v1/review/reviews/{review_id}/skip": {},
    "POST /v1/review/reviews/{review_id}/renew": {},
    "POST /v1/lineage/datasets": msgspec.to_builtins(DATASET),
    "POST /v1/lineage/training-runs": msgspec.to_builtins(TRAINING_RUN),
    "POST /v1/releases": {"name": "hallmark", "notes": "another"},
    "POST /v1/drift/references": {
        "release": "hallmark@1",
        "since": "2026-11-01T00:00:00Z",
        "until": "2026-11-02T00:00:00Z",
    },
    "POST /v1/alerts/{alert_id}/acknowledge": {"why": "seen"},
    "PUT /v1/alert-rules/{target}": {"rules": [], "why": "none"},
    "POST /v1/alert-silences": {"rule": "*", "seconds": 60, "why": "a test"},
    "POST /v1/datasets/{dataset}/builds": {"recipe": {"task": "classify"}},
    "PUT /v1/datasets/{dataset}/tags/{tag}": {"version": 1},
    "POST /v1/erasures": {"user": "nobody"},
    **{f"POST /v1/rollouts/{{name}}/{step}": {} for step in STEPS},
    "POST /v1/rollouts/{name}/canary": {"share": 0.1},
    "POST /v1/rollouts/{name}/shadow": {"rate": 0.1},
}
ROUTES = [
    f"{method.upper()} {path}"
    for path, methods in description()["paths"].items()
    for method in methods
    if path not in OPEN
]


UNKNOWN = {
    **dict.fromkeys(
        ("prediction_id", "response_id", "feedback_id", "label_id", "review_id", "item_id", "boost_id", "alert_id",
         "silence_id", "erasure_id", "build_id", "job_id"),
        NOBODYS,
    ),
    "document_id": "nobodys",
    "index_version": "other",
    "n": "1",
    "model": "other",
    "release": "other@1",
    "name": "other",
    "queue": "other",
    "target": "other",
    "dataset": "other",
    "version": "1",
    "file": "train.jsonl",
    "tag": "best",
    "view": "other",
}  # fmt: skip
"""Names for every parameter of a path, of which nothing is there."""


async def call(client: httpx.AsyncClient, route: str, things: dict[str, str]) -> httpx.Response:
    """Ask a route about the things of these names, with a body that it takes."""
    method, path = route.split(" ")
    asked = {"a": "hallmark@1", "b": "hallmark@1"} if path == "/v1/releases/diff" else None
    asked = {"old": "1"} if path == "/v1/datasets/{dataset}/diff" else asked
    path = path.format(**things, digest=DIGESTS.get(path.split("/")[-2]))
    return await client.request(method, path, json=BODIES.get(route), params=asked)


def assert_envelope(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Give the error of a response that has to be a refusal of this kind."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    return error
