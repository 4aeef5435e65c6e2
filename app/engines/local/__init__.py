"""The embedded engine: a small text-generation server of our own, run as its own process.

It is for a laptop or a CI machine without a GPU or a model hub: one torch thread batches continuously over a base
model and its hot-loaded LoRA adapters, and speaks TGI's protocol, so the gateway cannot tell it from a real one.
Main rule: this module and `server.EngineSettings` import nothing heavy; torch is loaded inside `server.serve`.

Flow of a request: `server` (HTTP) -> `protocol` (what is asked) -> `scheduler` (the engine thread) -> `model`
(forward passes of a batch) -> `sampler` (next token) -> `text` (text out of tokens) -> back through `server`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How one embedded engine runs.

    `model` is the built-in name, a folder in Hugging Face's layout, a `.gguf` file, or a model id on the hub.
    `threads` of torch; None leaves one core to the rest of the machine. `max_queue` counts the requests that wait
    beyond the `max_batch` that run together. `max_total_tokens` bounds prompt and answer together and is cut to
    what the model was trained for. `adapters` are (name, folder) pairs loaded before the port is bound.
    `token`, if set, is the bearer token every route but /health, /info and /metrics asks for.
    `parent_pid` is the direct parent, at whose death the engine ends; None lets it outlive its parent.
    """

    model: str = DEFAULT_MODEL
    host: str = "127.0.0.1"
    port: int = 8081
    threads: int | None = None
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    max_queue: int = 64
    max_batch: int = 16
    max_total_tokens: int = 4096
    max_adapters: int = 4
    cache_dir: Path = field(default_factory=lambda: Path.home() / ".cache" / "hallmark")
    adapters: tuple[tuple[str, Path], ...] = ()
    token: str | None = None
    parent_pid: int | None = None
