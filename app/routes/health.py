"""Liveness, readiness that tells the truth, and `/metrics`."""

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from app.routes.dependencies import ServicesDep, errors
from app.routes.schemas import Health

routes = APIRouter(tags=["health"])


@routes.get("/healthz", operation_id="health")
async def health() -> Health:
    """Say that the process is alive; needs no key and asks nobody."""
    return Health(status="ok")


@routes.get(
    "/readyz",
    operation_id="readiness",
    responses={503: {"model": Health, "description": "A part this service needs is not ready."}},
)
async def readiness(services: ServicesDep, response: Response) -> Health:
    """Say whether an answer could be given and recorded now; `checks` names each part and what is wrong with it."""
    problems, notes = await services.readiness.problems(), await services.readiness.notes()
    is_ready = not any(problems.values())
    response.status_code = 200 if is_ready else 503
    return Health(
        status="ok" if is_ready else "unready",
        checks={name: problem or notes.get(name, "ok") for name, problem in problems.items()},
    )


@routes.get(
    "/metrics",
    operation_id="metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors()},
)
async def read_metrics(services: ServicesDep, request: Request) -> Response:
    """Give the metrics to Prometheus; needs a key with the scope `metrics` unless the settings open it."""
    if not services.open_metrics:
        request.state.caller.require("metrics")
    body, content_type = await run_in_threadpool(services.metrics.render, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
