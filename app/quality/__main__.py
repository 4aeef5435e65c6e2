"""`python -m app.quality`: makes one report, at a low priority, and ends; `app.quality.apart` starts it."""

import asyncio
import os
import sys
import threading
from contextlib import suppress

import msgspec

from app.database import Database
from app.drift import Drift
from app.errors import InvalidRequest, Unavailable
from app.quality.apart import Order, Reply
from app.quality.making import Maker


def main() -> None:
    """Read an order, make the report, say it."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    _give_way(idle=order.idle)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(_reply(order))))
    sys.stdout.buffer.flush()
    os._exit(0)  # The thread that reads would be waited for.


async def _reply(order: Order) -> Reply:
    try:
        async with Database(order.url) as database:
            keys = order.keys.opened(database) if order.keys is not None else None
            maker = Maker(database, rest=order.rest, keys=keys, drifted=Drift(database).drifted)
            return Reply(report=await maker.make(order.asked))
    except InvalidRequest as error:
        return Reply(refused=error.message, param=error.param)
    except Unavailable as error:
        return Reply(unavailable=error.message)
    except Exception as error:  # noqa: BLE001 - the outermost edge: what a driver says may quote content.
        return Reply(failed=type(error).__name__)


def _give_way(*, idle: bool) -> None:
    """Let others go first, or run only while nothing else wants to: also each thread that is started from here."""
    with suppress(OSError):
        os.nice(19 if idle else 10)
    if idle and sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
