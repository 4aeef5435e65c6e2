"""What can be asked about the service and its work: models, embeddings, predictions, identity."""

import base64
from typing import Annotated
from uuid import UUID

import msgspec
from fastapi import APIRouter, Path, Query, Response

from app.errors import InvalidRequest, ModelNotFound, NotFound
from app.releases import Release
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.schemas import (
    EmbeddingObject,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    IdentityObject,
    ModelList,
    ModelObject,
    PredictionList,
    PredictionObject,
)
from observability import genai

routes = APIRouter()


@routes.get("/v1/models", operation_id="list_models", tags=["models"], responses=errors())
async def list_models(services: ServicesDep, caller: CallerDep) -> ModelList:
    """List the releases that serve, by the names to ask for them."""
    caller.require("chat")
    return ModelList(data=[_model(release) for release in services.registry.releases.serving])


@routes.get("/v1/models/{model}", operation_id="get_model", tags=["models"], responses=errors(404))
async def get_model(
    services: ServicesDep, caller: CallerDep, model: Annotated[str, Path(max_length=256)]
) -> ModelObject:
    """Describe the release behind a name."""
    caller.require("chat")
    return _model(services.registry.releases.resolve(model).release, model)


@routes.post("/v1/embeddings", operation_id="create_embeddings", tags=["models"], responses=errors(404, 413, 503))
async def create_embeddings(services: ServicesDep, caller: CallerDep, body: EmbeddingRequest) -> EmbeddingResponse:
    """Embed texts with the model that the index uses."""
    caller.require("chat")
    texts = [body.input] if isinstance(body.input, str) else body.input
    if body.model not in services.embedding_names:
        names = " or ".join(repr(name) for name in services.embedding_names)
        raise ModelNotFound(f"`model`: embeddings are made by {names}, not {body.model!r}.", param="model")
    span = genai.start_embeddings(
        services.telemetry.current(), model=services.retriever.embedding_model, texts=len(texts)
    )
    try:
        vectors = await services.retriever.embed(texts)
    except BaseException as error:
        span.end(error=error)
        raise
    span.end()
    if body.dimensions not in (None, vectors.shape[1]):
        raise InvalidRequest(f"`dimensions`: this model makes {vectors.shape[1]}.", param="dimensions")
    tokens = sum(await services.retriever.count_tokens(texts))
    return EmbeddingResponse(
        data=[
            EmbeddingObject(
                index=index,
                embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode()
                if body.encoding_format == "base64"
                else vector.tolist(),
            )
            for index, vector in enumerate(vectors)
        ],
        model=body.model,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


@routes.get(
    "/v1/predictions",
    operation_id="list_predictions",
    tags=["predictions"],
    response_model=PredictionList,
    responses=errors(),
)
async def list_predictions(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[UUID | None, Query(description="List those made before this one.")] = None,
) -> Response:
    """List the tenant's predictions, newest first."""
    caller.require("predictions:read")
    found = await services.predictions.recent(caller.tenant, limit=limit, before=str(before) if before else None)
    following = found[-1].id if len(found) == limit else None
    page = {"object": "list", "data": [row.as_dict() for row in found], "next": following}
    return Response(msgspec.json.encode(page), media_type="application/json")


@routes.get(
    "/v1/predictions/{prediction_id}",
    operation_id="get_prediction",
    tags=["predictions"],
    response_model=PredictionObject,
    responses=errors(404),
)
async def get_prediction(services: ServicesDep, caller: CallerDep, prediction_id: UUID) -> Response:
    """Show one prediction: the release, the passages, the answer, the timings."""
    caller.require("predictions:read")
    row = await services.predictions.get(caller.tenant, str(prediction_id))
    if row is None:
        raise NotFound(f"There is no prediction {str(prediction_id)!r}.")
    return Response(msgspec.json.encode(row.as_dict()), media_type="application/json")


@routes.get("/v1/me", operation_id="who_am_i", tags=["access"], responses=errors())
async def who_am_i(caller: CallerDep) -> IdentityObject:
    """Say whose key this is and what it may do."""
    return IdentityObject(key_id=caller.key_id, name=caller.name, tenant=caller.tenant, scopes=sorted(caller.scopes))


def _model(release: Release, name: str | None = None) -> ModelObject:
    return ModelObject(
        id=name or release.name,
        release=release.label,
        digest=release.digest,
        base_model=release.base_model,
        adapter=release.adapter,
        prompt_version=release.prompt.version,
        retrieval=release.retrieval.mode,
    )
