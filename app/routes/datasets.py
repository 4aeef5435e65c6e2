"""Datasets over HTTP: build, import, list, compare, tag, export."""

from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData, UploadFile

from app.access import Caller
from app.datasets import MAX_FILES, Purpose, Recipe, Upload, read_recipe
from app.errors import InvalidRequest, NotFound, PayloadTooLarge, UnsupportedMedia, invalid_field
from app.routes.dataset_schemas import (
    DATASET_NAME,
    TAG,
    BuildList,
    BuildObject,
    DatasetDiff,
    DatasetList,
    DatasetObject,
    DatasetRowList,
    DatasetRowObject,
    DatasetVersion,
    RowPlace,
    RowPlaces,
    TagRequest,
    VersionList,
)
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.releases import author

routes = APIRouter(tags=["datasets"])

MAX_RECIPE_BYTES = 1_000_000

Name = Annotated[str, Path(pattern=DATASET_NAME)]
Which = Annotated[str, Path(pattern=TAG, description="A version's number, a tag, or `latest`.")]
WhichQuery = Annotated[str, Query(pattern=TAG, description="A version's number, a tag, or `latest`.")]
Tag = Annotated[str, Path(pattern=TAG)]
Limit = Annotated[int, Query(ge=1, le=200)]
AfterDigest = Annotated[str | None, Query(pattern=r"^[0-9a-f]{64}$", description="List the rows after this one.")]


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a version is built of; a dataset's `purpose` and task are those of its first version."""

    recipe: Recipe
    purpose: Purpose = "training"


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Files, and how their rows are read."""

    files: list[str]
    """JSON lines, CSV or Parquet; a name such as `data/train-00000.parquet` says the side of the split."""
    recipe: str
    """A recipe as JSON."""
    purpose: Purpose = "training"


def _body(schema: str, kind: str) -> dict[str, Any]:
    content = {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


@routes.get("/v1/datasets", operation_id="list_datasets", responses=errors(503))
async def list_datasets(
    services: ServicesDep,
    caller: CallerDep,
    limit: Limit = 50,
    after: Annotated[str, Query(max_length=64, description="List those after this name.")] = "",
) -> DatasetList:
    """List the tenant's datasets by name."""
    caller.require("datasets:read")
    found = await services.datasets.store.all_series(caller.tenant, limit=limit, after=after)
    following = found[-1].name if len(found) == limit else None
    return DatasetList(data=[DatasetObject.of(each) for each in found], next=following)


@routes.get("/v1/datasets/{dataset}", operation_id="get_dataset", responses=errors(404, 503))
async def get_dataset(services: ServicesDep, caller: CallerDep, dataset: Name) -> DatasetObject:
    """Describe a dataset."""
    caller.require("datasets:read")
    return DatasetObject.of(await services.datasets.store.series(caller.tenant, dataset))


@routes.post(
    "/v1/datasets/{dataset}/builds",
    operation_id="build_dataset",
    status_code=202,
    responses=errors(409, 413, 429, 503),
    openapi_extra=_body("BuildRequest", "application/json"),
)
async def build_dataset(services: ServicesDep, caller: CallerDep, dataset: Name, request: Request) -> BuildObject:
    """Begin to build the next version of a dataset, from predictions and what was said of them.

    The build runs in the background: ask for it by its id. Nothing of it is seen before all of it is there.
    """
    given = _read_build(await request.body())
    _require(caller, given.recipe)
    build = await services.datasets.builds.from_predictions(
        caller.tenant, dataset, given.recipe, purpose=given.purpose, who=author(caller)
    )
    return BuildObject.of(build)


@routes.post(
    "/v1/datasets/{dataset}/imports",
    operation_id="import_dataset",
    status_code=202,
    responses=errors(409, 413, 415, 429, 503),
    openapi_extra=_body("ImportRequest", "multipart/form-data"),
)
async def import_dataset(services: ServicesDep, caller: CallerDep, dataset: Name, request: Request) -> BuildObject:
    """Read files and begin to build the next version of a dataset of their rows, in place of those it has.

    If one row cannot be taken none is; the answer names up to 20 of them with file, line, field and fix.
    """
    caller.require("datasets:write")
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UnsupportedMedia("Send a form (multipart/form-data) with `files` and `recipe`.")
    async with request.form(max_files=MAX_FILES, max_fields=4, max_part_size=MAX_RECIPE_BYTES) as form:
        recipe, purpose, uploads = _read_form(form)
        build = await services.datasets.builds.from_files(
            caller.tenant, dataset, recipe, uploads, purpose=purpose, who=author(caller)
        )
    return BuildObject.of(build)


