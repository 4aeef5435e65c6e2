"""The first five minutes: start the service if need be, load the example documents, ask two questions."""

import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

from app.access import create_key
from app.client import Client, ServiceFailure
from app.loading import load
from app.sources.folder import Folder
from app.terminal import show_sources

QUESTIONS = (
    "How long may a document be before it is split into several passages?",
    "What is the phone number of the support team in Sydney?",
)
"""One that the handbook answers, and one that it does not."""

START_SECONDS = 900.0
"""The first start converts the embedded engine's weights, on a slow machine for minutes."""


def run_demo(
    console: Console,
    *,
    url: str,
    examples: Path,
    data_dir: Path,
    database: Path | str,
    start: bool,
    local_engine: bool = True,
) -> None:
    """Ask the two questions; a service that is started has the embedded engine with `local_engine`.

    `database` is where the service keeps its keys, by its path or URL.

    Raises:
        ServiceFailure: the service cannot be reached, or refuses.
    """
    if not examples.is_dir():
        raise ServiceFailure(f"There is no folder {str(examples)!r}; name one with --examples.")
    data_dir.mkdir(parents=True, exist_ok=True)
    key = _demo_key(data_dir, database)
    with Client(url, key) as client:
        log_file = data_dir / "service.log"
        process = None
        if start and client.readiness() is None:
            process = _start(*_address(url), data_dir, log_file, local_engine=local_engine)
        alive = (lambda: process.poll() is None) if process else (lambda: True)
        with console.status("waiting for the service") as status:
            try:
                client.wait_until_ready(
                    START_SECONDS if start else 15.0,
                    on_wait=lambda missing: status.update(f"waiting: {escape(missing)}"),
                    alive=alive,
                )
            except ServiceFailure as error:
                raise ServiceFailure(f"{error} See {log_file}." if process else str(error)) from error
        load(client, {str(examples): Folder(examples)})
        for question in QUESTIONS:
            console.print(f"\n[bold cyan]Q[/] {escape(question)}")
            answer = client.ask(question, model="hallmark")
            console.print(f"[bold cyan]A[/] {escape(answer['choices'][0]['message']['content'])}", soft_wrap=True)
            show_sources(console, answer)
            console.print(
                f"    prediction {answer['id']}, release digest {answer['system_fingerprint'][:12]}", style="dim"
            )
    console.print(f"\nThe service runs at [bold]{url}[/] (API: {url}/docs).")
    console.print(f"API key: [bold]{key}[/]", soft_wrap=True)
    console.print(
        f'Try: hallmark ask --url {url} --key {key} "How do I revoke an API key?"', soft_wrap=True, style="dim"
    )


def _address(url: str) -> tuple[str, int]:
    """Where a service at `url` has to listen on this machine; raises ServiceFailure if that cannot be."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port or 80
        is_ours = parts.scheme == "http" and (host == "localhost" or ip_address(host).is_loopback)
    except ValueError:  # The port is no number, or the host a name.
        is_ours = False
    if not is_ours or parts.path.strip("/"):
        raise ServiceFailure(
            f"Nothing answers at {url}, and --start starts a service on this machine only, such as "
            "http://127.0.0.1:8080."
        )
    return host, port


def _start(host: str, port: int, data_dir: Path, log_file: Path, *, local_engine: bool) -> subprocess.Popen[bytes]:
    """Start the service and a worker in the background, in sessions of their own so that they outlive this command."""
    serve = ["serve", "--host", host, "--port", str(port), *(["--local-engine"] if local_engine else [])]
    process = _spawn(serve, data_dir, log_file)
    (data_dir / "service.pid").write_text(f"{process.pid}\n")
    worker = _spawn(["worker"], data_dir, data_dir / "worker.log")
    (data_dir / "worker.pid").write_text(f"{worker.pid}\n")
    return process


def _spawn(command: list[str], data_dir: Path, log_file: Path) -> subprocess.Popen[bytes]:
    with log_file.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own module, with arguments of ours.
            [sys.executable, "-m", "app", *command, "--data-dir", str(data_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _demo_key(data_dir: Path, database: Path | str) -> str:
    """The demo's own key, made on first use and kept where only the owner can read it."""
    file = data_dir / "demo.key"
    if file.exists():
        return file.read_text().strip()
    scopes = ("chat", "documents:read", "documents:write", "predictions:read", "feedback:write", "metrics")
    _, secret = create_key(database, name="demo", scopes=scopes)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secret + "\n")
    return secret
