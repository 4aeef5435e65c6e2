"""What is known of drift, for those who want to know: references, the windows that were compared, and alarms.

The main rule: everything is asked for a tenant, and of a tenant nobody but itself learns the ids of its predictions.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any, Literal

import msgspec
from sqlalchemy import Row, select

from app.database import Database, drift_references, drift_streams, drift_windows

Kind = Literal["inputs", "outputs"]
"""What drifts: what is asked, or what is answered."""

KINDS: tuple[Kind, ...] = ("inputs", "outputs")

_s, _r, _w = drift_streams.c, drift_references.c, drift_windows.c


class Cluster(msgspec.Struct, frozen=True):
    """New questions that are alike: in how many sessions, and predictions as examples, the most typical first."""

    sessions: int
    examples: tuple[str, ...]


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of a window's questions: p-values are before, `p_value` is after Holm's correction."""

    p_value: float
    mmd_p: float
    novelty_p: float
    mmd2: float
    novel_share: float
    sessions: int
    """Those whose questions had an embedding."""


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of one thing that answers show: see `observability.shifts.Shift`."""

    name: str
    p_value: float
    """After Holm's correction over all of a window's outputs."""
    effect: float
    at: str | float
    reference: float
    window: float
    sessions: int


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong since a window: two in a row were at or below the level."""

    kind: Kind
    since: int
    """Milliseconds since 1970."""
    window: int
    """The window that raised it."""


class DriftState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether what is asked of a release, or what it answers, has changed."""

    alarm: bool = False
    since: int | None = None
    """Of the oldest alarm, in milliseconds since 1970."""
    kinds: tuple[Kind, ...] = ()
    examples: tuple[str, ...] = ()
    """Predictions of the largest cluster of new questions that was last found, where questions have changed."""
    windows: int = 0
    """How many were compared; with none, nothing is known."""

    @property
    def is_doubtful(self) -> bool:
        """Whether a guess that was learned from earlier questions should be doubted."""
        return "inputs" in self.kinds


UNKNOWN = DriftState()


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """What a release's windows are compared with."""

    version: int
    source: dict[str, Any]
    sessions: int
    questions: int
    embedded: int
    """Questions that have an embedding."""
    created_at: int
    created_by: str


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    inputs: Inputs | None
    outputs: tuple[Output, ...]
    clusters: tuple[Cluster, ...]

    @classmethod
    def nothing(cls) -> "Judged":
        """What is found where nothing can be compared."""
        return cls(inputs=None, outputs=(), clusters=())

    @property
    def p_values(self) -> dict[Kind, float | None]:
        """What to compare with a level, by kind."""
        return {
            "inputs": self.inputs.p_value if self.inputs else None,
            "outputs": min((each.p_value for each in self.outputs), default=None),
        }


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A window that was compared; None stands for what there was too little of to compare."""

    number: int
    reference: int
    first_id: str
    last_id: str
    sessions: int
    questions: int
    level: float
    inputs: Inputs | None
    outputs: tuple[Output, ...]
    clusters: tuple[Cluster, ...]
    judged_at: int


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one release."""

    release: str
    state: DriftState
    alarms: tuple[Alarm, ...]
    open_sessions: int
    """In the window that is being filled."""
    reference: Reference | None
    windows: tuple[Window, ...]
    """The last ones, the newest first."""


