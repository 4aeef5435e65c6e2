"""Pure: how much of what was said is kept, by tenant, by request and by chance.

The main rule: of several wishes the strictest holds. A request can have less kept than its tenant's policy says, and
never more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, get_args

import msgspec

from app.errors import InvalidRequest
from app.privacy.redaction import KINDS, Finding, Kind, find, joined, replaced

Level = Literal["full", "redacted", "metadata"]
"""`full`: as it was said. `redacted`: with personal data and secrets taken out. `metadata`: nothing that was said."""

LEVELS: tuple[Level, ...] = get_args(Level)


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of requests and answers.

    Raises:
        ValueError: a figure is out of its range.
    """

    level: Level = "full"
    tenants: Mapping[str, Level] = {}
    """For tenants that are not to have `level`."""
    kinds: Sequence[Kind] = KINDS
    """What is taken out where content is redacted."""
    names: Callable[[str], list[Finding]] | None = None
    """Finds more that is taken out then, as `app.privacy.names` does: slowly, so not on the event loop."""
    share: float = 1.0
    """Of sessions whose content is kept at all, by chance; of the others only metadata is."""

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 <= self.share <= 1.0:
            raise ValueError("the share of sessions whose content is kept lies between 0 and 1")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is left out but what a request itself wants left out."""
        return self.share >= 1.0 and {self.level, *self.tenants.values()} == {"full"}

    def find(self, text: str) -> list[Finding]:
        """Find what is taken out of a text that is redacted; what has a form is surer than a name."""
        found = find(text, self.kinds)
        return found if self.names is None else joined(found, self.names(text))

    def redact(self, text: str) -> str:
        """Take it out."""
        return replaced(text, self.find(text))

    def redact_all(self, content: Any) -> Any:
        """The same structure with each text and each whole number in it redacted; keys are names and stay."""
        if isinstance(content, str):
            return self.redact(content)
        if isinstance(content, list | tuple):
            return [self.redact_all(each) for each in content]
        if isinstance(content, Mapping):
            return {key: self.redact_all(each) for key, each in content.items()}
        if isinstance(content, int):
            written = self.redact(as_said := str(content))
            return content if written == as_said else written
        return content

    def level_for(self, tenant: str) -> Level:
        """Say how much of a tenant's content is kept at most."""
        return self.tenants.get(tenant, self.level)

    def level_of(self, tenant: str, session: str, wish: Level | None = None) -> Level:
        """Say how much is kept of a request in `session`: a conversation, else a user, else the prediction itself."""
        given = self.level_for(tenant)
        if wish is None and self.share >= 1.0:  # As of most requests.
            return given
        chance: Level = "full" if self.share >= 1.0 or _lot(tenant, session) < self.share else "metadata"
        return strictest(given, wish or "full", chance)


def read_level(wish: str) -> Level:
    """Read how much a request wants kept.

    Raises:
        InvalidRequest: it is no level.
    """
    if wish not in LEVELS:
        raise InvalidRequest(
            f"`x-hallmark-keep`: give {', '.join(LEVELS)}, unlike {wish[:50]!r}.", param="x-hallmark-keep"
        )
    return wish


def strictest(*levels: Level) -> Level:
    """The one of these that keeps least."""
    return max(levels, key=LEVELS.index)


def is_redacted_from(kept: str, said: str) -> bool:
    """Whether `kept` is `said` with something else in place of each `[email]`, `[card]` ... in it, if anything."""
    first, *others = _PLACEHOLDER.split(kept)
    if not others:
        return kept == said
    *middle, last = others
    at = len(first)
    for part in middle:
        found = said.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return said.startswith(first) and said.endswith(last) and at <= len(said) - len(last)


_PLACEHOLDER = re.compile(r"\[[a-z_]{2,20}\]")


def _lot(tenant: str, session: str) -> float:
    """The same number from 0 to 1 whenever the session is asked about, so that a conversation is kept whole or not."""
    drawn = blake2b(f"{tenant}\0{session}".encode(errors="surrogatepass"), digest_size=8, person=b"kept content")
    return int.from_bytes(drawn.digest()) / (1 << 64)
