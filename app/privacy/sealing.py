"""Pure: content under a key of whose content it is, and names that only the holder of the master key can give.

The main rule: nothing is encrypted by the master key but data keys. A data key belongs to one subject - an end user, a
conversation - and whoever destroys it has erased all that was sealed by it, wherever copies of that may lie.

AES-256-GCM with random nonces of 96 bits (NIST SP 800-38D: at most 2^32 texts for a key, which no subject writes).
Keys for wrapping and for pseudonyms are derived from a master key by HKDF-SHA-256 (RFC 5869).
"""

import base64
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = b"\x01"
_KEY_ID = re.compile(r"[\w.-]{1,32}")
_PSEUDONYM_PREFIX = "sub_"


class BadKey(ValueError):
    """A master key that cannot be one."""


class CannotOpen(Exception):
    """What was sealed was changed since, or by another key, or is another row's."""


class DataKey:
    """The key of one subject; `id` names it in what it sealed."""

    __slots__ = ("_cipher", "_digesting", "id")

    def __init__(self, key_id: str, secret: bytes) -> None:
        self.id = key_id
        self._cipher = AESGCM(secret)
        self._digesting = _derived(secret, b"digest")

    def digest(self, content: bytes) -> bytes:
        """Sixteen bytes that the same content has under the same key; without the key nothing can be compared."""
        return blake2b(content, key=self._digesting, digest_size=16).digest()

    def seal(self, content: bytes, context: bytes) -> bytes:
        """Encrypt; what is sealed opens in the same context only, so that a row cannot be passed off as another."""
        nonce = os.urandom(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, content, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt what `seal` gave.

        Raises:
            CannotOpen: it is not what this key sealed in this context.
        """
        return _decrypted(self._cipher, sealed, context)


class MasterKeys:
    """The keys that wrap data keys: the first wraps, and all of them unwrap, so that they can be changed one by one.

    Args:
        keys: by the id that is kept beside what each wrapped; 32 random bytes each.

    Raises:
        BadKey: there is none.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        if not keys:
            raise BadKey("there is no key: `hallmark privacy new-key` makes one")
        self._wrapping = {key_id: AESGCM(_derived(secret, b"wrap")) for key_id, secret in keys.items()}
        self._naming = {key_id: _derived(secret, b"pseudonym") for key_id, secret in keys.items()}
        self.current = next(iter(keys))

    @classmethod
    def parse(cls, lines: str) -> "MasterKeys":
        """Read `id:base64`, one a line or with commas between them, the current one first.

        Raises:
            BadKey: a line is something else, or has an id that another had; nothing of what it holds is repeated.
        """
        keys: dict[str, bytes] = {}
        for number, line in enumerate(lines.replace(",", "\n").split("\n"), 1):
            if not (line := line.strip()) or line.startswith("#"):
                continue
            key_id, _, encoded = line.partition(":")
            try:
                secret = base64.b64decode(encoded, validate=True)
            except ValueError:
                secret = b""
            if not secret or not _KEY_ID.fullmatch(key_id):
                raise BadKey(
                    f"line {number} is not `id:base64` with an id of up to 32 letters, digits, `.`, `_` and `-`: "
                    "`hallmark privacy new-key` makes such lines"
                )
            if len(secret) != KEY_BYTES:
                raise BadKey(f"the key in line {number} has {len(secret)} bytes and not {KEY_BYTES}")
            if key_id in keys:
                raise BadKey(f"line {number} has the id of a line before it: give each key one of its own")
            keys[key_id] = secret
        return cls(keys)

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._wrapping

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        """Encrypt a data key."""
        nonce = os.urandom(_NONCE_BYTES)
        return _VERSION + nonce + self._wrapping[self.current].encrypt(nonce, secret, context)

    def unwrap(self, wrapped: bytes, context: bytes, *, by: str) -> bytes:
        """Decrypt a data key that the master key `by` wrapped.

        Raises:
            CannotOpen: that master key is not here, or the data key was changed.
        """
        if by not in self:
            raise CannotOpen(f"the master key {by!r} is not configured")
        return _decrypted(self._wrapping[by], wrapped, context)

    def pseudonym(self, tenant: str, subject: str) -> str:
        """The name under which a subject is kept: the same for the same subject of a tenant, and telling nothing.

        It is made by the oldest key, the last one, so that it stays when a new key comes first.
        """
        naming = self._naming[next(reversed(self._naming))]
        named = hmac.new(naming, _joined(tenant, subject), sha256).digest()
        return _PSEUDONYM_PREFIX + base64.b32encode(named[:20]).decode().lower()


def new_key() -> str:
    """Make the line of a new master key."""
    return f"k{os.urandom(3).hex()}:{base64.b64encode(os.urandom(KEY_BYTES)).decode()}"


def is_pseudonym(subject: str) -> bool:
    """Whether it is a name that `pseudonym` gives."""
    tail = subject.removeprefix(_PSEUDONYM_PREFIX)
    return len(tail) == 32 and tail != subject and all(letter in "abcdefghijklmnopqrstuvwxyz234567" for letter in tail)


def _decrypted(cipher: AESGCM, sealed: bytes, context: bytes) -> bytes:
    head = len(_VERSION) + _NONCE_BYTES
    if sealed[:1] != _VERSION:
        raise CannotOpen("it was not sealed by this version")
    try:
        return cipher.decrypt(sealed[1:head], sealed[head:], context)
    except InvalidTag:
        raise CannotOpen("it was changed, or sealed by another key, or for something else") from None


def _derived(secret: bytes, use: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=b"hallmark/" + use).derive(secret)


def _joined(*parts: str) -> bytes:
    """The parts as bytes of which no other parts are the same."""
    encoded: Sequence[bytes] = [part.encode(errors="surrogatepass") for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
