"""What the statistics of quality, canaries and drift promise, tried on traffic, beside what others do.

Prints the tables and writes them into docs/quality.md. Seeds are fixed, so that only another version of a library
changes a figure. The exit code is 1 when a promise is not kept.

    python -m tests.benchmarks.quality_statistics [--data ../shared/data] [--only rollback ...] [--share 0.3] [--quick]
        [--print-only]

Without clinc150 in --data the tables about questions stay as they are. All of it takes about an hour of CPU; --quick
does a tenth of the runs and writes nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.benchmarks import simulated_canaries as canaries
from tests.benchmarks import simulated_drift as drift
from tests.benchmarks import simulated_labels as labels
from tests.benchmarks.tables import Table, write_into

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"


def tables(scale: float, data: Path) -> dict[str, Callable[[], Table]]:
    """How to make each table, with a share of its runs."""

    def runs(full: int) -> int:
        return max(20, round(full * scale))

    made: dict[str, Callable[[], Table]] = {
        "accuracy": lambda: labels.accuracy_table(runs(2000)),
        "classes": lambda: labels.classes_table(runs(1000)),
        "label-free": lambda: labels.label_free_table(runs(200)),
        "rollback": lambda: canaries.rollback_table(runs(1000)),
        "promotion": lambda: canaries.promotion_table(runs(1000)),
        "equal": lambda: canaries.equal_table(runs(1000)),
        "outputs": lambda: drift.output_table(runs(500)),
    }
    if (data / "clinc150").is_dir():

        @cache
        def corpus() -> drift.Corpus:
            return drift.load_corpus(data)

        made["questions"] = lambda: drift.question_table(corpus(), runs(300))
        made["reference"] = lambda: drift.reference_table(corpus(), runs(60), 40)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the statistics, and what others do, on simulated traffic.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds clinc150")
    parser.add_argument("--only", nargs="+", default=[], help="names of tables")
    parser.add_argument("--share", type=float, default=1.0, help="of the runs; each table says how many it rests on")
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs; nothing is written")
    parser.add_argument("--print-only", action="store_true", help="write nothing into docs/quality.md")
    options = parser.parse_args()
    known = tables(0.1 if options.quick else options.share, options.data)
    if unknown := set(options.only) - known.keys():
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    failures = []
    for name in options.only or known:
        before = time.process_time()
        table = known[name]()
        print(f"\n{table.name} ({time.process_time() - before:.0f} s of CPU)\n\n{table.markdown()}", flush=True)
        failures += table.failures
        if not (options.quick or options.print_only):
            write_into(PAGE, [table])
    for failure in failures:
        print(f"FAILED {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
