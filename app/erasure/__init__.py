"""Erasing a person or a conversation from all that is kept, and the durable record that this was done.

The main rule: what was begun is finished, by whichever process comes next; and nothing is called done before it was
looked for once more, after the answers that were under way had ended.
"""

from app.erasure.erasing import Eraser
from app.erasure.following import ErasureFollower
from app.erasure.records import Erasure, Erasures
from app.erasure.retention import Retention, Terms
from app.erasure.unused_keys import UnusedKeys

__all__ = ["Eraser", "Erasure", "ErasureFollower", "Erasures", "Retention", "Terms", "UnusedKeys"]
