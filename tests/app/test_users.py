"""For whom a key acts: by a signed token and by nothing else, and what such a user sees."""

import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from app.access import Caller, UserTokens
from app.errors import Forbidden, Unauthenticated
from tests.fake_tgi import FakeTGI
from tests.routes import assert_envelope
from tests.service import Api, Service, live_service

SECRET = "a secret that both sides have, and nobody else; long enough for every HMAC there is"
PAGE = Caller("page", "acme", frozenset({"chat", "users:act-as", "documents:manage"}))
TOKENS = UserTokens(SECRET, groups_header="X-Groups")


def claims(**changed: Any) -> dict[str, Any]:
    now = int(time.time())
    said = {"sub": "ann", "role": "user", "name": "Ann", "iss": "open-webui", "iat": now, "exp": now + 300, **changed}
    return {name: value for name, value in said.items() if value is not None}


def token(secret: str | None = SECRET, *, algorithm: str | None = "HS256", **changed: Any) -> bytes:
    return jwt.encode(claims(**changed), secret, algorithm=algorithm).encode()


def acting(shown: bytes, *, caller: Caller = PAGE, tokens: UserTokens = TOKENS, **headers: str) -> Caller:
    given = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return tokens.caller(caller, {b"x-openwebui-user-jwt": shown, **given})


def part(value: Any) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


def test_a_valid_token_names_the_user_and_their_groups() -> None:
    caller = acting(token(groups=["law", "", "x" * 200]))
    assert (caller.user, caller.groups, caller.tenant) == ("ann", {"law", "role:user"}, "acme")
    assert caller.sees().groups == {"law", "role:user"}  # Whatever the key may see.


def test_the_header_of_groups_is_read_where_the_token_names_none() -> None:
    assert acting(token(), x_groups="law,caf%C3%A9%2C bar").groups == {"law", "café, bar", "role:user"}
    assert acting(token(groups=[]), x_groups="law").groups == {"role:user"}
    assert acting(token(), tokens=UserTokens(SECRET), x_groups="law").groups == {"role:user"}


def test_a_key_with_groups_of_its_own_lends_no_others() -> None:
    key = Caller("page", "acme", frozenset({"users:act-as"}), groups=frozenset({"law", "board"}))
    assert acting(token(groups=["law", "staff"]), caller=key).groups == {"law"}


def test_without_a_token_a_key_acts_for_itself() -> None:
    plain = {b"x-openwebui-user-id": b"ann", b"x-openwebui-user-role": b"admin", b"x-groups": b"law"}
    assert TOKENS.caller(PAGE, plain) is PAGE


def test_a_key_that_may_not_act_for_users_is_told_which_scope_it_lacks() -> None:
    with pytest.raises(Forbidden, match="users:act-as"):
        acting(token(), caller=Caller("k", "acme", frozenset({"chat"})))


RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PUBLIC = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
REFUSED = {
    "expired": token(exp=int(time.time()) - 60),
    "issued by others": token(iss="somebody"),
    "without an issuer": token(iss=None),
    "without an end": token(exp=None),
    "without a user": token(sub=None),
    "of an empty user": token(sub=""),
    "of a user who is no text": token(sub=7),
    "of a long user": token(sub="a" * 200),
    "of a user with a NUL": token(sub="an\0na"),
    "not valid yet": token(nbf=int(time.time()) + 600),
    "by another secret": token(
        "another secret that two sides have, and nobody else; long enough for every HMAC there is"
    ),
    "by no secret": token(None, algorithm="none"),
    "by no secret, in another spelling": b".".join((part({"alg": "nOnE"}), part(claims()), b"")),
    "by another HMAC": token(algorithm="HS512"),
    "by a key pair": jwt.encode(claims(), RSA, algorithm="RS256").encode(),
    "with a role that is no text": token(role=["admin"]),
    "with groups that are no list": token(groups="law"),
    "with too many groups": token(groups=[str(n) for n in range(1_001)]),
    "empty": b"",
    "no token": b"ann",
    "no text": b"\xff\xfe.\xff.\xff",
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_token_that_proves_nothing_is_refused_with_the_header_and_the_setting(which: str) -> None:
    with pytest.raises(Unauthenticated, match=r"X-OpenWebUI-User-Jwt.*HALLMARK_USERS_JWT_SECRET") as refusal:
        acting(REFUSED[which])
    assert refusal.value.code == "invalid_user_token"
    assert "ann" not in refusal.value.message.replace("cannot", "")


def test_a_public_key_as_the_secret_does_not_make_its_tokens_valid() -> None:
    # What an attacker who knows the public key would sign, had this side been given it for RS256.
    with pytest.raises(Unauthenticated):
        acting(jwt.encode(claims(), RSA, algorithm="RS256").encode(), tokens=UserTokens(PUBLIC.decode()))


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_token_with_any_byte_changed_is_refused_or_the_same(at: int, byte: int) -> None:
    whole = token(role="user", groups=["law"])
    at %= len(whole)
    changed = whole[:at] + bytes([byte]) + whole[at + 1 :]
    try:
        caller = acting(changed)
    except Unauthenticated:
        return
    # The last character of a part has bits that say nothing.
    assert (caller.user, caller.groups) == ("ann", {"law", "role:user"})


# --- over HTTP ---


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    settings = {"users": {"jwt_secret": SECRET}}
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("users"), engine_url=tgi.url, settings=settings, tenants=1) as service,
    ):
        yield service


