"""For whom a key acts: a user, as Open WebUI says in a signed header of each request it forwards.

The main rule: what is not signed is nobody's identity. A token is believed by its HMAC alone, made with the secret that
both sides have, by the one algorithm there is here; and only from a key that may act for users at all.
"""

from collections.abc import Mapping
from urllib.parse import unquote

import jwt
import msgspec

from app.access.keys import LONGEST_GROUP, Caller
from app.errors import UserUnverified

TOKEN_HEADER = b"x-openwebui-user-jwt"
SCOPE = "users:act-as"

_ALGORITHM = "HS256"
_ISSUER = "open-webui"
_LEEWAY_SECONDS = 30.0
"""How far the two clocks may be apart."""
_MOST_GROUPS = 1_000
_ROLE = "role:"
"""How the group begins that everybody of a role is in."""


class _Claims(msgspec.Struct):
    sub: str
    role: str = ""
    groups: list[str] | None = None


class UserTokens:
    """Verifies whom requests are for.

    Args:
        secret: Open WebUI's `FORWARD_USER_INFO_HEADER_JWT_SECRET`.
        groups_header: of a header that names the user's groups where the token does not, as Open WebUI fills it in for
            a connection: each percent-encoded, with commas between. It is believed beside a valid token only.
    """

    def __init__(self, secret: str, *, groups_header: str | None = None) -> None:
        self._secret = secret
        self._groups_header = groups_header.lower().encode() if groups_header else None

    def caller(self, caller: Caller, headers: Mapping[bytes, bytes]) -> Caller:
        """Who calls, where a request is for a user: the key, acting for them; without a token the key itself.

        Raises:
            Forbidden: the key may not act for users.
            UserUnverified: the token is not valid.
        """
        token = headers.get(TOKEN_HEADER)
        if token is None:
            return caller
        caller.require(SCOPE)
        claims = self._claims(token)
        groups = claims.groups if claims.groups is not None else self._groups_in(headers)
        groups = [group for group in groups if 0 < len(group) <= LONGEST_GROUP]
        if len(groups) > _MOST_GROUPS:
            raise _refused(f"it names more than {_MOST_GROUPS} groups")
        return caller.for_user(claims.sub, [*groups, *([_ROLE + claims.role] if claims.role else [])])

    def _claims(self, token: bytes) -> _Claims:
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["sub", "iss", "exp"], "verify_aud": False},
            )
            read = msgspec.convert(claims, _Claims)
        except jwt.ExpiredSignatureError as error:
            raise _refused("it has expired; compare the clocks of the two machines") from error
        except jwt.InvalidIssuerError as error:
            raise _refused(f"its `iss` is not {_ISSUER!r}") from error
        except jwt.MissingRequiredClaimError as error:
            raise _refused(f"it has no `{error.claim}`") from error
        except (jwt.InvalidTokenError, msgspec.ValidationError, ValueError) as error:
            raise _refused("it was not signed with HS256 and the secret that this service has") from error
        if not read.sub or len(read.sub) > LONGEST_GROUP or "\0" in read.sub:
            raise _refused(f"its `sub` has no name of 1 to {LONGEST_GROUP} characters without NUL")
        return read

    def _groups_in(self, headers: Mapping[bytes, bytes]) -> list[str]:
        value = headers.get(self._groups_header, b"") if self._groups_header else b""
        return [unquote(group).strip() for group in value.decode("latin-1").split(",")]


def _refused(why: str) -> UserUnverified:
    return UserUnverified(
        f"The header `X-OpenWebUI-User-Jwt` is refused: {why}. Set HALLMARK_USERS_JWT_SECRET to what Open WebUI has as "
        "FORWARD_USER_INFO_HEADER_JWT_SECRET, or send no such header."
    )
