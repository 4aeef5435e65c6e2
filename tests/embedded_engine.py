"""The embedded engine as a process of its own, with adapters, as `hallmark engine` starts it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def embedded_engine(model: str, adapters: dict[str, Path], *options: str) -> Iterator[str]:
    """Run the engine on a free port of loopback until the block ends; gives its address."""
    command = [sys.executable, "-m", "app.engines.local", "--model", model, "--port", "0", *options]
    command += [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield _address(process)
    finally:
        process.kill()
        process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"ready on (\S+)", line):
            return found[1]
    raise AssertionError("the engine did not start:\n" + "".join(lines))
