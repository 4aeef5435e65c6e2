"""What a child process of the service does first, and how it is spoken to: messages on its standard input and output.

The main rule: nothing gets between two messages, and no child outlives the service. A message is eight bytes of length,
and then so many. `retrieval.children` is the other end.
"""

import ctypes
import os
import signal
import sys
from typing import BinaryIO

LENGTH_BYTES = 8
_PR_SET_PDEATHSIG = 1


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Where requests come from and answers go; what a library prints goes elsewhere from here on."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return requests, answers


def end_with_parent() -> None:
    """Have the kernel end this process with its parent; where it cannot, the end of the standard input has to do."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It died before we asked to be told.
        sys.exit(0)


def receive(requests: BinaryIO) -> bytes | None:
    """Wait for a message; None when there will be no more."""
    length = requests.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    message = requests.read(int.from_bytes(length, "big"))
    return message if len(message) == int.from_bytes(length, "big") else None


def send(answers: BinaryIO, message: bytes) -> None:
    """Send a message."""
    answers.write(len(message).to_bytes(LENGTH_BYTES, "big"))
    answers.write(message)
    answers.flush()
