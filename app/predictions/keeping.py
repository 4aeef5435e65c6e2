"""Decides what of a prediction is written, before anything is: content dropped, redacted, or as it was said.

The main rule: this runs in the thread that writes records, on a copy, and what it leaves out reaches no disk. The
answer that the caller saw is untouched.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import msgspec

from app.predictions.prediction import Prediction
from app.predictions.rows import KEPT, Row, seal_row, sealed_by, to_row
from app.predictions.sealed import subject_of
from app.privacy.policies import Level, Policy
from app.privacy.redaction import Finding, replaced
from app.privacy.sealing import DataKey

Pseudonym = Callable[[str, str], str]
"""Of a tenant and a subject, the name under which the subject is kept."""

_USER_FIELDS = ("user", "safety_identifier")
"""Where a request says who asks, as OpenAI's API has it."""

_SAID = ("entity", "value")
"""What of a feature may be somebody's words or name."""


class SealingKeys(Protocol):
    """Gives each subject's key, from the thread that writes."""

    def making(self) -> AbstractContextManager[None]:
        """Put the keys made in the block on the disk at its end."""
        ...

    def of_subject(self, tenant: str, subject: str) -> DataKey:
        """Give the key of a subject, made if there is none."""
        ...

    def are_there(self, ids: Collection[str]) -> bool:
        """Whether the keys given out in the last `making` block still are."""
        ...


class Keeper:
    """Applies a policy to predictions, and makes rows of what it leaves.

    Args:
        policy: what is kept.
        pseudonym: names users; where it is None they are kept as the caller named them.
        keys: seal the content; where it is None it is written as it is.
    """

    def __init__(
        self, policy: Policy | None = None, *, pseudonym: Pseudonym | None = None, keys: SealingKeys | None = None
    ) -> None:
        self.policy = policy or Policy()
        self._pseudonym = pseudonym
        self._keys = keys
        self._keeps_all = self.policy.keeps_all

    @property
    def seals(self) -> bool:
        """Whether rows are sealed, by keys that have to be there when they are written."""
        return self._keys is not None

    def making(self) -> AbstractContextManager[None]:
        """Rows made in this block can be opened once it has ended: write them then."""
        return self._keys.making() if self._keys is not None else nullcontext()

    def row(self, prediction: Prediction) -> Row:
        """Give the row of a prediction as it is written; made inside `making`."""
        kept = self.keep(prediction)
        row = to_row(kept)
        row[KEPT] = row[KEPT] or "full"
        if self._keys is not None and kept.store:
            subject = subject_of(kept.user, kept.conversation, kept.created_at.isoformat())
            seal_row(row, kept, self._keys.of_subject(kept.tenant, subject))
        return row

    def can_open(self, rows: Iterable[Row]) -> bool:
        """Whether the keys of rows made in the last `making` block are still there; asked where they are written.

        A key goes when nothing is left that it sealed, in a transaction of the rows' database. Whoever has that to
        himself and finds the keys there can write: they stay, because of what he writes.
        """
        return self._keys is None or self._keys.are_there(sealed_by(rows))

    def keep(self, prediction: Prediction) -> Prediction:
        """Give what is written of a prediction: itself where that is all of it, else a copy.

        Raises:
            ValueError: the request that is to be looked through is not JSON.
        """
        pseudonym, user = self._pseudonym, prediction.user
        keeps_all = self._keeps_all and prediction.kept is None and prediction.store
        if keeps_all and (pseudonym is None or user is None):
            return prediction
        session = prediction.conversation or prediction.user or prediction.id
        wish = cast("Level | None", prediction.kept) if prediction.store else "metadata"
        kept = msgspec.structs.replace(prediction)
        kept.kept = level = self.policy.level_of(prediction.tenant, session, wish)
        kept.store = level != "metadata"
        if level != "full" and kept.metadata is not None:
            kept.metadata = self.policy.redact_all(kept.metadata)
        if level == "redacted":
            self._redact(kept)
        if pseudonym is not None and user is not None:
            self._rename(kept, user, pseudonym(prediction.tenant, user))
        return kept

    def named(self, prediction: Prediction) -> Prediction:
        """Give a prediction whose user goes by the name that is kept."""
        if self._pseudonym is None or prediction.user is None:
            return prediction
        kept = msgspec.structs.replace(prediction)
        kept.user = self._pseudonym(prediction.tenant, prediction.user)
        return kept

    def _redact(self, kept: Prediction) -> None:
        """Take personal data and secrets out of all that was said; the citations follow the answer's new offsets."""
        for name in ("request", "messages", "tool_calls"):
            if (content := getattr(kept, name)) is not None:
                setattr(kept, name, self.policy.redact_all(_plain(content)))
        if kept.features:
            kept.features = [
                {name: self.policy.redact_all(said) if name in _SAID else said for name, said in each.items()}
                for each in kept.features
            ]
        kept.question = kept.question and self.policy.redact(kept.question)
        kept.question_embedding = None  # It was made of the question as it was said.
        findings = self.policy.find(kept.answer) if kept.answer else []
        kept.answer = kept.answer and replaced(kept.answer, findings)
        if kept.citations:
            kept.citations = [self._quoting(_moved(citation, findings)) for citation in kept.citations]

    def _quoting(self, citation: dict[str, Any]) -> dict[str, Any]:
        """A citation with what it quotes redacted, which need not stand in the answer."""
        quote = citation.get("quote")
        return citation if quote is None else citation | {"quote": self.policy.redact(quote)}

    def _rename(self, kept: Prediction, user: str, name: str) -> None:
        kept.user = name
        if kept.features:
            kept.features = [each | ({"entity": name} if each.get("entity") == user else {}) for each in kept.features]
        if kept.store and kept.request is not None:
            request = _plain(kept.request)
            if isinstance(request, dict):
                kept.request = request | {field: name for field in _USER_FIELDS if request.get(field) == user}
                _rename_entity(kept.request, user, name)


def _rename_entity(request: dict[str, Any], user: str, name: str) -> None:
    """Put the name that is kept in place of a user whose features a request asks for."""
    features = request.get("features")
    entity = features.get("entity") if isinstance(features, dict) else None
    if isinstance(features, dict) and isinstance(entity, dict):
        renamed = {kind: name if each == user else each for kind, each in entity.items()}
        request["features"] = features | {"entity": renamed}


def _plain(content: Any) -> Any:
    """JSON's own types, whether it is JSON's bytes or anything that msgspec encodes."""
    if not isinstance(content, bytes | msgspec.Raw):
        return msgspec.to_builtins(content)
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ValueError("the request is not JSON") from error


def _moved(citation: dict[str, Any], findings: list[Finding]) -> dict[str, Any]:
    """A citation with its span of the redacted answer; a bound inside a finding goes to its end."""
    return citation | {
        name: _shifted(citation[name], findings)
        for name in ("answer_start", "answer_end")
        if isinstance(citation.get(name), int)
    }


def _shifted(offset: int, findings: list[Finding]) -> int:
    shift = 0
    for kind, start, end in findings:
        if start >= offset:
            break
        shift += len(kind) + 2 - (end - start)
        offset = max(offset, end)
    return offset + shift
