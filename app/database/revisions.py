"""What holds now in a table that is only ever appended to: of each slot the revision that none follows."""

from sqlalchemy import ColumnElement, Table, select


def is_latest(table: Table) -> ColumnElement[bool]:
    """The condition that no revision follows a row of `table`."""
    later = table.alias()
    following = select(later.c.row).where(later.c.slot == table.c.slot, later.c.revision == table.c.revision + 1)
    return ~following.exists()
