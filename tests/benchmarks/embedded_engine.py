"""What the embedded engine costs with its real model: tokens per CPU-second alone and in company, and a cold start.

CPU time of the engine's process is counted, not wall time: it holds on a busy machine. Run from the repository root:
`python tests/benchmarks/embedded_engine.py`. The last line is JSON; the exit status is 1 when a requirement fails.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from app.engines.local import EngineSettings
from app.engines.local.weights import find_weights

PROMPT_TOKENS = 138
ANSWER_TOKENS = 64
ROUNDS = 3
REQUIRED_GAIN = 3.0
REQUIRED_COLD_START_CPU_SECONDS = 10.0
TOPICS = ("a lighthouse", "the sea", "bread", "an old clock", "a garden", "trains", "the moon", "a violin")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def engine() -> Iterator[tuple[str, int]]:
    """Start the engine with one thread and yield its address and process id."""
    command = [
        sys.executable,
        "-m",
        "app.engines.local",
        "--port",
        "0",
        "--threads",
        "1",
        "--parent-pid",
        str(os.getpid()),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line.rstrip())
            if "ready on " in line:
                yield line.split("ready on ")[1].strip(), process.pid
                break
    finally:
        process.terminate()
        process.communicate()


async def prompt(client: httpx.AsyncClient, topic: str) -> dict[str, object]:
    """Build a request whose rendered prompt has exactly `PROMPT_TOKENS` tokens."""
    text = f"Write a very long and detailed story about {topic}."
    while True:
        messages = [{"role": "user", "content": text}]
        rendered = (await client.post("/chat_tokenize", json={"messages": messages})).json()
        missing = PROMPT_TOKENS - len(rendered["tokenize_response"])
        if missing <= 0:
            break
        text += " and" * missing
    return {"messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}


async def tokens_per_cpu_second(url: str, pid: int, concurrency: int) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        requests = [await prompt(client, topic) for topic in TOPICS[:concurrency]]
        tokens, before = 0, cpu_seconds(pid)
        for _ in range(ROUNDS):
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=each) for each in requests))
            for answer in answers:
                usage = answer.json()["usage"]
                assert usage["prompt_tokens"] == PROMPT_TOKENS, usage
                tokens += usage["completion_tokens"]
        return tokens / (cpu_seconds(pid) - before)


def main() -> int:
    settings = EngineSettings()
    find_weights(settings.model, settings.cache_dir)  # The conversion happens once per machine and is not measured.
    started = time.monotonic()
    with engine() as (url, pid):
        cold_start = {"cpu_seconds": round(cpu_seconds(pid), 2), "wall_seconds": round(time.monotonic() - started, 2)}
        asyncio.run(tokens_per_cpu_second(url, pid, 1))  # Warm.
        rates = {count: asyncio.run(tokens_per_cpu_second(url, pid, count)) for count in (1, 4, 8)}
    gain = rates[8] / rates[1]
    result = {
        "tokens_per_cpu_second": {str(count): round(rate, 1) for count, rate in rates.items()},
        "gain_at_8": round(gain, 2),
        "required_gain": REQUIRED_GAIN,
        "cold_start": cold_start,
        "required_cold_start_cpu_seconds": REQUIRED_COLD_START_CPU_SECONDS,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "rounds": ROUNDS,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))
    return int(gain < REQUIRED_GAIN or cold_start["cpu_seconds"] >= REQUIRED_COLD_START_CPU_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
