"""Links to cited passages that open in a browser without an API key.

A citation is worth following only if a click shows the passage, and a chat page must not carry a key. So a link is a
capability: it names one passage of one document version of one tenant, signed with a secret that never leaves the
data directory. Whoever holds the link was shown that passage's quote already; nothing else opens with it.
"""

import hmac
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_bytes
from urllib.parse import parse_qs, quote

SECRET_BYTES = 32

VERSION_DIGITS = 16
"""Hex digits of the document version in a link: enough that two versions of one document never share them."""


def load_secret(path: Path) -> bytes:
    """Read a secret of this data directory, made on first use and readable by its owner only."""
    with suppress(FileNotFoundError):
        secret = path.read_bytes()
        if len(secret) == SECRET_BYTES:
            return secret
    # Renamed into place, because half a secret, or none, is one that anybody can guess.
    secret = token_bytes(SECRET_BYTES)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secret)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new.replace(path)
    return secret


class PassageLinks:
    """Makes and verifies links."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def path(self, tenant: str, document_id: str, n: int, document_version: str) -> str:
        """The path and query of a link to passage `n`; put the service's address in front."""
        version = document_version[:VERSION_DIGITS]
        path = f"/v1/documents/{quote(document_id, safe='')}/passages/{n}"
        signature = self._sign(tenant, path, version)
        return f"{path}?version={version}&tenant={quote(tenant, safe='')}&signature={signature}"

    def tenant(self, path: str, query: bytes) -> str | None:
        """The tenant whose passage a request for `path` may see by its signature; None when it has no valid one."""
        try:
            fields = parse_qs(query.decode("ascii"), strict_parsing=True, max_num_fields=8)
            (tenant,), (version,), (signature,) = fields["tenant"], fields["version"], fields["signature"]
        except (KeyError, ValueError):
            return None
        return tenant if hmac.compare_digest(signature.encode(), self._sign(tenant, path, version).encode()) else None

    def _sign(self, tenant: str, path: str, version: str) -> str:
        message = "\n".join((path, version, tenant)).encode()
        return hmac.new(self._secret, message, sha256).hexdigest()[:32]
