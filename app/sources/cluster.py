"""A folder or bucket whose documents are read, cut and embedded on a Ray cluster.

The main rule: a node makes what the service would make, by the same functions, and the service alone writes it. Neither
its address nor its key is known on the cluster; what comes from there is sent on by who runs the command.
"""

import asyncio
import hashlib
import logging
import socket
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, cast

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from app.errors import InvalidRequest
from app.sources.opening import open_source
from app.sources.source import Content, FileFailure, Source, SourceFailure
from retrieval.cutting import cut
from retrieval.embedder import embedder_of_model, token_counter
from retrieval.errors import RetrievalError
from retrieval.parsers import Parser, media_type_of
from retrieval.preparing import PREPARED, Prepared
from retrieval.splitting import split

_CONNECT_SECONDS = 5.0
_DOCUMENTS_PER_TASK = 16
_READING_CPUS = 0.5
"""Of a processor, for whoever reads and cuts: embedding takes twenty times as long."""
_HEAD = "node:__internal_head__"
"""A resource that the first node of a cluster has beside its own."""
Row = dict[str, Any]
"""A document on its way: its `name`, `data`, `etag`, `media_type`, the `nodes` it was on, the `error` that ended it."""

Step = Callable[[Row], Row]


@dataclass(frozen=True, slots=True)
class Plan:
    """What documents are made ready for: an index version, by its facts, and what the service has already."""

    index_version: str
    embedding_model: str
    passage_tokens: int
    known: Mapping[str, str] = field(default_factory=dict)
    """Versions of documents by their names: what is there as it is needs nothing made."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to the cluster at `host:port`, or that of this machine by `auto`, until the block ends.

    Raises:
        InvalidRequest: It is none of them.
        SourceFailure: No cluster answers there.
    """
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and "/" not in host and port.isdecimal()):
        raise InvalidRequest(
            f"--ray {address!r}: run the command on a machine of the cluster, and give host:6379 or auto."
        )
    for talker in ("ray", "ray.data"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    try:
        if host:  # Ray itself goes on trying for minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise SourceFailure(f"No Ray cluster answers at {address!r}: {str(error).splitlines()[0][:200]}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # They are sent on in the order in which they are asked for.
    try:
        yield
    finally:
        ray.shutdown()


class ClusterSource:
    """A place whose documents come prepared; between `connected`."""

    def __init__(self, address: str, place: Source, plan: Plan) -> None:
        """`address` is where `place` is: every node has to find the same there."""
        self._address = address if "://" in address else str(Path(address).resolve())
        self._place = place
        self._plan = plan
        self._turn = Lock()
        self._rows: Iterator[Row] = iter(())
        self._arrived: dict[str, Row] = {}
        self.nodes: set[str] = set()
        """The nodes that have worked on what was read."""

    @property
    def name(self) -> str:
        """The place's own."""
        return self._place.name

    def names(self) -> list[str]:
        """The documents that are there, in order."""
        return self._place.names()

    def manifest(self) -> list[dict[str, str]]:
        """The same, each with what the place knows of it."""
        return self._place.manifest()

    def expect(self, names: Collection[str]) -> None:
        """Have these made ready as they are read, some of them ahead."""
        blocks = max(1, len(names) // _DOCUMENTS_PER_TASK)
        resources: Callable[[], dict[str, float]] = ray.cluster_resources
        cores = int(resources().get("CPU", 1))
        nodes = sum(name.startswith("node:") and name != _HEAD for name in resources())
        reading = ActorPoolStrategy(min_size=1, max_size=nodes)
        most = max(1, cores - nodes)
        embedding = ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(nodes, most))
        rows = (
            ray.data.from_items([{"name": name} for name in names], override_num_blocks=blocks)
            .map(
                cast("Step", Reading),
                fn_constructor_args=(self._address, self._plan),
                compute=reading,
                num_cpus=_READING_CPUS,
            )
            .map(
                cast("Step", Embedding),
                fn_constructor_args=(self._plan.embedding_model,),
                compute=embedding,
                num_cpus=1,
            )
        )
        self._rows = iter(rows.iter_rows())

    def close(self) -> None:
        """Have nothing more made ready."""
        if isinstance(self._rows, Generator):
            self._rows.close()

    def read(self, name: str) -> Content:
        """A prepared document; one that is known as it is, its bytes."""
        with self._turn:
            try:
                while name not in self._arrived:
                    row = next(self._rows)
                    self._arrived[row["name"]] = row
                    self.nodes.update(row["nodes"])
            except StopIteration:
                raise FileFailure("The cluster gave nothing back.") from None
            except RayError as error:
                raise SourceFailure(f"The cluster failed: {str(error).strip().splitlines()[-1][:300]}") from error
            row = self._arrived.pop(name)
        if row["error"]:
            raise FileFailure(row["error"])
        return Content(row["data"], row["etag"], row["media_type"])


class Reading:
    """The first step on a node: a document read, parsed in a process of its own, and cut."""

    def __init__(self, address: str, plan: Plan) -> None:
        self._address = address
        self._plan = plan
        self._opened = ExitStack()
        self._place: Source | None = None
        self._parser = Parser()
        self._count_tokens = token_counter(self._plan.embedding_model)
        self._loop = asyncio.Runner()

    def __call__(self, row: Row) -> Row:
        """Make a document of a name."""
        made = {"name": row["name"], "data": b"", "etag": "", "media_type": "", "nodes": [_node()], "error": ""}
        try:
            content = self._read(row["name"])
            made |= {"data": content.data, "etag": content.etag}
            if hashlib.sha256(content.data).hexdigest() != self._plan.known.get(row["name"]):
                prepared = self._loop.run(self._prepared(row["name"], content.data))
                made |= {"data": prepared.to_bytes(), "media_type": PREPARED}
        except (FileFailure, RetrievalError) as error:
            made["error"] = str(error)
        return made

    def _read(self, name: str) -> Content:
        if self._place is None:
            try:
                self._place = self._opened.enter_context(open_source(self._address))
            except (InvalidRequest, SourceFailure) as error:
                raise FileFailure(f"On a node of the cluster: {error}") from error
        return self._place.read(name)

    async def _prepared(self, name: str, content: bytes) -> Prepared:
        plan = self._plan
        parsed = await self._parser.parse(content, name=name)
        passages = cut(
            split,
            parsed,
            passage_tokens=plan.passage_tokens,
            count_tokens=self._count_tokens,
        )
        return Prepared.of(
            content, media_type_of(content, name=name, media_type=None), plan.index_version, parsed, passages
        )


class Embedding:
    """The second step: its passages' vectors."""

    def __init__(self, model: str) -> None:
        self._loop = asyncio.Runner()
        self._embedder = self._loop.run(embedder_of_model(model).__aenter__())

    def __call__(self, row: Row) -> Row:
        """Embed what is not known as it is, and could be read."""
        if row["error"] or row["media_type"] != PREPARED:
            return row
        try:
            prepared = self._loop.run(Prepared.from_bytes(row["data"], is_embedded=False).embedded(self._embedder))
            return {**row, "data": prepared.to_bytes(), "nodes": [*row["nodes"], _node()]}
        except RetrievalError as error:
            return {**row, "data": b"", "error": str(error)}


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())
