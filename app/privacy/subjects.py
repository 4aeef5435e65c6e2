"""Pure: how a subject is known again when its name is gone."""

from hashlib import blake2b
from typing import Literal

SubjectKind = Literal["user", "conversation"]

CONVERSATION = "conversation:"
"""How the subject of a key begins that is a conversation; a user's is the name alone."""


def subject_digest(tenant: str, kind: SubjectKind, name: str) -> str:
    """What a subject is known by; who knows the name can tell that it is this one."""
    subject = f"{tenant}\0{kind}\0{name}".encode(errors="surrogatepass")
    return blake2b(subject, digest_size=16, person=b"erased subject").hexdigest()


def digest_of_keys(tenant: str, subject: str) -> str:
    """The digest of the subject that a key belongs to."""
    if subject.startswith(CONVERSATION):
        return subject_digest(tenant, "conversation", subject.removeprefix(CONVERSATION))
    return subject_digest(tenant, "user", subject)
