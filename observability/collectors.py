"""What the metrics are made of: a histogram and a counter without locks, and values read when Prometheus asks."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from time import time
from typing import NamedTuple, Protocol

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

MAX_ALERT_RELEASES = 50
"""Releases with alerts of their own on `/metrics`; those of others are counted together."""


class Outbox(Protocol):
    """What waits to be moved into the shared database."""

    rows: int

    @property
    def lag_seconds(self) -> float:
        """The age of the oldest that waits."""
        ...


class IngestionQueue(Protocol):
    """What was accepted and is not ingested yet."""

    @property
    def waiting_documents(self) -> int:
        """Uploads."""
        ...

    @property
    def waiting_bytes(self) -> int:
        """Their size."""
        ...

    @property
    def open_jobs(self) -> Mapping[str, int]:
        """Jobs that have not ended, by their state."""
        ...


class Timings:
    """What one child of a histogram has seen: how many values each bucket took, and their sum."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # The last is for what no bound holds.
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class LoopHistogram(Collector):
    """A histogram for the event loop's thread alone, which needs no lock: an observation costs a fifth."""

    def __init__(self, name: str, documentation: str, bounds: tuple[float, ...], *labels: str) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = bounds
        self._label_names = labels
        self._children: dict[tuple[str, ...], Timings] = {}
        if not labels:
            self.labels()

    def labels(self, *values: str) -> Timings:
        """The child of these labels, made at its first use."""
        found = self._children.get(values)
        if found is None:
            found = self._children[values] = Timings(self._bounds)
        return found

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for values, timings in list(self._children.items()):
            # Prometheus wants how many were at most as large as each bound.
            buckets = list(zip(names, accumulate(timings.counts), strict=True))
            family.add_metric(values, buckets, timings.total)
        yield family


class Count:
    """What one child of a counter has counted, and since when."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.created = time()

    def inc(self, amount: float = 1.0) -> None:
        """Count."""
        self.value += amount


class LoopCounter(Collector):
    """A counter for the event loop's thread alone, which needs no lock: counting costs a tenth."""

    def __init__(self, name: str, documentation: str, *labels: str) -> None:
        self._name = name
        self._documentation = documentation
        self._label_names = labels
        self._children: dict[tuple[str, ...], Count] = {}

    def labels(self, *values: str) -> Count:
        """The child of these labels, made at its first use."""
        found = self._children.get(values)
        if found is None:
            found = self._children[values] = Count()
        return found

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._label_names)
        for values, count in list(self._children.items()):
            family.add_metric(values, count.value, created=count.created)
        yield family


class EngineSample(NamedTuple):
    """How one engine of a group stands when Prometheus asks."""

    engine: str
    member: str
    state: str
    """`closed`, `half_open` or `open`, as its breaker is."""
    in_flight: int
    waiting: float | None
    ejections: int


class GroupSample(NamedTuple):
    """How a group of engines stands when Prometheus asks."""

    engine: str
    failovers: int
    start_seconds: float
    waiting: int
    members: Sequence[EngineSample]


class Engines(Collector):
    """The engines, as whoever watches them knows them when Prometheus asks."""

    def __init__(self) -> None:
        self.read: Callable[[], Sequence[GroupSample]] = tuple

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        labels = ("engine", "member")
        up = GaugeMetricFamily("hallmark_engine_up", "1 when requests are sent to the engine.", labels=labels)
        state = GaugeMetricFamily(
            "hallmark_engine_state", "1 for the state its breaker is in.", labels=(*labels, "state")
        )
        in_flight = GaugeMetricFamily("hallmark_engine_in_flight", "Our requests at the engine.", labels=labels)
        queue = GaugeMetricFamily("hallmark_engine_queue", "Its queue as the engine reports it.", labels=labels)
        ejections = CounterMetricFamily("hallmark_engine_ejections", "Times the engine was put out.", labels=labels)
        failovers = CounterMetricFamily(
            "hallmark_engine_failovers", "Requests sent to another engine of the group.", labels=("engine",)
        )
        start = GaugeMetricFamily(
            "hallmark_engine_start_seconds", "What a start of the engine takes, as measured.", labels=("engine",)
        )
        waiting = GaugeMetricFamily(
            "hallmark_engine_waiting_room", "Requests waiting for the engine to come up.", labels=("engine",)
        )
        for group in self.read():
            failovers.add_metric((group.engine,), group.failovers)
            start.add_metric((group.engine,), group.start_seconds)
            waiting.add_metric((group.engine,), group.waiting)
            for each in group.members:
                names = (each.engine, each.member)
                up.add_metric(names, float(each.state == "closed"))
                state.add_metric((*names, each.state), 1.0)
                in_flight.add_metric(names, each.in_flight)
                ejections.add_metric(names, each.ejections)
                if each.waiting is not None:
                    queue.add_metric(names, each.waiting)
        yield from (up, state, in_flight, queue, ejections, failovers, start, waiting)


