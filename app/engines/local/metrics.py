"""The engine's counters under TGI's names, so that a dashboard or router made for TGI reads them unchanged.

Main rule: written by hand because prometheus-client appends `_total` to a counter's name, which TGI's lack.
"""

import threading
from collections import Counter
from itertools import accumulate

# TGI's own buckets for durations in seconds.
DURATION_BUCKETS = tuple(accumulate([0.00015] + [1.5] * 34, lambda bound, factor: bound * factor))
LENGTH_BUCKETS = tuple(float(2**power) for power in range(14))


class Histogram:
    """Counts of values by upper bound, in the exposition format."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        at = next((index for index, bound in enumerate(self._buckets) if value <= bound), len(self._buckets))
        self._counts[at] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """Render under `name`."""
        bounds = [*(repr(bound) for bound in self._buckets), "+Inf"]
        rows = zip(bounds, accumulate(self._counts), strict=True)
        return [
            f"# TYPE {name} histogram",
            *(f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in rows),
            f"{name}_sum {self._sum}",
            f"{name}_count {sum(self._counts)}",
        ]


class Metrics:
    """What the engine counts; written by the engine thread and the event loop, hence the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received = 0
        self._succeeded = 0
        self._failed: Counter[str] = Counter()
        self._durations = {
            name: Histogram(DURATION_BUCKETS)
            for name in ("", "_queue", "_inference", "_mean_time_per_token")  # The empty one is the whole request.
        }
        self._lengths = {name: Histogram(LENGTH_BUCKETS) for name in ("input_length", "generated_tokens")}

    def received(self) -> None:
        """Count a request."""
        with self._lock:
            self._received += 1

    def failed(self, kind: str) -> None:
        """Count a failure under TGI's label: overloaded, validation, template, generation or dropped."""
        with self._lock:
            self._failed[kind] += 1

    def finished(self, *, queue_seconds: float, inference_seconds: float, tokens: int, prompt_tokens: int) -> None:
        """Count a finished generation."""
        with self._lock:
            self._succeeded += 1
            self._durations[""].add(queue_seconds + inference_seconds)
            self._durations["_queue"].add(queue_seconds)
            self._durations["_inference"].add(inference_seconds)
            self._durations["_mean_time_per_token"].add(inference_seconds / max(1, tokens))
            self._lengths["input_length"].add(prompt_tokens)
            self._lengths["generated_tokens"].add(tokens)

    def render(self, *, queue_size: int, batch_size: int) -> str:
        """Write everything in Prometheus' text format."""
        with self._lock:
            lines = [
                "# TYPE tgi_queue_size gauge",
                f"tgi_queue_size {queue_size}",
                "# TYPE tgi_batch_current_size gauge",
                f"tgi_batch_current_size {batch_size}",
                "# TYPE tgi_request_count counter",
                f"tgi_request_count {self._received}",
                "# TYPE tgi_request_success counter",
                f"tgi_request_success {self._succeeded}",
                "# TYPE tgi_request_failure counter",
                *(f'tgi_request_failure{{err="{kind}"}} {count}' for kind, count in sorted(self._failed.items())),
            ]
            for name, histogram in self._durations.items():
                lines += histogram.lines(f"tgi_request{name}_duration")
            for name, histogram in self._lengths.items():
                lines += histogram.lines(f"tgi_request_{name}")
        return "\n".join(lines) + "\n"
