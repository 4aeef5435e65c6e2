"""How the privacy settings become parts: what is kept, under which names, and sealed by whose keys."""

from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from app.database import Database
from app.erasure import Terms, UnusedKeys
from app.feedback import Words
from app.predictions import Keeper, Pseudonym
from app.privacy.envelopes import Ring
from app.privacy.names import NAMES, CannotFindNames, NameFinder, open_names
from app.privacy.policies import Policy
from app.privacy.redaction import KINDS
from app.privacy.rings import FileRing, RingPlace, SharedRing
from app.privacy.sealing import BadKey, MasterKeys
from app.privacy.subject_keys import SubjectKeys
from app.settings import PrivacySettings

KEYS_FILE = Path("subject-keys") / "subject-keys.db"
"""Below the data directory, in a folder of its own, so that a backup can leave it out."""


class BadPrivacy(ValueError):
    """The privacy settings cannot be used as they are."""


@dataclass(frozen=True, slots=True)
class Privacy:
    """What the process needs to keep what it may, and to read it."""

    keeper: Keeper
    pseudonym: Pseudonym | None = None
    ring: FileRing | None = None
    masters: MasterKeys | None = None
    lines: str = field(default="", repr=False)
    """The master keys as they were given."""
    path: Path | None = None
    terms: Terms = field(default_factory=Terms)
    """How long each class of data is kept."""

    def place(self, *, is_local: bool) -> RingPlace | None:
        """Where a process that this one starts finds the keys."""
        if self.masters is None:
            return None
        return RingPlace(masters=self.lines, path=str(self.path) if is_local and self.path is not None else None)

    def words(self, ring: Ring | None) -> Words:
        """What keeps what is said of answers."""
        return Words(self.keeper.policy, pseudonym=self.pseudonym, ring=ring)

    def keys_of(self, shared: Database, *, is_local: bool) -> FileRing | SharedRing | None:
        """Where the keys of predictions are that are read from `shared`; `is_local`: it is the log's own file."""
        if self.masters is None or is_local:
            return self.ring
        return SharedRing(shared, self.masters)


async def own_unused_keys(
    privacy: Privacy, outbox: Path, shared: Database, clock: Callable[[], int], parts: AsyncExitStack
) -> UnusedKeys | None:
    """What destroys the unused keys in a replica's own file; with a single database the worker does.

    Used is what seals something in the replica's outbox, or what there still is of its keys in the shared database.
    """
    if privacy.ring is None or privacy.masters is None:
        return None
    elsewhere = SharedRing(shared, privacy.masters).held
    database = await parts.enter_async_context(Database.of_file(outbox))
    return UnusedKeys(database, privacy.ring, clock, elsewhere=elsewhere)


def open_privacy(settings: PrivacySettings, data_dir: Path, parts: AsyncExitStack | None = None) -> Privacy:
    """Read the master keys and open the file of subjects' keys; without `parts` nothing is written by this process.

    Raises:
        BadPrivacy: names the setting.
    """
    kinds = [kind for kind in KINDS if kind in settings.redact]
    policy = Policy(
        level=settings.content,
        tenants=settings.tenants,
        kinds=kinds,
        names=_names(settings) if parts is not None else None,
        share=settings.share,
    )
    lines, masters = _masters(settings)
    terms = Terms(**{name: getattr(settings, name) for name in Terms.__struct_fields__})
    if masters is None:
        return Privacy(Keeper(policy), terms=terms)
    pseudonym = masters.pseudonym if settings.pseudonyms else None
    path = data_dir / KEYS_FILE
    keys = None
    if parts is not None:
        keys = parts.enter_context(closing(SubjectKeys(path, masters)))
        if missing := keys.missing_masters():
            name = "privacy.master_key" if settings.master_key else "privacy.master_key_file"
            raise BadPrivacy(
                f"`{name}`: keys in {str(path)!r} are wrapped by {', '.join(missing)}, which is not there. Leave old "
                "lines below the new one; docs/privacy.md says what to do where one is lost."
            )
    return Privacy(
        Keeper(policy, pseudonym=pseudonym, keys=keys), pseudonym, FileRing(path, masters), masters, lines, path, terms
    )


def _names(settings: PrivacySettings) -> NameFinder | None:
    """What finds names, where somebody's content is redacted and names are to be taken out of it."""
    names = tuple(name for name in NAMES if name in settings.redact)
    if not names:
        return None
    try:
        return open_names(settings.names_model, names)
    except CannotFindNames as error:
        raise BadPrivacy(f"`privacy.redact`: {error}.") from error


def _masters(settings: PrivacySettings) -> tuple[str, MasterKeys | None]:
    lines, name = settings.master_key.get_secret_value() if settings.master_key else "", "privacy.master_key"
    if not lines and settings.master_key_file is not None:
        name = "privacy.master_key_file"
        try:
            lines = settings.master_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadPrivacy(f"`{name}`: {str(settings.master_key_file)!r} cannot be read: {error}.") from error
    elif not lines:
        return "", None
    try:
        return lines, MasterKeys.parse(lines)
    except BadKey as error:
        raise BadPrivacy(f"`{name}`: {error}.") from error