class QualitySample(NamedTuple):
    """One figure of a release, a share from 0 to 1, as it was last computed."""

    release: str
    figure: str
    value: float | None
    low: float | None
    high: float | None
    answers: int


class Qualities(Collector):
    """How good the serving releases' answers are, as it was last computed."""

    def __init__(self) -> None:
        self.samples: Sequence[QualitySample] = ()
        self.computed_at_seconds = 0.0

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        labels = ("release", "figure")
        value = GaugeMetricFamily(
            "hallmark_quality", "A share of the last day's answers: 0.1 of them abstained, say.", labels=labels
        )
        low = GaugeMetricFamily("hallmark_quality_low", "The lower end of its 95 % interval.", labels=labels)
        high = GaugeMetricFamily("hallmark_quality_high", "The upper end of its 95 % interval.", labels=labels)
        answers = GaugeMetricFamily("hallmark_quality_answers", "The answers it rests on.", labels=labels)
        computed = GaugeMetricFamily(
            "hallmark_quality_timestamp_seconds",
            "When these were computed, in seconds since 1970; 0 while they never were.",
        )
        for sample in self.samples:
            names = (sample.release, sample.figure)
            answers.add_metric(names, sample.answers)
            for family, number in ((value, sample.value), (low, sample.low), (high, sample.high)):
                if number is not None:
                    family.add_metric(names, number)
        computed.add_metric((), self.computed_at_seconds)
        yield from (value, low, high, answers, computed)


class AlertSample(NamedTuple):
    """How many alerts of one kind there are of a release."""

    kind: str
    severity: str
    state: str
    """`pending` or `firing`."""
    release: str
    alerts: int


class AlertTally(NamedTuple):
    """The alerts that are not resolved, and how telling people of them stands."""

    samples: Sequence[AlertSample]
    waiting: int
    dead: int
    evaluated_at_seconds: float | None


class AlertStates(Collector):
    """The alerts of the deployment, as they were last read."""

    def __init__(self) -> None:
        self.tally: AlertTally | None = None

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        names = ("kind", "severity", "state", "release")
        active = GaugeMetricFamily("hallmark_alerts", "Alerts that are pending or firing.", labels=names)
        told = GaugeMetricFamily(
            "hallmark_alert_notifications",
            "Notifications that wait for the webhook, or were given up.",
            labels=("state",),
        )
        evaluated = GaugeMetricFamily(
            "hallmark_alerts_timestamp_seconds", "When a worker last looked at all rules, in seconds since 1970."
        )
        tally = self.tally
        if tally is not None:
            counts: dict[tuple[str, str, str, str], int] = {}
            releases = sorted({sample.release for sample in tally.samples})[:MAX_ALERT_RELEASES]
            for sample in tally.samples:
                release = sample.release if sample.release in releases else "other"
                key = (sample.kind, sample.severity, sample.state, release)
                counts[key] = counts.get(key, 0) + sample.alerts
            for key, count in counts.items():
                active.add_metric(key, count)
            told.add_metric(("waiting",), tally.waiting)
            told.add_metric(("dead",), tally.dead)
            if tally.evaluated_at_seconds is not None:
                evaluated.add_metric((), tally.evaluated_at_seconds)
        yield from (active, told, evaluated)


class DriftSample(NamedTuple):
    """How a serving release stands: windows compared for all tenants, and tenants with an alarm by kind."""

    release: str
    windows: int
    alarms: Mapping[str, int]


class Drifts(Collector):
    """Whether questions or answers of the serving releases have changed, as a worker last found."""

    def __init__(self) -> None:
        self.samples: Sequence[DriftSample] = ()

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        alarms = GaugeMetricFamily(
            "hallmark_drift_alarms",
            "Tenants for whom a release's inputs or outputs have drifted.",
            labels=("release", "kind"),
        )
        windows = GaugeMetricFamily(
            "hallmark_drift_windows", "Windows of a release that were compared, of all tenants.", labels=("release",)
        )
        for sample in self.samples:
            windows.add_metric((sample.release,), sample.windows)
            for kind, count in sample.alarms.items():
                alarms.add_metric((sample.release, kind), count)
        yield from (alarms, windows)


class Observed(Collector):
    """Values that live elsewhere and are read when Prometheus asks."""

    def __init__(self) -> None:
        self.sources: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, Callable[[], float]]] = {}
        self.waiting: Callable[[], Mapping[str, int]] = dict
        self.jobs: Callable[[], Mapping[str, int]] = dict

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        documentation = "Chat requests that wait for a place among the answers in flight."
        waiting = GaugeMetricFamily("hallmark_queue_depth", documentation, labels=("priority",))
        for priority, count in self.waiting().items():
            waiting.add_metric((priority,), count)
        yield waiting
        jobs = GaugeMetricFamily("hallmark_ingestion_jobs", "Ingestion jobs that have not ended.", labels=("state",))
        for state, count in self.jobs().items():
            jobs.add_metric((state,), count)
        yield jobs
        for name, (family, documentation, read) in self.sources.items():
            yield family(name, documentation, value=read())
