"""What several settings are written as, and what is refused with the form that was meant."""

import re
from ipaddress import ip_network
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr, StringConstraints

from retrieval.addresses import is_odd_number

_SECRET_BYTES = 32
"""As RFC 7518 asks of a key for HMAC with SHA-256."""


class Section(BaseModel):
    """A group of settings: `HALLMARK_<GROUP>_<NAME>` in the environment, a `[group]` table in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    try:
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # The port is no number.
        is_one = False
    if not is_one or not url.isprintable() or " " in url:
        raise ValueError("it must start with http:// or https:// and name a host, such as http://gpu-1:3000")
    return url


def _origin(origin: str) -> str:
    if origin != "*" and (_http_url(origin) != origin or urlsplit(origin).path or urlsplit(origin).query):
        raise ValueError("an origin is scheme, host and port without a path, such as https://chat.example.com")
    return origin


def _database_url(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().strip().startswith(("postgresql://", "sqlite:////")):
        raise ValueError("it must be postgresql://user:password@host/name, or sqlite:////path/to/file")
    return url


def _long_secret(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value().encode()) < _SECRET_BYTES:
        raise ValueError(f"it must have {_SECRET_BYTES} bytes: `openssl rand -hex 32` makes one, for both sides")
    return secret


def _redis_url(url: SecretStr) -> SecretStr:
    parts = urlsplit(url.get_secret_value())
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ValueError("it must be redis://host:6379/0, or rediss:// for TLS, with user:password@ before the host")
    return url


def _allowed(entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        is_host = bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", entry)) and not is_odd_number(entry)
        try:
            ip_network(entry)
        except ValueError:
            if not is_host:
                raise ValueError(
                    f"{entry!r}: give the name of a host, an address, or a network such as 10.1.0.0/16"
                ) from None
    return entries


Dialect = Literal["tgi", "vllm", "sglang", "llamacpp", "openai", "embedded"]


def dialect_and_url(url: str, dialect: str) -> tuple[str, str]:
    """Split `vllm+http://gpu-2:8000`; a URL without a dialect in front has the one given."""
    scheme, _, rest = url.partition("://")
    own, plus, scheme = scheme.rpartition("+")
    return (own, f"{scheme}://{rest}") if plus else (dialect, url)


def _engine_url(url: str) -> str:
    dialect, address = dialect_and_url(url, "tgi")
    if dialect not in get_args(Dialect):
        raise ValueError(f"{dialect!r} is no dialect: it may begin with {', '.join(get_args(Dialect))}")
    _http_url(address)
    return url


HttpUrl = Annotated[str, AfterValidator(_http_url)]
EngineUrl = Annotated[str, AfterValidator(_engine_url)]
Origin = Annotated[str, AfterValidator(_origin)]
DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
LongSecret = Annotated[SecretStr, AfterValidator(_long_secret)]
Reachable = Annotated[tuple[str, ...], AfterValidator(_allowed)]
GroupName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
