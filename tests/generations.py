"""Spans of engine calls as the service starts them."""

from typing import Any

from observability import genai
from observability.spans import TraceSpan
from observability.traces import RequestTrace


def start_generation(trace: RequestTrace, *, model: str = "m", prediction_id: str = "p", **facts: Any) -> TraceSpan:
    """Start the span of an engine call of which this is known, by default of a TGI and the release `r@1`."""
    facts = {"provider": "tgi", "release": "r@1", **facts}
    return genai.start_generation(
        trace,
        model=model,
        prediction_id=prediction_id,
        tell=lambda: genai.generation_facts(
            trace.conventions.profile, model=model, prediction_id=prediction_id, **facts
        ),
    )
