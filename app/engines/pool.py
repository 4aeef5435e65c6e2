"""Several engines that serve the same model, behind the protocol of one.

Each is asked every second how it is and how busy; a request goes to the one with the least to do. The main rule: an
engine that is dead or hung costs a request some time and never the answer, for as long as nothing of the answer was
handed out and another engine is left. What was refused as invalid is refused everywhere, and not tried again.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from app.engines import EngineInfo
from app.engines.breaker import Breaker
from app.engines.member import NOBODY_LISTENS, Member, MemberFacts, has_no_route, is_refused
from app.engines.startup import Startup
from app.engines.tgi import TGIEngine
from app.errors import EngineTimeout, EngineUnavailable, Overloaded, ServiceError
from app.messages import Generation, Message, Piece, Sampling

log = logging.getLogger(__name__)

T = TypeVar("T")
Prepare = Callable[[str, TGIEngine], Awaitable[None]]

PROBE_SECONDS = 1.5
LOAD_SECONDS = 0.5
EVERY_SECONDS = 1.0
"""From one probe to the next. A hang shortly after a probe: 0.5 + 1 + 2 x 1.5 s until the second miss, under 5."""

ABANDON_AFTER_MISSES = 3
"""Those that wait for a first token leave a member that is silent for one probe longer than its ejection takes."""

TRIAL_SECONDS = 60.0
PREPARE_SECONDS = 60.0
_TRIAL = Generation([Message("user", "Hello")], sampling=Sampling(max_tokens=1, temperature=0.0))


class EnginePool:
    """A group of engines; implements `app.engines.Engine`. Watches them for as long as its context is open.

    With one engine it adds nothing to a request: there is nobody to choose from. Whether that one is up is known all
    the same, and told by `is_up`.

    Args:
        name: the group's, for the log.
        engines: by a name that may be shown; the pool closes them.
        startup: what is known of starts, and the room to wait for one.
        warmups: requests sent to an engine that came up before callers' are, so that theirs is not the slow first.
        patience_seconds: the longest that one request waits for its first token, over all engines it tries.
        every_seconds: from one probe to the next.
        probe_seconds: the longest one may take.
    """

    def __init__(
        self,
        name: str,
        engines: Mapping[str, TGIEngine],
        *,
        startup: Startup | None = None,
        warmups: int = 1,
        patience_seconds: float = 600.0,
        every_seconds: float = EVERY_SECONDS,
        probe_seconds: float = PROBE_SECONDS,
        breaker: Callable[[], Breaker] = Breaker,
    ) -> None:
        if not engines:
            raise ValueError(f"the engine group {name!r} has no engines: give it `urls`")
        self.name = name
        self.startup = startup or Startup()
        self.is_up = True
        self.failovers = 0
        """Requests that were sent to another engine after the first had failed them."""
        self.prepare: Prepare = _unprepared
        """What an engine that came up is given before it is let in; it raises nothing but defects."""
        self._members = [Member(each, engine, breaker()) for each, engine in engines.items()]
        self._only = self._members[0].engine if len(self._members) == 1 else None
        self._warmups = warmups
        self._patience_seconds = patience_seconds
        self._every_seconds = every_seconds
        self._probe_seconds = probe_seconds
        self._choices = 0
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Begin to watch; returns before anything is known."""
        self._watchers = [
            asyncio.create_task(self._watch(member), name=f"engine {self.name} {member.name}")
            for member in self._members
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop watching, and close every connection."""
        tasks = [*self._watchers, *(member.looking for member in self._members if member.looking is not None)]
        self._watchers = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self._members:
            await member.engine.aclose()

    @property
    def members(self) -> list[MemberFacts]:
        """How each engine stands."""
        return [member.facts for member in self._members]

    @property
    def engines(self) -> Mapping[str, TGIEngine]:
        """The engines that are up, or all of them if none is, by name."""
        found = {member.name: member.engine for member in self._members if member.breaker.state == "closed"}
        return found or {member.name: member.engine for member in self._members}

    def generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        """Answer as `Engine.generate` promises, by whichever engine can."""
        return self._only.generate(generation) if self._only is not None else self._generate(generation)

    async def describe(self) -> EngineInfo:
        """Ask all that are up: of limits the lowest, of adapters what all of them serve.

        Raises:
            EngineUnavailable: none answers, or they serve different models.
        """
        if self._only is not None:
            return await self._only.describe()
        asked = self.engines
        answers = await asyncio.gather(*(engine.describe() for engine in asked.values()), return_exceptions=True)
        found: dict[str, EngineInfo] = {}
        for name, answer in zip(asked, answers, strict=True):
            if isinstance(answer, EngineInfo):
                found[name] = answer
            elif not isinstance(answer, ServiceError):
                raise answer
        if not found:
            raise self.startup.unavailable()
        served = {(asked[name].dialect.name, info.model_id, info.revision) for name, info in found.items()}
        if len(served) > len({dialect for dialect, *_ in served}):  # Two dialects may have two names for one model.
            models = ", ".join(f"{name} {info.model_id!r}" for name, info in found.items())
            raise EngineUnavailable(f"the engines of the group {self.name!r} serve different models: {models}")
        return _combined(list(found.values()))

    async def count_tokens(self, text: str) -> int:
        """Count the tokens of `text` by any engine that is up."""
        return await self._ask(lambda engine: engine.count_tokens(text))

    async def rate(self, question: str, texts: list[str]) -> list[float] | None:
        """Rate texts as `Engine.rate` promises, by any engine that is up."""
        return await self._ask(lambda engine: engine.rate(question, texts))

    async def healthy(self) -> bool:
        """Say whether a request would be sent to an engine now; never raises."""
        return self.is_up and (self._only is None or await self._only.healthy())

    async def wait_until_up(self) -> bool:
        """Wait as `Engine.wait_until_up` promises; an engine that is taken for up is looked at first."""
        if self.is_up:
            await asyncio.gather(*map(self._look_anew, self._members))
        if self.is_up:
            return False
        await self.startup.wait()
        return True

    # --- one request ---

    async def _generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        until = asyncio.get_running_loop().time() + self._patience_seconds
        tried: list[Member] = []
        told: ServiceError | None = None
        while (member := self._choose(tried)) is not None:
            self.failovers += bool(tried)
            tried.append(member)
            has_begun = False
            async with aclosing(member.engine.generate(generation)) as batches:
                try:
                    first = await _first(member, batches, until)
                    has_begun = True
                    member.breaker.succeeded()
                    yield first
                    async for batch in batches:
                        yield batch
                except ServiceError as error:
                    self._failed(member, error)
                    if has_begun or not error.retryable:
                        raise
                    # One that is full is a better reason to come back than one that is gone.
                    told = error if told is None or isinstance(error, Overloaded) else told
                else:
                    return
        raise told if told is not None and self.is_up else self.startup.unavailable()

    def _choose(self, tried: list[Member]) -> Member | None:
        """The member with the least to do of those up and not tried yet; of equals the one that rested longest."""
        fit = [member for member in self._members if member.breaker.state == "closed" and member not in tried]
        if not fit:
            return None
        chosen = min(fit, key=lambda member: (member.burden, member.chosen))
        self._choices += 1
        chosen.chosen = self._choices
        return chosen

    def _failed(self, member: Member, error: ServiceError) -> None:
        member.failed(asyncio.get_running_loop().time(), error)
        self._follow(member)

    async def _ask(self, question: Callable[[TGIEngine], Awaitable[T]]) -> T:
        """Put a question that is no generation to one engine after the other, until one answers."""
        told: ServiceError | None = None
        tried: list[Member] = []
        while (member := self._choose(tried)) is not None:
            tried.append(member)
            try:
                return await question(member.engine)
            except ServiceError as error:
                if not error.retryable:
                    raise
                told = error
        raise told or self.startup.unavailable()

    # --- watching ---

    async def _watch(self, member: Member) -> None:
        while True:
            try:
                await self._look(member)
                if member.breaker.state == "half_open":
                    await self._try_out(member)
            except Exception:
                log.exception("Watching the engine %s failed by a defect of ours; it goes on", member.name)
            is_missed = member.breaker.state == "closed" and member.breaker.misses > 0
            await asyncio.sleep(0.0 if is_missed else self._every_seconds)

    async def _look(self, member: Member) -> None:
        """Probe a member, or join the probe that is under way."""
        if member.looking is None or member.looking.done():
            member.looking = asyncio.create_task(self._probe(member), name=f"probe of {member.name}")
        await asyncio.shield(member.looking)

    async def _look_anew(self, member: Member) -> None:
        """Probe a member after a probe that is under way: that may have been answered before the engine went."""
        if member.looking is not None and not member.looking.done():
            await asyncio.shield(member.looking)
        await self._look(member)

    async def _probe(self, member: Member) -> None:
        clock, breaker = asyncio.get_running_loop().time, member.breaker
        began = clock()
        try:
            await member.engine.check(self._probe_seconds)
        except ServiceError as error:
            if has_no_route(error):
                breaker.answered(clock())
            elif is_refused(error):
                breaker.gone(clock(), NOBODY_LISTENS)
            elif isinstance(error, EngineUnavailable):
                breaker.missed(clock(), "says that it takes no work, or breaks off", at_once=True)
            elif member.engine.heard_at < began:
                # What is busy with a long prompt may leave a probe waiting; but then its answers go on.
                breaker.missed(clock(), f"does not answer probes: {error.code}")
        else:
            breaker.answered(clock())
        self._follow(member)
        if breaker.state == "closed" and not breaker.misses:
            member.note_load(await member.engine.load(LOAD_SECONDS))
        elif breaker.misses >= ABANDON_AFTER_MISSES:
            if any(each is not member and _is_up(each) for each in self._members):
                member.abandon()
            member.engine.give_up_unanswered()

    async def _try_out(self, member: Member) -> None:
        """Prepare a member that came back, and send it the requests that warm it up; if they are answered it is in."""
        breaker = member.breaker
        with suppress(TimeoutError):  # It answers what needs no preparation.
            async with asyncio.timeout(PREPARE_SECONDS):
                await self.prepare(member.name, member.engine)
        for _ in range(max(self._warmups, int(breaker.needs_trial))):
            try:
                async with asyncio.timeout(TRIAL_SECONDS), aclosing(member.engine.generate(_TRIAL)) as batches:
                    async for _ in batches:
                        pass
            except TimeoutError:
                self._failed(member, EngineTimeout("the trial was not answered in time"))
                return
            except ServiceError as error:
                if error.retryable and not isinstance(error, Overloaded):
                    self._failed(member, error)
                    return
                # It is busy, or particular about what it is asked: it lives.
        breaker.succeeded()
        self._follow(member)

    def _follow(self, member: Member) -> None:
        """Tell what has become of a member, and of the group with it."""
        is_up = _is_up(member)
        if is_up != member.was_up:
            member.was_up = is_up
            if is_up:
                log.info("The engine %s of the group %s is in again", member.name, self.name)
            else:
                log.warning("The engine %s of the group %s is out: %s", member.name, self.name, member.breaker.reason)
        self.is_up = any(map(_is_up, self._members))
        if self.is_up:
            self.startup.came_up()
        else:
            self.startup.went_away()


async def _unprepared(_name: str, _engine: TGIEngine) -> None:
    """Prepare nothing."""


def _is_up(member: Member) -> bool:
    return member.breaker.state == "closed"


async def _first(member: Member, batches: AsyncGenerator[list[Piece], None], until: float) -> list[Piece]:
    """Wait for the first batch, until the loop's clock shows `until` or the member is given up."""
    try:
        async with asyncio.timeout_at(until) as patience:
            member.patience.add(patience)
            try:
                return await anext(batches, [])
            finally:
                member.patience.discard(patience)
    except TimeoutError as error:
        raise EngineTimeout("the engine did not answer in time") from error


def _combined(infos: list[EngineInfo]) -> EngineInfo:
    """What holds whichever of the engines answers."""
    first, *others = infos

    def lowest(*limits: int | None) -> int | None:
        return min((limit for limit in limits if limit is not None), default=None)

    return msgspec.structs.replace(
        first,
        max_total_tokens=lowest(*(info.max_total_tokens for info in infos)),
        max_input_tokens=lowest(*(info.max_input_tokens for info in infos)),
        max_adapters=lowest(*(info.max_adapters for info in infos)),
        adapters=tuple(name for name in first.adapters if all(name in other.adapters for other in others)),
    )
