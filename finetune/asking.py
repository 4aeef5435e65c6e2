"""Asking a served model over OpenAI's API, so that what is measured is what is served.

The main rule: a question is asked until it is answered or refused for good. Being told to wait is no failure; an
answer that does not come is one, and is counted. What is wrong with all questions alike ends the evaluation.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec

from finetune.dataset import Manifest, Row
from finetune.errors import Unreachable
from finetune.evaluations import Arm
from finetune.prompts import asked
from finetune.scoring import Answer, Citation

ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 30.0
WRONG_FOR_ALL = frozenset({400, 401, 403, 404, 405, 422})
"""Statuses that say what the first question already shows: the key, the model or the request is wrong."""

Sleep = Callable[[float], None]


def ask_all(
    arm: Arm, rows: Sequence[Row], manifest: Manifest, *, key: str | None, concurrency: int, sleep: Sleep = time.sleep
) -> Iterator[Answer]:
    """Ask an arm all rows, a few at a time, and give the answers in the rows' order.

    Raises:
        Unreachable: nothing answers there, or it refuses the key, the model or the request.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency)
    with (
        httpx.Client(base_url=arm.url, headers=headers, timeout=arm.timeout_seconds, limits=limits) as client,
        ThreadPoolExecutor(concurrency, thread_name_prefix="ask") as pool,
    ):
        if rows:
            yield _ask(client, arm, rows[0], manifest, sleep)  # Alone, so that a wrong key is said once.
        try:
            yield from pool.map(lambda row: _ask(client, arm, row, manifest, sleep), rows[1:])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def request_body(arm: Arm, row: Row, manifest: Manifest) -> dict[str, Any]:
    """What is sent for a row."""
    body: dict[str, Any] = {
        "model": arm.model,
        "messages": [
            {"role": each.role, "content": each.content} for each in asked(row, arm.prompt, manifest, bare=arm.bare)
        ],
        "max_tokens": arm.max_tokens,
        "temperature": 0,
    }
    if arm.retrieval is not None:
        body["retrieval"] = {"mode": arm.retrieval}
    if arm.choices:
        body["structured_outputs"] = {"choice": list(manifest.labels)}
    return body


def _ask(client: httpx.Client, arm: Arm, row: Row, manifest: Manifest, sleep: Sleep) -> Answer:
    body, failure = request_body(arm, row, manifest), "unreachable"
    for attempt in range(ATTEMPTS):
        started = time.perf_counter()
        try:
            response = client.post("/chat/completions", json=body)
        except httpx.TimeoutException:
            failure = "timeout"
            continue
        except httpx.TransportError as error:
            if attempt == ATTEMPTS - 1:
                raise Unreachable(f"{arm.name}: {arm.url} does not answer ({error}); is it running?") from error
            sleep(2.0**attempt)
            continue
        if response.status_code == httpx.codes.OK:
            return _answer(row, response, time.perf_counter() - started)
        failure = _code(response)
        if response.status_code in WRONG_FOR_ALL:
            raise Unreachable(f"{arm.name}: {arm.url} refuses with {response.status_code}: {_message(response)}")
        if response.status_code not in (429, 503):
            break
        sleep(_wait_seconds(response, attempt))
    return Answer(row=row.row, failure=failure)


def _answer(row: Row, response: httpx.Response, seconds: float) -> Answer:
    try:
        body = response.json()
        usage, verdict = body.get("usage") or {}, body.get("verdict")
        return Answer(
            row=row.row,
            text=body["choices"][0]["message"]["content"] or "",
            seconds=seconds,
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            citations=tuple(msgspec.convert(each, Citation) for each in body.get("citations") or ()),
            abstained=verdict["abstained"] if verdict else None,
            release=response.headers.get("x-release"),
        )
    except (ValueError, KeyError, IndexError, TypeError, msgspec.ValidationError):
        return Answer(row=row.row, failure="unreadable", seconds=seconds)


def _wait_seconds(response: httpx.Response, attempt: int) -> float:
    told = response.headers.get("retry-after", "")
    return min(LONGEST_WAIT_SECONDS, float(told) if told.isdecimal() else 2.0**attempt)


def _code(response: httpx.Response) -> str:
    try:
        found = response.json()
        return str((found["error"] if isinstance(found["error"], dict) else found).get("code") or response.status_code)
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(response.status_code)


def _message(response: httpx.Response) -> str:
    try:
        found = response.json()["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