@routes.get("/v1/datasets/{dataset}/builds", operation_id="list_dataset_builds", responses=errors(503))
async def list_dataset_builds(services: ServicesDep, caller: CallerDep, dataset: Name, limit: Limit = 50) -> BuildList:
    """List the builds of a dataset, newest first."""
    caller.require("datasets:read")
    found = await services.datasets.builds.find(caller.tenant, dataset, limit=limit)
    return BuildList(data=[BuildObject.of(each) for each in found])


@routes.get("/v1/datasets/{dataset}/builds/{build_id}", operation_id="get_dataset_build", responses=errors(404, 503))
async def get_dataset_build(services: ServicesDep, caller: CallerDep, dataset: Name, build_id: UUID) -> BuildObject:
    """Show how far a build is, what its steps kept and dropped, or why it failed."""
    caller.require("datasets:read")
    return BuildObject.of(await services.datasets.builds.get(caller.tenant, dataset, str(build_id)))


@routes.delete(
    "/v1/datasets/{dataset}/builds/{build_id}", operation_id="cancel_dataset_build", responses=errors(404, 503)
)
async def cancel_dataset_build(services: ServicesDep, caller: CallerDep, dataset: Name, build_id: UUID) -> BuildObject:
    """End a build; one that is done stays as it is."""
    caller.require("datasets:write")
    return BuildObject.of(await services.datasets.builds.cancel(caller.tenant, dataset, str(build_id)))


@routes.get("/v1/datasets/{dataset}/versions", operation_id="list_dataset_versions", responses=errors(404, 503))
async def list_dataset_versions(
    services: ServicesDep,
    caller: CallerDep,
    dataset: Name,
    limit: Limit = 50,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="List those before this one.")] = None,
) -> VersionList:
    """List the versions of a dataset, newest first."""
    caller.require("datasets:read")
    series = await services.datasets.store.series(caller.tenant, dataset)
    found = await services.datasets.store.versions(series, limit=limit, before=before)
    following = found[-1].number if len(found) == limit else None
    return VersionList(data=[DatasetVersion.of(each) for each in found], next=following)


@routes.get("/v1/datasets/{dataset}/versions/{version}", operation_id="get_dataset_version", responses=errors(404, 503))
async def get_dataset_version(
    services: ServicesDep, caller: CallerDep, dataset: Name, version: Which
) -> DatasetVersion:
    """Show a version: its digest, its manifest with the recipe, and what each step of its build dropped."""
    caller.require("datasets:read")
    return DatasetVersion.of(await services.datasets.store.version(caller.tenant, dataset, version))


@routes.get(
    "/v1/datasets/{dataset}/versions/{version}/rows", operation_id="list_dataset_rows", responses=errors(404, 503)
)
async def list_dataset_rows(
    services: ServicesDep,
    caller: CallerDep,
    dataset: Name,
    version: Which,
    limit: Limit = 50,
    after: AfterDigest = None,
) -> DatasetRowList:
    """List the rows of a version by their digests."""
    caller.require("datasets:read")
    store = services.datasets.store
    found = await store.version(caller.tenant, dataset, version)
    rows = await store.page(found.series, found.number, after=after or "", limit=limit)
    following = rows[-1].digest if len(rows) == limit else None
    return DatasetRowList(data=[DatasetRowObject.of(row) for row in rows], next=following)


@routes.get(
    "/v1/datasets/{dataset}/versions/{version}/files/{file}",
    operation_id="get_dataset_file",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The manifest, or the rows of one side of the split.",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "application/x-ndjson": {"schema": {"type": "string"}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        **errors(404, 503),
    },
)
async def get_dataset_file(
    services: ServicesDep,
    caller: CallerDep,
    dataset: Name,
    version: Which,
    file: Annotated[str, Path(max_length=64, description="`manifest.json`, `train.jsonl`, `heldout.parquet` ...")],
) -> StreamingResponse:
    """Export a file of a version: the same bytes each time, unless rows were erased since.

    A file whose transfer breaks off is not whole; the manifest has the SHA-256 of the JSON lines.
    """
    caller.require("datasets:read")
    found = await services.datasets.store.version(caller.tenant, dataset, version)
    pieces = services.datasets.exports.file(found, file)
    first = await anext(pieces, b"")  # What fails before the first byte keeps its status.
    kinds = {"json": "application/json", "jsonl": "application/x-ndjson"}
    return StreamingResponse(
        _joined(first, pieces),
        media_type=kinds.get(file.rpartition(".")[2], "application/octet-stream"),
        headers={"content-disposition": f'attachment; filename="{file}"', "x-dataset-digest": found.digest},
    )


