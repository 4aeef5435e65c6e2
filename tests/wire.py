"""Reads the typed events of a streamed response, each of which says its type twice."""

import json
from typing import Any

import httpx


async def read_events(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask for a stream and read it to its end."""
    response = await client.post("/v1/responses", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *blocks, rest = response.text.split("\n\n")
    assert not rest
    events = []
    for block in blocks:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        event = json.loads(fields["data"])
        assert event["type"] == fields["event"]
        events.append(event)
    return events
