"""What can be asked about the service: models, embeddings, identity."""

import base64
from time import perf_counter
from typing import Annotated

from fastapi import APIRouter, Path

from app.errors import InvalidRequest, ModelNotFound
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
    if body.model not in (known := services.embedding_names()):
        names = " or ".join(repr(name) for name in known)
        raise ModelNotFound(f"`model`: embeddings are made by {names}, not {body.model!r}.", param="model")
    trace, model, started = services.telemetry.current(), services.retriever.embedding_model, perf_counter()
    span = genai.start_embeddings(trace, model=model, texts=len(texts))
    failure: BaseException | None = None
    try:
        vectors = await services.retriever.embed(texts)
    except BaseException as error:
        failure = error
        raise
    finally:
        span.end(error=failure)
        genai.count_embeddings(trace, model=model, seconds=perf_counter() - started, error=failure)
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


@routes.get("/v1/me", operation_id="who_am_i", tags=["access"], responses=errors())
async def who_am_i(caller: CallerDep) -> IdentityObject:
    """Say whose key this is, what it may do, and how much."""
    return IdentityObject(
        key_id=caller.key_id,
        name=caller.name,
        tenant=caller.tenant,
        scopes=sorted(caller.scopes),
        priority=caller.priority,
        requests_per_minute=caller.requests_per_minute,
        tokens_per_minute=caller.tokens_per_minute,
        groups=sorted(caller.groups),
        user=caller.user,
    )


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
