"""What routes share: the caller that the door let in, the service's parts, and the errors a route may answer with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from app.access import Caller
from app.adapters import Adapters
from app.alerts import Alerts, RuleSets
from app.datasets import Datasets
from app.drift import Drift, References
from app.erasure import Erasures
from app.evaluations import Evaluations
from app.features import Features
from app.feedback import FeedbackLog, LabelLog
from app.guards import Trials
from app.lineage import Provenance, Tracer, Uses
from app.links import PassageLinks
from app.predictions import History, PredictionLog
from app.quality import Quality
from app.readiness import Readiness
from app.registry import Registry
from app.review import ReviewQueue
from app.routes.schemas import ErrorEnvelope
from observability.metrics import Metrics
from observability.telemetry import Telemetry
from retrieval.jobs import Ingestion
from retrieval.retriever import Retriever


@dataclass(frozen=True, slots=True)
class Services:
    """The parts that routes call, as the composition root made them."""

    retriever: Retriever
    ingestion: Ingestion
    predictions: PredictionLog
    feedback: FeedbackLog
    labels: LabelLog
    evaluations: Evaluations
    history: History
    provenance: Provenance
    tracer: Tracer
    uses: Uses
    registry: Registry
    adapters: Adapters
    trials: Trials
    review: ReviewQueue
    quality: Quality
    alerts: Alerts
    alert_rules: RuleSets
    datasets: Datasets
    drift: Drift
    features: Features
    drift_references: References
    erasures: Erasures
    defaults: Mapping[str, Any]
    """What a release has where its file leaves it out."""
    links: PassageLinks
    telemetry: Telemetry
    metrics: Metrics
    readiness: Readiness
    embedding_names: Callable[[], tuple[str, ...]]
    """What the embedding model may be called: the name in the settings, and its full id."""
    collection: str
    max_document_bytes: int
    public_url: str | None
    open_metrics: bool


_MEANINGS = {
    400: "The request breaks a rule; the message names the field and the fix.",
    401: "No valid API key.",
    403: "The key lacks the scope this route needs.",
    404: "It does not exist, or not for this tenant.",
    405: "The path does not take this method.",
    409: "It collides with what is there: read it and decide again.",
    410: "It was replaced by another version.",
    413: "Larger than a limit allows.",
    415: "A media type that is not read.",
    422: "The file holds no text that can be read, or nothing is known of a feature that is required.",
    429: "Overloaded; see Retry-After.",
    500: "A defect of ours.",
    502: "The engine failed.",
    503: "Something this needs is down; see Retry-After.",
    504: "The engine did not answer in time.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for its description; 401, 403 and 500 go without saying."""
    return {
        status: {"model": ErrorEnvelope, "description": _MEANINGS[status]}
        for status in sorted({400, 401, 403, 500, *statuses})
    }


def caller_of(request: Request) -> Caller:
    """Who sent the request, as the door found out."""
    caller: Caller = request.state.caller
    return caller


def own_address(request: Request) -> str:
    """The address the client used for the service."""
    return str(request.base_url).rstrip("/")


def services_of(request: Request) -> Services:
    """The service's parts."""
    services: Services = request.app.state.services
    return services


CallerDep = Annotated[Caller, Depends(caller_of)]
ServicesDep = Annotated[Services, Depends(services_of)]
