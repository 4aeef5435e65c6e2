"""Releases over HTTP: create, list, show, compare, delete."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from app.access import Caller
from app.alerts import BadRules, Rule, rules_in
from app.errors import PayloadTooLarge
from app.releases import NAME_PATTERN, Release, differences, parts_of, read_release
from app.routes.alert_schemas import bad_rules
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.registry_schemas import ReleaseDeleted, ReleaseDiff, ReleaseList, ReleaseObject

routes = APIRouter()

MAX_RELEASE_BYTES = 1_000_000

Label = Annotated[str, Path(max_length=80, description="`name@number`.")]
LabelQuery = Annotated[str, Query(max_length=80, description="`name@number`.")]


@routes.post(
    "/v1/releases",
    operation_id="create_release",
    tags=["releases"],
    status_code=201,
    responses={200: {"model": ReleaseObject, "description": "It was there already."}, **errors(413, 503)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Release"}}},
        }
    },
)
async def create_release(
    services: ServicesDep, caller: CallerDep, request: Request, response: Response
) -> ReleaseObject:
    """Create a release from its description; it is vetted, and has no share of anything until it is rolled out.

    The same content again is the same release, and is vetted again. Rules under `alerts` are kept beside the release,
    for which the key needs `alerts:write`, and hold before it serves. The description can also be sent as TOML, with
    the content type `application/toml`.
    """
    caller.require("releases:write")
    content = await request.body()
    if len(content) > MAX_RELEASE_BYTES:
        raise PayloadTooLarge(f"The description of a release may have {MAX_RELEASE_BYTES} bytes.")
    is_toml = "toml" in request.headers.get("content-type", "")
    release = read_release(content, is_toml=is_toml, defaults=services.defaults)
    rules = _rules(content, is_toml=is_toml)
    if rules is not None:
        caller.require("alerts:write")
    entry, is_new = await services.registry.create(release, who=author(caller))
    if rules is not None:
        await services.alert_rules.set(entry.release.label, rules, who=author(caller), why="set with the release")
    if not is_new:
        response.status_code = 200
    return ReleaseObject.of(entry)


@routes.get("/v1/releases", operation_id="list_releases", tags=["releases"], responses=errors(503))
async def list_releases(
    services: ServicesDep,
    caller: CallerDep,
    name: Annotated[str | None, Query(pattern=NAME_PATTERN, description="Only those of this name.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[str | None, Query(max_length=80, description="List those after this one.")] = None,
) -> ReleaseList:
    """List the releases, by name and number."""
    caller.require("releases:read")
    found = await services.registry.find(name=name, limit=limit, after=after)
    following = found[-1].release.label if len(found) == limit else None
    return ReleaseList(data=[ReleaseObject.of(entry) for entry in found], next=following)


@routes.get("/v1/releases/diff", operation_id="diff_releases", tags=["releases"], responses=errors(404, 503))
async def diff_releases(services: ServicesDep, caller: CallerDep, a: LabelQuery, b: LabelQuery) -> ReleaseDiff:
    """Show the fields in which two releases differ."""
    caller.require("releases:read")
    left: Release = (await services.registry.get(a, param="a")).release
    right: Release = (await services.registry.get(b, param="b")).release
    return ReleaseDiff.of(left, right, differences(left, right))


@routes.get("/v1/releases/{release}", operation_id="get_release", tags=["releases"], responses=errors(404, 503))
async def get_release(services: ServicesDep, caller: CallerDep, release: Label) -> ReleaseObject:
    """Show one release."""
    caller.require("releases:read")
    return ReleaseObject.of(await services.registry.get(release))


@routes.delete(
    "/v1/releases/{release}", operation_id="delete_release", tags=["releases"], responses=errors(404, 409, 503)
)
async def delete_release(services: ServicesDep, caller: CallerDep, release: Label) -> ReleaseDeleted:
    """Take a release away; one that serves is refused.

    Its predictions stay, and it stays on record with them; only nobody can ask for it any more.
    """
    caller.require("releases:write")
    await services.registry.delete(release)
    return ReleaseDeleted(id=release)


def _rules(content: bytes, *, is_toml: bool) -> tuple[Rule, ...] | None:
    """The rules of its alerts that a release's file brings along."""
    try:
        return rules_in(parts_of(content, is_toml=is_toml))
    except BadRules as error:
        raise bad_rules(error) from error


def author(caller: Caller) -> str:
    """Who made a change, for the audit."""
    return f"{caller.name} (key {caller.key_id})"
