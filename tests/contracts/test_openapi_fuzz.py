"""Whatever fits the description, and much that does not, gets what the description promises: never a 500.

Schemathesis makes the requests from the description of a live service, its own process beside it. A second description
in which names are real ones gets past the doors, into search, embeddings and answers.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.fake_tgi import Drop, FakeTGI, Refuse, Reply, Tokens
from tests.review_world import under_review
from tests.service import CHAT, Api, Service, live_service

# A description cannot say all that is refused: "one of these two fields", "a file of a kind that is read".
UNSAID = "positive_data_acceptance"
POSITIVE = ("--mode", "positive")
MAIN = ("create_chat_completion", "add_document", "search", "create_embeddings", "list_predictions")
CONFORMANCE = "status_code_conformance,content_type_conformance,response_schema_conformance"


# Schemathesis is a process of its own, which a busy machine makes wait.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass
class Target:
    tgi: FakeTGI
    service: Service
    api: Api
    directory: Path
    log: BytesIO

    async def fuzz(self, source: str, *options: str, checks: str = "all", key: bool = True) -> str:
        """Run schemathesis over a description; gives what it printed, or fails with it."""
        header = ["--header", f"Authorization: Bearer {self.service.key}"] if key else []
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", source, "--url", self.service.url, *header),
            *("--checks", checks, "--exclude-checks", UNSAID, "--seed", "20261123", "--no-color", *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.directory,
        )
        printed = (await process.communicate())[0].decode()
        assert process.returncode == 0, printed
        assert "No test cases were generated" not in printed
        return printed

    def answered(self) -> Counter[tuple[str, int]]:
        """Requests so far by route and status, from the service's own log."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return Counter((line["route"], line["status"]) for line in lines if "route" in line)

    async def with_real_names(self) -> str:
        """Write a description whose names exist, and in which a chat has what no schema can demand."""
        document = await self.api.add(
            "stamps.md", "# Stamps\n\nA hallmark is a stamp on gold.\n\n## Use\n\nIt says who."
        )
        prediction = await self.api.answer("What is a hallmark?")
        about = {"prediction_id": prediction["id"]}
        feedback = (await self.api.client.post("/v1/feedback", json={**about, "rating": True})).json()
        label = (await self.api.client.post("/v1/labels", json={**about, "class": "a"})).json()
        description = (await self.api.client.get("/openapi.json")).json()
        real = {
            "document_id": {"enum": [document["id"]]},
            "prediction_id": {"enum": [prediction["id"]]},
            "feedback_id": {"enum": [feedback["id"]]},
            "label_id": {"enum": [label["id"]]},
            "n": {"enum": [1, 2]},
            **{name: {"enum": [value]} for name, value in (await under_review(self.api)).items()},
        }
        for methods in description["paths"].values():
            for operation in methods.values():
                for parameter in operation.get("parameters", ()):
                    parameter["schema"] = real.get(parameter["name"], parameter["schema"])
        # Deleting would leave the others nothing to find.
        del description["paths"]["/v1/documents/{document_id}"]["delete"]
        _narrow(description["components"]["schemas"])
        path = self.directory / "real.json"
        path.write_text(json.dumps(description))
        return str(path)


def _narrow(schemas: dict[str, Any]) -> None:
    chat = schemas["ChatRequest"]["properties"]
    chat["model"] = {"enum": ["hallmark", "hallmark@1"]}
    chat["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 100}
    for needs_more in ("max_completion_tokens", "response_format", "tools", "tool_choice", "metadata"):
        del chat[needs_more]
    chat["messages"]["maxItems"] = 4
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    schemas["Message"] = {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "user"]},
            "content": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": part}]},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    }
    schemas["RetrievalOptionsFilter"] = schemas["SearchRequestFilter"]
    schemas["EmbeddingRequest"]["properties"]["model"] = {"enum": ["hashing", "all-minilm-l6-v2"]}
    schemas["EmbeddingRequest"]["properties"]["dimensions"] = {"enum": [64, None]}


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    log = BytesIO()
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path / "data", engine_url=tgi.url, log_stream=log) as service,
        service.client() as client,
    ):
        # It is made when it is first asked for, and a busy machine may take longer than schemathesis waits.
        assert (await client.get("/openapi.json", timeout=60)).status_code == 200
        yield Target(tgi, service, Api(client, "default", service.key), tmp_path, log)
    failed = [line for line in log.getvalue().splitlines() if b'"level":"ERROR"' in line]
    assert not failed, failed[0][:2_000]


@pytest.mark.parametrize(
    "operations", [MAIN, pytest.param((), marks=[pytest.mark.long, pytest.mark.timeout(1800)])], ids=["main", "all"]
)
async def test_edge_cases_of_every_field_get_what_is_described(target: Target, operations: tuple[str, ...]) -> None:
    chosen = [option for each in operations for option in ("--include-operation-id", each)]
    await target.fuzz(f"{target.service.url}/openapi.json", "--phases", "coverage", *chosen)
    routes = {route for route, _ in target.answered()}
    assert {"/v1/chat/completions", "/v1/documents", "/v1/search", "/v1/embeddings", "/v1/predictions"} <= routes


async def test_random_requests_with_real_names_get_what_is_described(target: Target) -> None:
    await target.fuzz(await target.with_real_names(), "--phases", "fuzzing", *POSITIVE, "--max-examples", "10")
    answered = target.answered()
    for route in ("/v1/chat/completions", "/v1/search", "/v1/embeddings", "/v1/documents/{document_id}/passages/{n}"):
        assert answered[route, 200] > 1, route


@pytest.mark.long  # Quick tests of the door ask every route once without a key.
@pytest.mark.timeout(1800)
async def test_without_a_key_every_route_but_the_open_ones_is_closed(target: Target) -> None:
    source = f"{target.service.url}/openapi.json"
    checks = f"not_a_server_error,{CONFORMANCE}"
    await target.fuzz(source, "--phases", "coverage", *POSITIVE, checks=checks, key=False)
    succeeded = {route for route, status in target.answered() if status < 400}
    assert succeeded <= {"/openapi.json", "/healthz", "/readyz", "unmatched"}


async def test_an_engine_that_fails_in_every_way_gets_the_statuses_and_events_described(target: Target) -> None:
    failures = cycle(
        (
            Drop,
            Drop,  # The first may have met a kept connection, for which there is a second try.
            Refuse.failed,
            Refuse.overloaded,
            Refuse.too_long,
            lambda: Tokens("A hallmark", " is", fail_after=1),
            lambda: Tokens("A hallmark", " is", cut_after=1),
            lambda: Reply(b"<html></html>", content_type="text/html"),
            lambda: Tokens("A hallmark", " is"),
        )
    )
    source = await target.with_real_names()
    target.tgi.default = lambda body: next(failures)()
    options = ("--include-operation-id", "create_chat_completion", "--phases", "fuzzing")
    await target.fuzz(
        source,
        *options,
        *POSITIVE,
        "--max-examples",
        "120",
        checks=f"{CONFORMANCE},response_headers_conformance",
    )
    statuses = {status for route, status in target.answered() if route == CHAT}
    assert statuses >= {200, 400, 429, 502, 503}


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_many_random_requests_get_what_is_described(target: Target) -> None:
    source = f"{target.service.url}/openapi.json"
    await target.fuzz(source, "--phases", "examples,coverage,fuzzing", "--max-examples", "30")
    await target.fuzz(await target.with_real_names(), "--phases", "coverage,fuzzing", *POSITIVE, "--max-examples", "30")
    await target.fuzz(source, "--phases", "stateful", "--max-examples", "30")