@routes.get("/v1/datasets/{dataset}/diff", operation_id="diff_dataset_versions", responses=errors(404, 503))
async def diff_dataset_versions(
    services: ServicesDep,
    caller: CallerDep,
    dataset: Name,
    old: WhichQuery,
    new: WhichQuery = "latest",
    limit: Limit = 50,
    after: AfterDigest = None,
) -> DatasetDiff:
    """Show how two versions differ, row by row."""
    caller.require("datasets:read")
    store = services.datasets.store
    one, other = [await store.version(caller.tenant, dataset, which) for which in (old, new)]
    found = await services.datasets.changes.difference(
        other.series, one.number, other.number, limit=limit, after=after or ""
    )
    return DatasetDiff.of(one, other, found)


@routes.put("/v1/datasets/{dataset}/tags/{tag}", operation_id="tag_dataset_version", responses=errors(404, 503))
async def tag_dataset_version(
    services: ServicesDep, caller: CallerDep, dataset: Name, tag: Tag, body: TagRequest
) -> DatasetVersion:
    """Name a version; the name moves there from wherever it was."""
    caller.require("datasets:write")
    store = services.datasets.store
    found = await store.version(caller.tenant, dataset, str(body.version))
    await services.datasets.changes.tag(found.series, tag, found.number, who=author(caller))
    return DatasetVersion.of(await store.version(caller.tenant, dataset, str(body.version)))


@routes.delete("/v1/datasets/{dataset}/tags/{tag}", operation_id="untag_dataset_version", responses=errors(404, 503))
async def untag_dataset_version(services: ServicesDep, caller: CallerDep, dataset: Name, tag: Tag) -> DatasetObject:
    """Take a tag away from whichever version has it."""
    caller.require("datasets:write")
    series = await services.datasets.store.series(caller.tenant, dataset)
    if not await services.datasets.changes.untag(series, tag):
        raise NotFound(f"No version of {dataset!r} has the tag {tag!r}.", param="tag")
    return DatasetObject.of(series)


@routes.get("/v1/dataset-rows", operation_id="find_dataset_rows", responses=errors(503))
async def find_dataset_rows(
    services: ServicesDep,
    caller: CallerDep,
    prediction_id: Annotated[UUID | None, Query(description="Made of this prediction.")] = None,
    label_id: Annotated[UUID | None, Query(description="Right by this label.")] = None,
) -> RowPlaces:
    """Find the rows that were made of a prediction or by a label, and the versions they are in; up to 200."""
    caller.require("datasets:read")
    if prediction_id is None and label_id is None:
        raise InvalidRequest("Name a `prediction_id` or a `label_id`.", param="prediction_id")
    found = await services.datasets.changes.places(
        caller.tenant,
        prediction_id=str(prediction_id) if prediction_id else None,
        label_id=str(label_id) if label_id else None,
    )
    return RowPlaces(data=[RowPlace.of(each) for each in found])


def _require(caller: Caller, recipe: Recipe) -> None:
    """Who builds a dataset sees what it is made of."""
    caller.require("datasets:write")
    caller.require("predictions:read")
    needed = {
        "labels:read": bool(recipe.labels.sources) or recipe.query.label_state is not None,
        "feedback:read": recipe.labels.corrections or recipe.query.feedback_state is not None,
        "review:read": recipe.query.review_queue is not None,
    }
    for scope, is_needed in needed.items():
        if is_needed:
            caller.require(scope)


def _read_build(content: bytes) -> BuildRequest:
    if len(content) > MAX_RECIPE_BYTES:
        raise PayloadTooLarge(f"A recipe may have {MAX_RECIPE_BYTES:,} bytes.")
    try:
        given = msgspec.json.decode(content, type=BuildRequest)
        given.recipe.check()
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    return given


def _read_form(form: FormData) -> tuple[Recipe, Purpose, list[Upload]]:
    files = form.getlist("files")
    uploads = [Upload(each.filename or "", each.file) for each in files if isinstance(each, UploadFile)]
    if not uploads or len(uploads) < len(files):
        raise InvalidRequest("`files`: the form needs one file or several under this name.", param="files")
    if len({upload.name for upload in uploads}) < len(uploads):
        raise InvalidRequest("`files`: two have the same name; give each its path.", param="files")
    written, purpose = form.get("recipe"), form.get("purpose") or "training"
    try:
        recipe = read_recipe(msgspec.json.decode(written if isinstance(written, str) else ""))
        return recipe, msgspec.convert(purpose, Purpose), uploads
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"`purpose`: {error}.", param="purpose") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest("`recipe`: this form field must hold a recipe as JSON.", param="recipe") from error


async def _joined(first: bytes, following: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in following:
        yield piece
