"""API keys: who calls, for which tenant and whom in it, what they may do, and how much.

The main rule: keys are rows of the database that all gateways share, and a request is checked against a copy of them in
memory that follows within a second and outlives the database. So a database that is down never turns a valid key away,
not even at a start: what was known last is kept in a file too.
"""

from app.access.commands import create_key, list_keys, revoke_key, update_key
from app.access.keys import SCOPES, ApiKey, Caller
from app.access.ring import Access
from app.access.store import KeyStore
from app.access.users import UserTokens

__all__ = [
    "SCOPES",
    "Access",
    "ApiKey",
    "Caller",
    "KeyStore",
    "UserTokens",
    "create_key",
    "list_keys",
    "revoke_key",
    "update_key",
]
