"""New databases at the current schema, copied from one that was migrated: all steps of the history cost a second.

What is about migrating makes its databases otherwise: tests of the history, and whatever starts a service on nothing.
"""

import functools
import tempfile
from pathlib import Path

from app.database import connect


def migrated(path: Path) -> Path:
    """Put an empty SQLite database of the current schema at `path`, unless there is one, and give the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(_migrated_file())
    return path


@functools.cache
def _migrated_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "template.db"
        connect(path).close()
        return path.read_bytes()
