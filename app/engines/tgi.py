"""The engine adapter: TGI, and the servers that speak OpenAI's dialect of it (`app.engines.dialects`).

huggingface-hub's AsyncInferenceClient is the designated client. It is kept for its contract - the URL rules, the
headers, the handling of tokens, the shape of the payload - and asked for it once, when an engine is made
(`app.engines.hub`); a test holds our payload equal to the client's. Its transport is not used: in 2.4 a streamed
chat never reuses its connection, leaves 15 KB behind until the client closes, parses a token in 113 us, needs the
machine's hub token replaced by hand and cannot send a header per request; a JSON answer costs 120 us more than the
bytes do. The bytes go over `app.engines.wire`, the payload is encoded once, and answers are decoded in part.

The main rule: an error is raised before the first piece whenever it is known by then, typed as the caller should
see it, whichever disguise the wire gave it (`app.engines.failures`).
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from app.engines import EngineInfo
from app.engines.answers import UNREADABLE, StreamReader, read_answer, read_refusal
from app.engines.connections import Address, Connections
from app.engines.dialects import DIALECTS, Dialect, adapter_name, as_text, payload
from app.engines.facts import Counted, Info, Models, Reranked, described
from app.engines.failures import broken, status_of
from app.engines.hub import chat_request
from app.engines.load import Load, read_load
from app.engines.wire import Response, WireError
from app.errors import EngineGarbage, EngineTimeout, EngineUnavailable, ModelNotFound, ServiceError
from app.messages import Generation, Piece

_MAX_ANSWER_BYTES = 32 * 1024 * 1024
_MAX_REFUSAL_BYTES = 64 * 1024
_LINGER_SECONDS = 0.1
_PROBE_CONNECTIONS = 4
_MAX_QUESTION_CHARACTERS = 4_000
"""Of a question to rate texts by: more than the 256 tokens that the embedded engine reads."""
_CANNOT_RATE = (404, 501)
_LOADED_AFTER_SECONDS = 2.0
"""When an adapter that an engine does not have is looked for next: see `app.adapters`."""
_JSON = b"application/json"
_EVENT_STREAM = b"text/event-stream"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each phase of a call may take.

    `first_token_seconds` runs from the request to a stream's first event, `between_tokens_seconds` from one event
    to the next (keep-alive comments do not count), `answer_seconds` to the end of an answer that is not streamed,
    `probe_seconds` to the end of any other call. `pool_seconds` is how long an answer waits for a connection: short,
    because who is told at once that all are busy can ask elsewhere.
    """

    connect_seconds: float = 5.0
    pool_seconds: float = 0.05
    first_token_seconds: float = 60.0
    between_tokens_seconds: float = 30.0
    answer_seconds: float = 300.0
    probe_seconds: float = 5.0


