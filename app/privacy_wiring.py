"""How the privacy settings become parts: what is kept, under which names, and sealed by whose keys."""

from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from app.database import Database
from app.predictions import Keeper, Keys, Pseudonym
from app.privacy.policies import Policy
from app.privacy.rings import FileRing, SharedRing
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

    def keys_of(self, shared: Database, *, is_local: bool) -> Keys | None:
        """Where the keys of predictions are that are read from `shared`; `is_local`: it is the log's own file."""
        if self.masters is None or is_local:
            return self.ring
        return SharedRing(shared, self.masters)


def open_privacy(settings: PrivacySettings, data_dir: Path, parts: AsyncExitStack | None = None) -> Privacy:
    """Read the master keys and open the file of subjects' keys; without `parts` nothing is written by this process.

    Raises:
        BadPrivacy: names the setting.
    """
    policy = Policy(level=settings.content, tenants=settings.tenants, kinds=settings.redact, share=settings.share)
    masters = _masters(settings)
    if masters is None:
        return Privacy(Keeper(policy))
    pseudonym = masters.pseudonym if settings.pseudonyms else None
    path = data_dir / KEYS_FILE
    keys = None
    if parts is not None:
        keys = parts.enter_context(closing(SubjectKeys(path, masters)))
    return Privacy(Keeper(policy, pseudonym=pseudonym, keys=keys), pseudonym, FileRing(path, masters), masters)


def _masters(settings: PrivacySettings) -> MasterKeys | None:
    lines, name = settings.master_key.get_secret_value() if settings.master_key else "", "privacy.master_key"
    if not lines and settings.master_key_file is not None:
        name = "privacy.master_key_file"
        try:
            lines = settings.master_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadPrivacy(f"`{name}`: {str(settings.master_key_file)!r} cannot be read: {error}.") from error
    elif not lines:
        return None
    try:
        return MasterKeys.parse(lines)
    except BadKey as error:
        raise BadPrivacy(f"`{name}`: {error}.") from error
