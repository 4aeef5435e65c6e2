"""Asking a served model over OpenAI's API, so that what is measured is what is served.

The main rule: a question is asked until it is answered or refused for good. Being told to wait is no failure; an
answer that does not come is one, and is counted. What is wrong with all questions alike ends the evaluation; what is
wrong with one of them, which is too long for the engine, say, is a failure of that one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx
import msgspec

from finetune.dataset import Manifest, Row
from finetune.errors import Unreachable
from finetune.evaluations import Arm
from finetune.prompts import asked
from finetune.scoring import Answer, Citation

ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 30.0
WRONG_FOR_ALL = frozenset({401, 403, 404, 405})
"""Statuses that say what the first question already shows: the key or the model is wrong."""
REFUSED = frozenset({400, 422})
"""Statuses that say that a request is wrong: all of them, or one row's."""
REFUSED_FIRST = 3
"""So many first rows, all refused, show that it is the arm that is wrong, and not the rows."""

Sleep = Callable[[float], None]


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Verdict(msgspec.Struct, frozen=True):
    abstained: bool | None = None


class _Reply(msgspec.Struct, frozen=True):
    """What of a completion is needed here."""

    choices: Annotated[tuple[_Choice, ...], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None
    citations: tuple[Citation, ...] | None = None
    verdict: _Verdict | None = None


def ask_all(
    arm: Arm, rows: Sequence[Row], manifest: Manifest, *, key: str | None, concurrency: int, sleep: Sleep = time.sleep
) -> Iterator[Answer]:
    """Ask an arm all rows, a few at a time, and give the answers in the rows' order.

    Raises:
        Unreachable: nothing answers there, or it refuses the key, the model or the first requests.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency)
    with (
        httpx.Client(base_url=arm.url, headers=headers, timeout=arm.timeout_seconds, limits=limits) as client,
        ThreadPoolExecutor(concurrency, thread_name_prefix="ask") as pool,
    ):

        def ask(row: Row) -> tuple[Answer, str | None]:
            return _ask(client, arm, row, manifest, sleep)

        asked_alone, refusal = 0, None
        for row in rows[:REFUSED_FIRST]:  # Alone, so that a wrong key is said once.
            answer, refusal = ask(row)
            asked_alone += 1
            if refusal is None or asked_alone < min(REFUSED_FIRST, len(rows)):
                yield answer
            if refusal is None:
                break
        if refusal is not None:
            raise Unreachable(refusal)
        try:
            yield from (answer for answer, _ in pool.map(ask, rows[asked_alone:]))
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


def _ask(client: httpx.Client, arm: Arm, row: Row, manifest: Manifest, sleep: Sleep) -> tuple[Answer, str | None]:
    """The answer to a row, and how the server refused the request, if it did."""
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
            return _answer(row, response, time.perf_counter() - started), None
        failure = _code(response)
        refusal = f"{arm.name}: {arm.url} refuses with {response.status_code}: {_message(response)}"
        if response.status_code in WRONG_FOR_ALL:
            raise Unreachable(refusal)
        if response.status_code in REFUSED:
            return Answer(row=row.row, failure=failure), refusal
        if response.status_code not in (429, 503):
            break
        sleep(_wait_seconds(response, attempt))
    return Answer(row=row.row, failure=failure), None


def _answer(row: Row, response: httpx.Response, seconds: float) -> Answer:
    try:
        reply = msgspec.json.decode(response.content, type=_Reply)
    except (msgspec.DecodeError, RecursionError):
        return Answer(row=row.row, failure="unreadable", seconds=seconds)
    usage = reply.usage or _Usage()
    return Answer(
        row=row.row,
        text=reply.choices[0].message.content or "",
        seconds=seconds,
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        citations=reply.citations or (),
        abstained=reply.verdict.abstained if reply.verdict else None,
        release=response.headers.get("x-release"),
    )


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
