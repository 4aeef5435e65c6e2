"""Pure: what belongs together, and on which side of the split it is."""

from hashlib import blake2b, sha256

from app.datasets.recipes import Split, Splitting

_BITS = 64


def session_of(tenant: str, own: str, conversation: str | None, user: str | None, *, by: str = "conversation") -> str:
    """The digest of what a row belongs to: its conversation, else its user, or the other way; else itself."""
    whose = [("c", conversation), ("u", user)]
    for kind, name in whose if by == "conversation" else reversed(whose):
        if name:
            return _digest(f"{tenant}\0{kind}{name}")
    return _digest(f"{tenant}\0p{own}")


def conversation_of(tenant: str, name: str | None) -> str | None:
    """The digest of a conversation, which is also its session unless users are kept together; None without a name."""
    return session_of(tenant, "", name, None) if name else None


def split_of(session: str, plan: Splitting) -> Split:
    """The side of a session. It depends on nothing else, so a session that comes later moves no other."""
    return "heldout" if _chance(plan.seed, session) < plan.heldout else "train"


def rank(seed: str, identity: str) -> bytes:
    """The place of a row in a queue in which chance has put all rows, whichever others there are."""
    return blake2b(identity.encode(), key=sha256(seed.encode()).digest(), digest_size=16).digest()


def _chance(seed: str, session: str) -> float:
    keyed = blake2b(session.encode(), key=sha256(b"split" + seed.encode()).digest(), digest_size=_BITS // 8)
    return int.from_bytes(keyed.digest()) / (1 << _BITS)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]
