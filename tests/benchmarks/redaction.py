"""How much personal data is found, and how much that is none, on labelled texts; and what looking costs.

A span counts as found when a finding covers all of it, and a finding as false when no span of its kind touches it.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from app.privacy.redaction import find
from tests.benchmarks.tables import Table, write_into

KINDS = {
    "EMAIL_ADDRESS": "email",
    "CREDIT_CARD": "card",
    "IBAN_CODE": "iban",
    "PHONE_NUMBER": "phone",
    "US_SSN": "national_id",
    "IP_ADDRESS": "ip",
}


def main() -> None:
    """Print a table, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/privacy.md")
    options = parser.parse_args()
    folder = options.data / "pii_presidio_synth"
    rows = [
        row
        for name in ("generated_large", "generated_small")
        for row in json.loads((folder / f"{name}.json").read_text())
    ]
    spans, found, right, false = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        findings = find(row["full_text"])
        known = [(KINDS.get(s["entity_type"]), s["start_position"], s["end_position"]) for s in row["spans"]]
        for kind, start, end in known:
            if kind is not None:
                spans[kind] += 1
                found[kind] += any(f.start <= start and f.end >= end for f in findings)
        for f in findings:
            is_right = any(kind == f.kind and start < f.end and end > f.start for kind, start, end in known)
            (right if is_right else false)[f.kind] += 1
    result = {
        kind: {
            "spans": spans[kind],
            "recall": round(found[kind] / spans[kind], 4),
            "precision": round(right[kind] / max(right[kind] + false[kind], 1), 4),
        }
        for kind in sorted(spans)
    }
    rows_of_table = [
        (kind, str(f["spans"]), f"{f['recall']:.1%}", f"{f['precision']:.1%}") for kind, f in result.items()
    ]
    conditions = f"{len(rows)} synthetic texts of presidio-research, generated_large and generated_small."
    found_table = Table("redaction", conditions, ("kind", "spans", "recall", "precision"), list(rows_of_table))
    print(found_table.markdown())
    if options.write:
        write_into(Path("docs/privacy.md"), [found_table])
    text = "\n".join(row["full_text"] for row in rows)[: 64 * 2048]
    started = time.process_time()
    for at in range(0, len(text), 2048):
        find(text[at : at + 2048])
    milliseconds = (time.process_time() - started) * 1000 / 64
    print(json.dumps({"kinds": result, "texts": len(rows), "cpu_ms_a_2_kb": round(milliseconds, 3)}))


if __name__ == "__main__":
    main()
