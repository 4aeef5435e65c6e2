"""One call of the webhook: signed, to a public address, without redirects, and within a time.

The form is that of Standard Webhooks: `webhook-id` (the same at every attempt), `webhook-timestamp` (seconds since
1970) and `webhook-signature`, `v1,` and the Base64 of HMAC-SHA256 over `id.timestamp.body`.
"""

import asyncio
import hmac
import ssl
import time
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from app.alerts.addresses import Forbidden, Place, Policy, Resolve, resolved

MIN_SECRET_BYTES = 24
TIMEOUT_SECONDS = 10.0
_GONE = 410


class NotDelivered(Exception):
    """Nobody took it; `for_good` says that trying again is of no use. The words name no URL and no secret."""

    def __init__(self, why: str, *, for_good: bool = False) -> None:
        super().__init__(why)
        self.for_good = for_good


def read_secret(text: str) -> bytes:
    """Read a signing secret: `whsec_` and Base64, of 24 bytes at least. Raises ValueError."""
    try:
        key = b64decode(text.removeprefix("whsec_"), validate=True) if text.startswith("whsec_") else b""
    except Base64Error:
        key = b""
    if len(key) < MIN_SECRET_BYTES:
        raise ValueError(
            f"it must be whsec_ and the Base64 of {MIN_SECRET_BYTES} bytes or more; `hallmark alerts secret` makes one"
        )
    return key


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Sign a message."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + b64encode(hmac.digest(key, signed, "sha256")).decode()


class Webhook:
    """Calls one URL.

    Args:
        url: where to; it may hold a secret of the receiver.
        key: what to sign with.
        policy: where it may lead.
        resolve: gives the addresses of a name.
        timeout_seconds: for the whole call.
        verify: httpx's: certificates to trust in place of the system's.
    """

    def __init__(
        self,
        url: str,
        key: bytes,
        policy: Policy,
        *,
        resolve: Resolve = resolved,
        timeout_seconds: float = TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.time,
        verify: bool | ssl.SSLContext = True,
    ) -> None:
        self._url = url
        self._key = key
        self._policy = policy
        self._resolve = resolve
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._verify = verify

    async def send(self, message_id: str, body: bytes) -> None:
        """Send a message; raises NotDelivered unless the answer is a 2xx."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                place = await self._policy.place(self._url, self._resolve)
                status = await self._post(place, message_id, body)
        except Forbidden as error:
            raise NotDelivered(f"The webhook is not called: {error}.") from None
        except TimeoutError:
            raise NotDelivered(f"No answer within {self._timeout_seconds:g} s.") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # What it says may quote the URL.
            raise NotDelivered(f"The webhook cannot be reached: {type(error).__name__}.") from None
        if 300 <= status < 400:
            raise NotDelivered(f"It answered {status}, and redirects are not followed.")
        if not 200 <= status < 300:
            raise NotDelivered(f"It answered {status}.", for_good=status == _GONE)

    async def _post(self, place: Place, message_id: str, body: bytes) -> int:
        """Call the address that was found, under the host's name."""
        timestamp = int(self._clock())
        parts = urlsplit(self._url)
        address = f"[{place.address}]" if ":" in place.address else place.address
        query = f"?{parts.query}" if parts.query else ""
        headers = {
            "host": parts.netloc.rpartition("@")[2],
            "content-type": "application/json",
            "user-agent": "hallmark-alerts",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._key, message_id, timestamp, body),
        }
        target = f"{parts.scheme}://{address}:{place.port}{parts.path or '/'}{query}"
        names = {"sni_hostname": place.host} if place.is_tls else {}
        async with (
            httpx.AsyncClient(
                timeout=self._timeout_seconds, trust_env=False, follow_redirects=False, verify=self._verify
            ) as client,
            client.stream("POST", target, content=body, headers=headers, extensions=names) as response,
        ):
            return response.status_code
