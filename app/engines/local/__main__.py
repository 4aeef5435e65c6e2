"""`python -m app.engines.local`: the embedded engine from the command line."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from app.engines.local import EngineSettings
from app.engines.local.server import serve
from app.engines.local.weights import WeightsUnavailable

FROM_STDIN = "-"


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop; returns the process's exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        serve(settings_from(arguments))
    except (WeightsUnavailable, OSError) as error:
        logging.getLogger(__name__).error("%s", error)  # noqa: TRY400 - the message is the advice; a trace would bury it.
        return 1
    return 0


def settings_from(arguments: list[str] | None) -> EngineSettings:
    """Read the command line; the defaults are those of `EngineSettings`."""
    defaults = EngineSettings()
    parser = argparse.ArgumentParser("hallmark engine", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=defaults.model, help="built-in name, folder, .gguf file or hub id")
    parser.add_argument("--host", default=defaults.host)
    parser.add_argument(
        "--port", type=_number(0, 65535), default=defaults.port, help="0 lets the system choose; the log tells which"
    )
    parser.add_argument("--threads", type=_number(1), help="torch threads; one less than the cores if not given")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default=defaults.dtype, help="auto measures")
    parser.add_argument("--max-queue", type=_number(0), default=defaults.max_queue, help="requests waiting before 429")
    parser.add_argument("--max-batch", type=_number(1), default=defaults.max_batch, help="requests running together")
    parser.add_argument(
        "--max-total-tokens", type=_number(2), default=defaults.max_total_tokens, help="prompt plus answer"
    )
    parser.add_argument(
        "--max-adapters", type=_number(1), default=defaults.max_adapters, help="LoRA adapters held at once"
    )
    parser.add_argument("--cache-dir", type=Path, default=defaults.cache_dir, help="where converted weights are kept")
    parser.add_argument("--adapter", type=_named_folder, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--token", help="bearer token requests must carry; - reads it from stdin's first line")
    parser.add_argument("--parent-pid", type=int, help="end when this process, the direct parent, has ended")
    given = vars(parser.parse_args(arguments))
    if given["token"] == FROM_STDIN:
        given["token"] = sys.stdin.readline().strip()
    return EngineSettings(adapters=tuple(given.pop("adapter")), **given)


def _number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return read


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


if __name__ == "__main__":
    sys.exit(main())
