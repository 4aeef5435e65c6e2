"""How a SQLite file keeps its journal."""

import sqlite3
import time
from typing import Any

LONGEST_BYTES = 16 << 20
"""What is left of a journal that grew while somebody read, once it begins anew: it is a quarter of that otherwise."""

_RETRY_SECONDS = 0.005


def write_ahead(connection: Any, busy_seconds: float) -> None:
    """Have a file written ahead (WAL), through its DBAPI connection; that a file already is costs nothing.

    Of two processes that open a new file at once, SQLite tells one at once that it is locked, whatever the connection's
    own patience: it asks again here.

    Raises:
        sqlite3.OperationalError: the file was locked for `busy_seconds`, or cannot be used.
    """
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA journal_size_limit={LONGEST_BYTES}")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        else:
            return
        time.sleep(_RETRY_SECONDS)
