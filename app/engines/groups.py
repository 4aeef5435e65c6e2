"""The engines of this service, by the names that releases call them."""

from collections.abc import AsyncGenerator, Mapping
from time import perf_counter

from app.engines import Engine, EngineInfo
from app.errors import EngineUnavailable, ServiceError
from app.messages import Generation, Piece

INFO_SECONDS = 60.0
"""How long an engine's description of its limits is believed before it is asked again."""

NO_INFO_SECONDS = 5.0
"""How long an engine that did not describe itself is not asked again."""


class EngineGroups:
    """Gives a release its engine."""

    def __init__(self, groups: Mapping[str, Engine]) -> None:
        self._groups = dict(groups)
        self._infos: dict[str, tuple[EngineInfo | None, float]] = {}

    @property
    def names(self) -> list[str]:
        """What a release can be told to use."""
        return sorted(self._groups)

    def of(self, name: str) -> Engine:
        """The group of that name; one that the settings do not have is never up, and says so when it is asked."""
        found = self._groups.get(name)
        return found if found is not None else _NoEngine(name, self.names)

    async def token_limit(self, name: str) -> int | None:
        """Tokens a prompt and its answer may have together on that group; None when its engine does not say."""
        info, until = self._infos.get(name, (None, 0.0))
        if perf_counter() > until:
            try:
                info = await self.of(name).describe()
                until = perf_counter() + INFO_SECONDS
            except ServiceError:
                # The call itself is about to tell what is wrong with the engine; what it said before still holds.
                until = perf_counter() + NO_INFO_SECONDS
            self._infos[name] = info, until
        return (info.max_total_tokens or info.max_input_tokens) if info else None


class _NoEngine:
    """Stands for a group that the settings do not have any more."""

    is_up = False

    def __init__(self, name: str, known: list[str]) -> None:
        self._told = f"this service has no engine {name!r}, which the release names; it has {', '.join(known)}"

    async def generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:  # noqa: ARG002 - the protocol's.
        raise self._error
        yield []

    async def describe(self) -> EngineInfo:
        raise self._error

    async def count_tokens(self, text: str) -> int:  # noqa: ARG002 - the protocol's.
        raise self._error

    async def rate(self, question: str, texts: list[str]) -> list[float] | None:  # noqa: ARG002 - the protocol's.
        raise self._error

    async def healthy(self) -> bool:
        return False

    async def wait_until_up(self) -> bool:
        raise self._error

    async def aclose(self) -> None:
        pass

    @property
    def _error(self) -> EngineUnavailable:
        return EngineUnavailable(self._told)
