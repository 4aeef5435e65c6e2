"""How many examples a property is tried with: `make test` tries a quarter of those that `make test-slow` does."""

from typing import Any

from hypothesis import settings

QUICK, SLOW = "quick", "slow"
MANY = 100
# How long an example takes says more about the machine than about the code.
settings.register_profile(QUICK, deadline=None, max_examples=MANY // 4)
settings.register_profile(SLOW, deadline=None, max_examples=MANY)


def examples(many: int, **more: Any) -> settings:
    """Try so many where others try a hundred, for what costs more or needs more than usual."""
    return settings(max_examples=max(4, many * settings.default.max_examples // MANY), **more)