class TGIEngine:
    """One server reached over HTTP; implements `app.engines.Engine`. The constructor does no I/O.

    Whether it is up is for others to watch (`EnginePool`): by itself it is always asked.

    `adapters` are the LoRA adapters that the server is known to serve: TGI lists them nowhere and answers an unknown
    name from the base model. Servers that list theirs are asked when an unknown name comes up. `model` overrides
    what the dialect calls the base model.
    """

    is_up = True

    def __init__(
        self,
        base_url: str,
        *,
        dialect: str = "tgi",
        token: str | None = None,
        adapters: tuple[str, ...] = (),
        model: str | None = None,
        timeouts: Timeouts = Timeouts(),
        max_connections: int = 128,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"unknown engine dialect {dialect!r}: choose one of {', '.join(DIALECTS)}")
        self.base_url = base_url
        self.dialect: Dialect = DIALECTS[dialect]
        self._timeouts = timeouts
        self._given = tuple(adapters)
        self._listed: tuple[str, ...] = ()
        self._rates = self.dialect.rerank_path is not None
        self._served: object = None
        self._named = model or self.dialect.base_model
        self._base = self._named
        self._pool = Connections(
            Address.of(base_url),
            max_connections=max_connections,
            connect_seconds=timeouts.connect_seconds,
            pool_seconds=timeouts.pool_seconds,
        )
        # Whatever is no answer goes its own way: an engine busy with answers is as ready as before.
        self._probes = Connections(
            Address.of(base_url),
            max_connections=_PROBE_CONNECTIONS,
            connect_seconds=timeouts.connect_seconds,
            pool_seconds=timeouts.probe_seconds,
            max_waiting=max_connections,
        )
        self._prepare_heads(base_url, token)

    def _prepare_heads(self, base_url: str, token: str | None) -> None:
        url, headers = chat_request(base_url, token)
        chat = urlsplit(url)
        self._prefix = chat.path.removesuffix("/chat/completions").removesuffix("/v1")
        self._headers = _lines({"host": chat.netloc.rpartition("@")[2], "accept": "*/*", **headers})
        self._chat_head = _head("POST", chat.path + (f"?{chat.query}" if chat.query else ""), self._headers)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters known to be served: those given, then those the server listed."""
        return tuple(dict.fromkeys(self._given + self._listed))

    def adapter_name(self, adapter: str, digest: str | None) -> str:
        """What the server is to call an adapter with that digest."""
        return adapter_name(self.dialect, adapter, digest)

    async def generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        """Answer as `Engine.generate` promises."""
        model = self._base if generation.adapter is None and self._base else await self._model_for(generation)
        body = _encode(payload(self.dialect, generation, model))
        stops = generation.sampling.stop if self.dialect.leaves_stops else ()
        clock = asyncio.get_running_loop().time
        seconds = self._timeouts.first_token_seconds if generation.stream else self._timeouts.answer_seconds
        deadline = clock() + seconds
        response = await _send(self._pool, _request(self._chat_head, body, generation.traceparent), deadline)
        try:
            if response.status != 200:
                raise self._refused(await _refusal(response, deadline), generation.adapter, generation.adapter_digest)
            if not generation.stream or response.content_type.startswith(_JSON):
                whole = response.arrived(max_bytes=_MAX_ANSWER_BYTES)
                yield [read_answer(whole or await _read(response, deadline, _MAX_ANSWER_BYTES), stops=stops)]
                return
            if not response.content_type.startswith(_EVENT_STREAM):
                raise EngineGarbage("the engine's answer is not an event stream")
            reader = StreamReader(stops=stops, messages=generation.messages)
            while not reader.is_done:
                try:
                    chunk = await response.chunk(deadline)
                except WireError as error:
                    chunk = _end_of(reader, error)
                if pieces := reader.take(chunk):
                    yield pieces
                if reader.failure is not None:
                    raise reader.failure
                if reader.has_progressed:
                    deadline = clock() + self._timeouts.between_tokens_seconds
            if reader.is_over:
                await response.linger(_LINGER_SECONDS)
        finally:
            response.close()

    async def describe(self) -> EngineInfo:
        """Ask the engine what it serves, and learn its base model's name and its adapters on the way."""
        try:
            info, models = Info(), Models()
            if self.dialect.info_path is not None:
                info = _decode(await self._call("GET", self.dialect.info_path), Info)
            if self.dialect.lists_adapters or info.model_id is None:
                models = await self._refresh()
        except EngineUnavailable:
            raise
        except ServiceError as error:
            raise EngineUnavailable("the engine does not say what it serves") from error
        found = described(info, models, self.adapters)
        served = found.model_id, found.revision, found.version
        if served != self._served:  # Which may have a head for ratings where the one before had none.
            self._served, self._rates = served, self.dialect.rerank_path is not None
        return found

    async def count_tokens(self, text: str) -> int:
        """Count the tokens of `text` by the engine's tokenizer, the ones it adds at the ends included.

        A server without a route for it gets an estimate that errs high: a token for every three bytes.
        """
        dialect = self.dialect
        if dialect.tokenize_path is None:
            return len(text.encode()) // 3 + 1
        # TGI fetches what it takes for an image also to count.
        body = {dialect.tokenize_field: as_text(text) if dialect.is_tgi else text}
        if dialect.tokenize_field == "prompt" and self._base:
            body["model"] = self._base
        counted = _decode(await self._call("POST", dialect.tokenize_path, _encode(body)), list[Any] | Counted)
        if isinstance(counted, list):
            return len(counted)
        return counted.count if counted.count is not None else len(counted.tokens)

    async def rate(self, question: str, texts: list[str]) -> list[float] | None:
        """Rate texts as `Engine.rate` promises; a model without a head for it is asked once.

        Of a question that is longer than engines read, only the first part is sent.
        """
        if not texts or not self._rates:
            return None
        body = _encode({"query": question[:_MAX_QUESTION_CHARACTERS], "documents": texts})
        try:
            answer = await self._call("POST", self.dialect.rerank_path or "", body, self._timeouts.first_token_seconds)
        except ServiceError as error:
            if status_of(error) not in _CANNOT_RATE:
                raise
            self._rates = False
            return None
        rated = {each.index: each.relevance_score for each in _decode(answer, Reranked).results}
        if rated.keys() != set(range(len(texts))):
            raise EngineGarbage("the engine rated other texts than it was given")
        return [rated[index] for index in range(len(texts))]

    async def healthy(self) -> bool:
        """Say whether the engine would take work now; never raises."""
        try:
            await self.check()
        except ServiceError:
            return False
        return True

    async def check(self, seconds: float | None = None) -> None:
        """Ask the server whether it would take work; raises what its answer, or its silence, stands for."""
        await self._call("GET", self.dialect.health_path, seconds=seconds)

    async def load(self, seconds: float | None = None) -> Load | None:
        """Read how busy the server says it is; None where it does not say."""
        dialect = self.dialect
        if dialect.running_metric is None or dialect.waiting_metric is None:
            return None
        try:
            page = await self._call("GET", "/metrics", seconds=seconds)
        except ServiceError:
            return None
        return read_load(page, running=dialect.running_metric, waiting=dialect.waiting_metric)

    @property
    def in_flight(self) -> int:
        """How many answers it is at, those that wait for a connection included."""
        return self._pool.busy_connections

    @property
    def heard_at(self) -> float:
        """When anything last came from the server in answer to a generation, on the loop's clock."""
        return self._pool.heard_at

    def give_up_unanswered(self) -> None:
        """End the answers that have been waited for as long as for a stream's first token and brought nothing.

        For an engine that does not answer probes either: one that does may be at work on an answer that comes whole.
        """
        self._pool.give_up(asyncio.get_running_loop().time() - self._timeouts.first_token_seconds)

    async def wait_until_up(self) -> bool:
        """Say at once that there is nothing to wait for: nobody watches one engine by itself (`EnginePool` does)."""
        return False

    async def aclose(self) -> None:
        """Close every connection; answers in flight are interrupted."""
        await self._probes.aclose()
        await self._pool.aclose()

    async def _model_for(self, generation: Generation) -> str:
        dialect, adapter = self.dialect, generation.adapter
        if adapter is not None:
            adapter = self.adapter_name(adapter, generation.adapter_digest)
        if self._base is None or (adapter not in (None, *self.adapters) and dialect.lists_adapters):
            await self._refresh()
        base = self._base or ""
        if adapter is None:
            return base
        if dialect.adapter_model is None:
            raise ModelNotFound(f"a {dialect.name} engine cannot choose an adapter for a request", param="model")
        if adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            unknown = ModelNotFound(f"the engine serves no adapter {adapter!r}; it serves: {known}", param="model")
            raise unknown if dialect.load_path is None else _not_yet(unknown, generation.adapter)
        return dialect.adapter_model.format(base=base, adapter=adapter)

    def _refused(self, error: ServiceError, adapter: str | None, digest: str | None) -> ServiceError:
        """What a refusal means: a name that the server listed, and does not know, is of a process that is gone."""
        if not isinstance(error, ModelNotFound):
            return error
        if adapter is None:
            is_stale = self._named is None
        else:
            is_stale = self.adapter_name(adapter, digest) in self._listed or self.dialect.load_path is not None
        if not is_stale:
            return error
        self._base, self._listed = self._named, ()
        return _not_yet(error, adapter)

    async def _refresh(self) -> Models:
        """Learn the base model's name and the adapters from `/v1/models`, with the base model put first."""
        models: Models = _decode(await self._call("GET", "/v1/models"), Models)
        models.data.sort(key=lambda model: (model.id != self._named, model.parent is not None))
        if not models.data:
            raise EngineUnavailable("the engine serves no model")
        self._base = self._named or models.data[0].id
        if self.dialect.lists_adapters:
            self._listed = tuple(model.id for model in models.data[1:])
        return models

    async def ask(self, path: str, body: Any, seconds: float) -> bytes:
        """Post what is no generation, and give the answer; raises what a refusal stands for."""
        return await self._call("POST", path, _encode(body), seconds)

    async def _call(self, method: str, path: str, body: bytes = b"", seconds: float | None = None) -> bytes:
        """Make a call that is not a generation and return the body; raises what a refusal stands for."""
        seconds = seconds or self._timeouts.probe_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        head = _head(method, self._prefix + path, self._headers)
        try:
            async with asyncio.timeout(seconds):
                response = await _send(self._probes, _request(head, body, None), deadline)
                try:
                    if response.status != 200:
                        raise await _refusal(response, deadline)
                    return await _read(response, deadline, _MAX_ANSWER_BYTES)
                finally:
                    response.close()
        except TimeoutError as error:
            raise EngineTimeout("the engine did not answer in time") from error


