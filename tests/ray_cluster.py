"""A Ray cluster of two nodes with a processor each, on this machine, for as long as its standard input is open.

It says its address first.

python -m tests.ray_cluster
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

NODES = 2


@asynccontextmanager
async def ray_cluster() -> AsyncIterator[str]:
    """Run one, in a process of its own; gives its address."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.ray_cluster",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stdin
    assert process.stdout
    try:
        while line := await process.stdout.readline():
            if line.startswith(b"cluster at "):
                break
        assert line, "the cluster ended before it could be used"
        yield line.decode().split()[2]
    finally:
        process.stdin.close()
        await process.wait()


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(NODES):
        cluster.add_node(num_cpus=1, object_store_memory=150_000_000, include_dashboard=False)
    cluster.wait_for_nodes()
    print("cluster at", cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
