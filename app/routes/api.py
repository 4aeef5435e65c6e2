"""The FastAPI application: every route but the chat route's own lane, described well enough to make clients of it."""

from collections.abc import Sequence

from fastapi import Depends, FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.rates import RATE_HEADERS
from app.routes import (
    alerts,
    datasets,
    documents,
    drift,
    engine_groups,
    erasures,
    errors,
    features,
    feedback,
    health,
    indexes,
    jobs,
    labels,
    lineage,
    quality,
    reference,
    releases,
    resources,
    responses,
    review,
    rollouts,
    trials,
)
from app.routes.dependencies import Services
from app.routes.description import describe
from app.routes.predictions import routes as prediction_routes


def create_api(version: str, services: Services | None = None) -> FastAPI:
    """Make the FastAPI application: every route but the chat route's own lane, and the description of all.

    Without services it can only be described: that is how the API's file is written.
    """
    telemetry: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
    if services is not None:
        telemetry = {
            "tracer_provider": services.telemetry.tracer_provider,
            "meter_provider": services.telemetry.meter_provider,
            "operation_spans": False,
            "logs": False,  # FastAPI's log events carry exception messages, and those can quote content.
            "auto_configure": False,
        }
    api = FastAPI(
        title="Hallmark",
        version=version,
        summary="Answers from your own engine, cited, and stamped with the release that made them.",
        telemetry=telemetry,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    api.state.services = services
    # What others defined takes what they add to it.
    lenient = (resources.routes, responses.routes, health.routes)
    routers = (
        documents.routes,
        jobs.routes,
        indexes.routes,
        documents.search_routes,
        resources.routes,
        responses.routes,
        feedback.routes,
        labels.routes,
        prediction_routes,
        lineage.routes,
        review.routes,
        quality.routes,
        alerts.routes,
        datasets.routes,
        erasures.routes,
        features.routes,
        drift.routes,
        engine_groups.routes,
        releases.routes,
        rollouts.routes,
        trials.routes,
        health.routes,
    )
    strict = [Depends(errors.refuse_unknown_parameters)]
    for router in routers:
        api.include_router(router, dependencies=[] if router in lenient else strict)
    errors.install(api, routers)
    reference.install(api)
    describe(api)
    return api


def for_browsers(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let web pages of these origins call the service; a key is theirs to send, and no cookie is ever read."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-prediction-id", "x-request-id", "x-release", "retry-after", *RATE_HEADERS),
    )
