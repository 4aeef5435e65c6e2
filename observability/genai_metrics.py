"""The names of the GenAI metrics in each profile, with the units and the buckets that the conventions ask for.

An observation goes by what it is of; which metrics it goes to, the profile says.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
"""

from collections.abc import Callable, Mapping
from typing import Final

from opentelemetry.metrics import Meter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from observability.spans import Attributes
from observability.traces import Profile

_DURATION_SECONDS: Final = tuple(round(0.01 * 2**power, 2) for power in range(14))
_TOKEN_COUNTS: Final = tuple(4**power for power in range(14))


_TOKENS: Final = "{token}"
# Engines do not say which of the tokens are of an image.
_MODALITY: Final[Attributes] = {"gen_ai.token.modality": "unknown"}
# What is observed: the metric of 1.37 and that of genai-0.1, with the attributes that it has besides.
_METRICS: Final[Mapping[str, tuple[tuple[str, Attributes], tuple[str, Attributes]]]] = {
    "inference": (("gen_ai.client.operation.duration", {}), ("gen_ai.client.inference.duration", {})),
    "first_chunk": (
        ("gen_ai.client.operation.time_to_first_chunk", {}),
        ("gen_ai.client.inference.time_to_first_chunk", {}),
    ),
    "retrieval": (("gen_ai.client.operation.duration", {}), ("gen_ai.client.operation.duration", {})),
    "embeddings": (("gen_ai.client.operation.duration", {}), ("gen_ai.client.embeddings.duration", {})),
    "input_tokens": (
        ("gen_ai.client.token.usage", {gen_ai_attributes.GEN_AI_TOKEN_TYPE: "input"}),
        ("gen_ai.client.inference.usage.input_tokens", _MODALITY),
    ),
    "output_tokens": (
        ("gen_ai.client.token.usage", {gen_ai_attributes.GEN_AI_TOKEN_TYPE: "output"}),
        ("gen_ai.client.inference.usage.output_tokens", _MODALITY),
    ),
}


class Instruments:
    """The metrics of one profile, with the buckets that the conventions ask for."""

    def __init__(self, meter: Meter, profile: Profile) -> None:
        columns = {"1.37": (0,), "genai-0.1": (1,), "both": (0, 1)}[profile]
        self._meter = meter
        self._made: dict[str, Callable[[float | None, Attributes], None]] = {}
        self._of = {
            what: [(self._instrument(name), also) for name, also in dict([named[column] for column in columns]).items()]
            for what, named in _METRICS.items()
        }

    def record(self, what: str, value: float | None, attributes: Attributes) -> None:
        """Take one observation; of None, a count that the engine did not give, histograms know nothing."""
        for observe, also in self._of[what]:
            observe(value, {**attributes, **also})

    def _instrument(self, name: str) -> Callable[[float | None, Attributes], None]:
        if name not in self._made:
            self._made[name] = self._counter(name) if ".usage." in name else self._histogram(name)
        return self._made[name]

    def _counter(self, name: str) -> Callable[[float | None, Attributes], None]:
        counter = self._meter.create_counter(name, _TOKENS, "Tokens as the engine counted them.")
        return lambda value, attributes: counter.add(value or 0, attributes)

    def _histogram(self, name: str) -> Callable[[float | None, Attributes], None]:
        unit, bounds = (_TOKENS, _TOKEN_COUNTS) if name.endswith("token.usage") else ("s", _DURATION_SECONDS)
        histogram = self._meter.create_histogram(name, unit, explicit_bucket_boundaries_advisory=bounds)

        def observe(value: float | None, attributes: Attributes) -> None:
            if value is not None:
                histogram.record(value, attributes)

        return observe
