"""How much personal data is found, and how much that is none, on labelled texts; and what looking costs.

A span counts as found when a finding covers all of it, and a finding as false when no span of its kind touches it.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.privacy.names import open_names
from app.privacy.redaction import Finding, find
from tests.benchmarks.tables import Table, write_into

Finder = Callable[[str], list[Finding]]

KINDS = {
    "EMAIL_ADDRESS": "email",
    "CREDIT_CARD": "card",
    "IBAN_CODE": "iban",
    "PHONE_NUMBER": "phone",
    "US_SSN": "national_id",
    "IP_ADDRESS": "ip",
}


NAMES = {"PERSON": "person", "LOCATION": "place"}
MAY_BE_PLACES = ("LOCATION", "ADDRESS")
"""A place within an address is no false one; an address as a whole is not looked for."""


def main() -> None:
    """Print a table, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--names", metavar="MODEL", help="also find names, by this spaCy model")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/privacy.md")
    options = parser.parse_args()
    folder = options.data / "pii_presidio_synth"
    rows = [
        row
        for name in ("generated_large", "generated_small")
        for row in json.loads((folder / f"{name}.json").read_text())
    ]
    conditions = f"{len(rows)} synthetic texts of presidio-research, generated_large and generated_small"
    tables = [measured("redaction", f"{conditions}.", rows, find, KINDS)]
    finders: dict[str, Finder] = {"forms": find}
    if options.names:
        names = finders["names"] = open_names(options.names)
        tables.append(measured("names", f"{conditions}, by {options.names}.", rows, names, NAMES))
    for table in tables:
        print(table.markdown(), end="\n\n")
    if options.write:
        write_into(Path("docs/privacy.md"), tables)
    texts = {
        "": "\n".join(row["full_text"] for row in rows),
        "_of_findings_only": "\n".join(
            row["full_text"][f.start : f.end] for row in rows for f in find(row["full_text"])
        ),
    }
    cost = {
        f"{name}_cpu_ms_a_2_kb{of}": round(milliseconds(finder, text[: 64 * 2048]), 3)
        for name, finder in finders.items()
        for of, text in texts.items()
    }
    print(json.dumps({"tables": {table.name: table.rows for table in tables}, "texts": len(rows), **cost}))


def measured(name: str, conditions: str, rows: list[Any], finder: Finder, kinds: dict[str, str]) -> Table:
    """Count what a finder finds of what the texts are labelled with."""
    spans, found, right, false = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        findings = finder(row["full_text"])
        known = [(s["entity_type"], s["start_position"], s["end_position"]) for s in row["spans"]]
        for entity, start, end in known:
            if kind := kinds.get(entity):
                spans[kind] += 1
                found[kind] += any(f.start <= start and f.end >= end for f in findings)
        for f in findings:
            same = [
                span
                for span in known
                if kinds.get(span[0]) == f.kind or (f.kind == "place" and span[0] in MAY_BE_PLACES)
            ]
            (right if any(start < f.end and end > f.start for _, start, end in same) else false)[f.kind] += 1
    table = Table(name, conditions, ("kind", "spans", "recall", "precision"))
    for kind in sorted(spans):
        precision = right[kind] / max(right[kind] + false[kind], 1)
        table.rows.append((kind, str(spans[kind]), f"{found[kind] / spans[kind]:.1%}", f"{precision:.1%}"))
    return table


def milliseconds(finder: Finder, text: str) -> float:
    """CPU for 2 KB of a text: of each piece the best of five, since other processes cost caches too."""
    pieces = [text[at : at + 2048] for at in range(0, len(text) - 2047, 2048)]

    def once(piece: str) -> float:
        started = time.process_time()
        finder(piece)
        return time.process_time() - started

    return sum(min(once(piece) for _ in range(5)) for piece in pieces) * 1000 / len(pieces)


if __name__ == "__main__":
    main()