@pytest.fixture(scope="module")
async def owner(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


@pytest.fixture(scope="module")
async def page(service: Service, owner: Api) -> AsyncIterator[httpx.AsyncClient]:
    """A chat page: one key for all its users."""
    scopes = ("chat", "documents:read", "documents:write", "documents:manage", "feedback:write", "users:act-as")
    async with service.client(await service.new_key(tenant=owner.name, scopes=scopes)) as client:
        upload = {"name": "law.md", "text": "# Law\n\nThe quorum is seven partners.", "groups": ["law"]}
        assert (await client.post("/v1/documents?wait=20", json=upload)).status_code == 201
        yield client


def for_user(**changed: Any) -> dict[str, str]:
    return {"x-openwebui-user-jwt": token(**changed).decode()}


async def test_a_user_searches_and_is_answered_from_what_is_for_their_groups(page: httpx.AsyncClient) -> None:
    asked = {"query": "How many partners are the quorum?"}
    chat = {"model": "hallmark", "messages": [{"role": "user", "content": asked["query"]}]}
    for groups, finds in (["law"], 1), (["guests"], 0):
        headers = for_user(groups=groups)
        assert len((await page.post("/v1/search", json=asked, headers=headers)).json()["hits"]) == finds
        answered = (await page.post("/v1/chat/completions", json=chat, headers=headers)).json()
        assert answered["retrieval"] == ("used" if finds else "empty"), answered
        assert len((await page.get("/v1/documents", headers=headers)).json()["data"]) == finds
    assert (await page.post("/v1/search", json=asked)).json()["hits"]  # The key itself may see all.


async def test_what_a_user_says_goes_on_record_as_theirs_whatever_the_body_says(
    page: httpx.AsyncClient, owner: Api
) -> None:
    chat = {"model": "hallmark", "messages": [{"role": "user", "content": "Hello."}], "user": "somebody else"}
    answer = (await page.post("/v1/chat/completions", json=chat, headers=for_user(sub="bob"))).json()
    record = (await owner.client.get(f"/v1/predictions/{answer['id']}")).json()
    assert record["user"] == "bob"
    said = {"prediction_id": answer["id"], "rating": False, "author": "somebody else"}
    given = await page.post("/v1/feedback", json=said, headers=for_user(sub="bob"))
    assert given.json()["author"] == "bob", given.text
    who = (await page.get("/v1/me", headers=for_user(sub="bob", groups=["law"]))).json()
    assert (who["user"], who["groups"]) == ("bob", ["law", "role:user"])


async def test_a_user_goes_on_from_their_own_responses_only(page: httpx.AsyncClient) -> None:
    first = (await page.post("/v1/responses", json={"model": "hallmark", "input": "Hi."}, headers=for_user())).json()
    more = {"model": "hallmark", "input": "And?", "previous_response_id": first["id"]}
    assert (await page.post("/v1/responses", json=more, headers=for_user())).status_code == 200
    others = await page.post("/v1/responses", json=more, headers=for_user(sub="bob"))
    assert_envelope(others, 403, "insufficient_scope")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/search", "/v1/responses"])
async def test_a_token_that_is_not_valid_is_a_401_on_every_kind_of_route(page: httpx.AsyncClient, path: str) -> None:
    refused = await page.post(path, json={}, headers=for_user(exp=1))
    assert "has expired" in assert_envelope(refused, 401, "invalid_user_token")["message"]


async def test_a_user_gives_documents_to_their_own_groups_and_sees_no_others(page: httpx.AsyncClient) -> None:
    headers = for_user(sub="carl", groups=["sales"])
    upload = {"name": "prices.txt", "text": "Ten.", "groups": ["law"]}
    refused = await page.post("/v1/documents", json=upload, headers=headers)
    assert "`groups`" in assert_envelope(refused, 403, "insufficient_scope")["message"]
    made = await page.post("/v1/documents?wait=20", json={**upload, "groups": ["sales"]}, headers=headers)
    assert made.json()["document"]["groups"] == ["sales"]
    taken = await page.post("/v1/documents", json={"name": "law.md", "text": "Mine."}, headers=headers)
    assert_envelope(taken, 409, "conflict")