class Drift:
    """Answers what the worker has found; asking costs one or two small queries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def state(self, tenant: str, release: str) -> DriftState:
        """Say whether a release, as `name@3`, has drifted for a tenant; `UNKNOWN` where nothing was followed.

        Raises:
            Unavailable: the database does not answer.
        """
        return (await self.states(tenant, [release])).get(release, UNKNOWN)

    async def states(self, tenant: str, releases: Collection[str] | None = None) -> dict[str, DriftState]:
        """Say the same of several releases, by default of all that are followed for the tenant."""
        query = select(drift_streams).where(_s.tenant == tenant)
        if releases is not None:
            query = query.where(_s.release.in_(sorted(releases)))
        async with self._database.reading() as connection:
            streams = (await connection.execute(query)).all()
            examples: dict[str, tuple[str, ...]] = {}
            for stream in streams:
                if any(each.kind == "inputs" for each in alarms_of(stream.alarms)):
                    mine = (_w.tenant == tenant, _w.release == stream.release, _w.clusters != "[]")
                    last = select(_w.clusters).where(*mine)
                    row = (await connection.execute(last.order_by(_w.number.desc()).limit(1))).one_or_none()
                    clusters = clusters_of(row.clusters) if row else ()
                    examples[stream.release] = clusters[0].examples if clusters else ()
        return {row.release: _state(row, examples.get(row.release, ())) for row in streams}

    async def drifted(self, tenant: str, releases: Collection[str]) -> set[str]:
        """Which of these releases are asked other things than before: guesses that were learned then are doubtful."""
        return {name for name, state in (await self.states(tenant, releases)).items() if state.is_doubtful}

    async def followed(self, tenant: str, release: str | None = None, *, windows: int = 20) -> list[Followed]:
        """Tell all that is known of a tenant's releases, or of one, with the last `windows` of each."""
        states = await self.states(tenant, None if release is None else [release])
        query = select(drift_streams).where(_s.tenant == tenant).order_by(_s.release)
        found = []
        async with self._database.reading() as connection:
            for stream in (await connection.execute(query)).all():
                if stream.release not in states:
                    continue
                mine = select(drift_windows).where(_w.tenant == tenant, _w.release == stream.release)
                last = (await connection.execute(mine.order_by(_w.number.desc()).limit(windows))).all()
                of = select(drift_references).where(_r.tenant == tenant, _r.release == stream.release)
                newest = (await connection.execute(of.order_by(_r.version.desc()).limit(1))).one_or_none()
                found.append(
                    Followed(
                        release=stream.release,
                        state=states[stream.release],
                        alarms=alarms_of(stream.alarms),
                        open_sessions=stream.open_sessions,
                        reference=reference_of(newest) if newest else None,
                        windows=tuple(window_of(row) for row in last),
                    )
                )
        return found

    async def counts(self) -> tuple[dict[tuple[str, Kind], int], dict[str, int]]:
        """Count what may be told without naming a tenant.

        Gives for how many tenants a release has an alarm of a kind, and how many windows of it were compared.
        """
        alarmed: Counter[tuple[str, Kind]] = Counter()
        compared: Counter[str] = Counter()
        async with self._database.reading() as connection:
            for row in await connection.execute(select(_s.release, _s.windows, _s.alarms)):
                alarmed.update((row.release, each.kind) for each in alarms_of(row.alarms))
                compared[row.release] += row.windows
        return alarmed, compared


alarms_of = msgspec.json.Decoder(tuple[Alarm, ...]).decode
clusters_of = msgspec.json.Decoder(tuple[Cluster, ...]).decode
_inputs = msgspec.json.Decoder(Inputs).decode
_outputs = msgspec.json.Decoder(tuple[Output, ...]).decode


def reference_of(row: Row[Any]) -> Reference:
    """Read a reference."""
    facts = {name: getattr(row, name) for name in Reference.__struct_fields__}
    return Reference(**{**facts, "source": msgspec.json.decode(row.source)})


def window_of(row: Row[Any]) -> Window:
    """Read a window."""
    facts = {name: getattr(row, name) for name in Window.__struct_fields__}
    read = {
        "inputs": _inputs(row.inputs) if row.inputs else None,
        "outputs": _outputs(row.outputs) if row.outputs else (),
        "clusters": clusters_of(row.clusters),
    }
    return Window(**{**facts, **read})


def _state(row: Row[Any], examples: tuple[str, ...]) -> DriftState:
    alarms = alarms_of(row.alarms)
    return DriftState(
        alarm=bool(alarms),
        since=min((each.since for each in alarms), default=None),
        kinds=tuple(kind for kind in KINDS if any(each.kind == kind for each in alarms)),
        examples=examples,
        windows=row.windows,
    )
