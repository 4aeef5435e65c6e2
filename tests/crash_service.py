"""The service as its own process, to be killed: `python -m tests.crash_service DATA_DIR ENGINE_URL`.

It prints a key once and its address when it serves; everything but the embedder is what runs in production.
"""

import asyncio
import sys
from pathlib import Path

import uvloop

from tests.service import live_service


async def main(data_dir: Path, engine_url: str) -> None:
    async with live_service(data_dir, engine_url=engine_url) as service:
        print(service.url, service.key, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), sys.argv[2]))