def _not_yet(error: ModelNotFound, adapter: str | None) -> EngineUnavailable:
    """Say that a model or adapter will be there: `app.adapters` loads it again, or its new name is asked for."""
    what = "serves another model than before" if adapter is None else f"has not loaded the adapter {adapter!r}"
    told = EngineUnavailable(f"the engine {what}: try again shortly", retry_after_seconds=_LOADED_AFTER_SECONDS)
    told.__cause__ = error
    return told


async def _send(pool: Connections, request: bytes, deadline: float) -> Response:
    try:
        return await pool.exchange(request, deadline)
    except WireError as error:
        raise broken(error, has_begun=False) from error


def _end_of(reader: StreamReader, error: WireError) -> bytes:
    """Take what broke a stream for its end, where only the end mark is missing: an answer with a reason is whole."""
    if not reader.is_finished:
        raise broken(error, has_begun=reader.has_begun) from error
    return b""


async def _read(response: Response, deadline: float, max_bytes: int) -> bytes:
    try:
        return await response.read(deadline, max_bytes=max_bytes)
    except WireError as error:
        raise broken(error, has_begun=False) from error


async def _refusal(response: Response, deadline: float) -> ServiceError:
    try:
        body = await response.beginning(deadline, max_bytes=_MAX_REFUSAL_BYTES)
    except WireError as error:
        raise broken(error, has_begun=False) from error
    return read_refusal(response.status, body, retry_after=response.retry_after.decode("latin-1"))


def _decode(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except UNREADABLE as error:
        raise EngineGarbage("the engine's answer is not the protocol's JSON") from error


def _head(method: str, target: str, header_lines: bytes) -> bytes:
    return f"{method} {target} HTTP/1.1\r\n".encode("ascii") + header_lines


def _lines(headers: dict[str, str]) -> bytes:
    if any("\r" in value or "\n" in value for value in headers.values()):
        raise ValueError("an engine's URL and token hold no line breaks")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")


def _request(head: bytes, body: bytes, traceparent: str | None) -> bytes:
    if traceparent is not None and traceparent.isascii() and traceparent.isprintable():
        return b"%btraceparent: %b\r\ncontent-length: %d\r\n\r\n%b" % (head, traceparent.encode(), len(body), body)
    return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
