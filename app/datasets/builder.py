"""Makes a version: gathers rows, sieves them, writes them, and makes them count all at once.

The main rule: work goes to a thread page by page, with a rest after each, so that answers go first.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from typing import Any, ParamSpec, Protocol, TypeVar

import msgspec

from app.datasets import sieve
from app.datasets.candidates import Candidates, Fact, Step
from app.datasets.examples import Unusable, line_of
from app.datasets.leaks import Leaks
from app.datasets.opinions import Opinion, row_of
from app.datasets.owners import name_owners, nobodys
from app.datasets.reading import Reading
from app.datasets.recipes import FORMAT, OTHER, SPLITS, Recipe, Split, fixed
from app.datasets.similarity import Texts, bare
from app.datasets.store import ROWS_AT_ONCE, Addition, Series, Store
from app.errors import Conflict, InvalidRequest
from app.lineage import canonical, dataset_digest
from app.predictions import Prediction

TEXTS_AT_ONCE = 200

MAX_COMPARISONS = 10
"""So often a build is compared with the datasets for the other purpose, if one gets a version each time meanwhile."""

T = TypeVar("T")
P = ParamSpec("P")


class PassageTexts(Protocol):
    """Where the text of passages is looked up."""

    async def texts(self, tenant: str, prediction: Prediction) -> dict[str, str]:
        """Give the texts of a prediction's passages by their ids, as far as they are still there."""
        ...


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """A version that a build came to; the one there was where nothing has changed."""

    number: int
    digest: str
    report: Any
    is_new: bool


Tell = Callable[[str], Awaitable[None]]


class Builder:
    """Builds versions.

    Args:
        store: where they are kept.
        reading: what they are made of.
        passages: where the text of passages is looked up; without it rows have their ids alone.
        rest: for each second of work so many seconds of rest, so that what else the process does goes first.
    """

    def __init__(
        self, store: Store, reading: Reading, *, passages: PassageTexts | None = None, rest: float = 0.0
    ) -> None:
        self._store = store
        self._reading = reading
        self._passages = passages
        self._rest = rest

    async def gather(self, series: Series, recipe: Recipe, found: Candidates) -> tuple[Recipe, Step]:
        """Make rows of predictions; gives the recipe with the end of its window, and what was counted."""
        recipe = fixed(recipe, datetime.now(UTC))
        count = await self._reading.count(series.tenant, recipe)
        split: Split | None = "heldout" if series.purpose == "evaluation" else None
        spoken_of = 0
        async for page in self._reading.pages(series.tenant, recipe):
            texts = [await self._texts(series.tenant, recipe, each) for each, _ in page]
            await self._work(_take, recipe, found, page, texts, split)
            spoken_of += len(page)
        found.dropped["unlabelled"] += max(0, count - spoken_of)
        return recipe, found.keep("query", found.facts, +found.dropped, noted={"predictions": count})

    async def build(
        self, series: Series, build: str, recipe: Recipe, found: Candidates, steps: list[Step], *, who: str, tell: Tell
    ) -> Built:
        """Make a version of the rows that were found.

        Raises:
            InvalidRequest: no row is left.
            Conflict: a question is in an evaluation set and the recipe refuses that; there always is more to compare
                with; or the claim is held no more.
        """
        await self._store.sweep(series.id, build=build)
        steps.append(found.keep("same", *await self._work(sieve.once, found.facts)))
        await tell("comparing")
        await self._dedup(recipe, found, steps)
        await self._keep_apart(found, steps)
        facts, count = found.facts, len(steps)
        for _ in range(MAX_COMPARISONS):
            built = await self._compare_and_publish(series, build, recipe, found, steps, who=who, tell=tell)
            if built is not None:
                return built
            await self._store.sweep(series.id, build=build)
            found.facts = facts
            del steps[count:]
        raise Conflict(f"Datasets for {OTHER[series.purpose]} get versions all the while. Start it again.")

    async def _compare_and_publish(
        self, series: Series, build: str, recipe: Recipe, found: Candidates, steps: list[Step], *, who: str, tell: Tell
    ) -> Built | None:
        """Make a version of what does not leak; None where there is more by now that it could leak from."""
        async with self._store.database.reading() as connection:
            apart_from = await self._store.versions_apart(connection, series)
        await self._check_leaks(series, recipe, found, steps)
        seed = recipe.split.seed
        steps.append(found.keep("balance", *sieve.balanced(found.facts, recipe.balance, seed)))
        steps.append(found.keep("limit", *sieve.limited(found.facts, recipe.max_rows, seed)))
        if not found.facts:
            dropped = sum((Counter(step.dropped) for step in steps), Counter())
            told = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
            raise InvalidRequest(f"No row is left: {told or 'nothing was found'}. Widen the recipe.", param="query")
        await tell("writing")
        return await self._publish(series, build, recipe, found, steps, who, apart_from)

    # --- the steps that compare ---

    async def _dedup(self, recipe: Recipe, found: Candidates, steps: list[Step]) -> None:
        if not recipe.dedup.near:
            return
        sessions = sieve.sessions_of(found.facts)
        texts = Texts()
        for some in _batches(sessions, TEXTS_AT_ONCE):
            await self._work(_add_sessions, texts, some, found)
        near = await self._work(texts.near, recipe.dedup.threshold)
        steps.append(found.keep("dedup", *sieve.without_repeats(sessions, near)))

    async def _keep_apart(self, found: Candidates, steps: list[Step]) -> None:
        """Compare both sides of the split: many conversations may ask the same, each with something else beside it."""
        questions: dict[str, str] = {}
        for facts in _batches(found.facts, TEXTS_AT_ONCE):
            questions |= await self._work(_questions, facts, found)
        steps.append(found.keep("heldout", *sieve.apart(found.facts, questions)))

    async def _check_leaks(self, series: Series, recipe: Recipe, found: Candidates, steps: list[Step]) -> None:
        """Compare with the datasets for the other purpose: what is trained on and what is measured by are apart."""
        other = OTHER[series.purpose]
        leaks = Leaks()
        async for page in self._reading.asked(series.tenant, other, but=series.name):
            await self._work(leaks.know, page)
        for facts in _batches(found.facts, TEXTS_AT_ONCE):
            await self._work(leaks.add, facts, found)
        leaking, sets = await self._work(leaks.find, recipe.leakage.threshold)
        if leaking and recipe.leakage.action == "refuse":
            told = ", ".join(f"{count} {name}" for name, count in sorted(sets.items()))
            raise Conflict(f"{len(leaking)} rows ask what {other} sets ask: {told}.", param="leakage")
        if recipe.leakage.action == "report":
            steps.append(found.keep("leakage", found.facts, Counter(), noted=sets))
        else:
            kept, dropped = sieve.without_leaks(found.facts, leaking, leaks.telling)
            steps.append(found.keep("leakage", kept, dropped, noted=sets))

    # --- writing ---

    async def _publish(
        self,
        series: Series,
        build: str,
        recipe: Recipe,
        found: Candidates,
        steps: list[Step],
        who: str,
        apart_from: int,
    ) -> Built | None:
        erased = await self._store.tombstones(series.tenant, [fact.digest for fact in found.facts])
        gone = _count("erased", sum(fact.digest in erased for fact in found.facts))
        kept = sorted((each for each in found.facts if each.digest not in erased), key=lambda fact: fact.digest)
        steps.append(found.keep("erased", kept, gone))
        digest = dataset_digest(fact.digest for fact in kept)
        report = {"steps": [_plain(step) for step in steps], "rows": sieve.composition(kept)}
        newest = await self._store.version(series.tenant, series.name, "latest") if series.revision else None
        if newest is not None and newest.digest == digest:
            await self._name_owners(series, build, found, kept)
            said = {"step": "unchanged", "version": newest.number, "report": canonical(report)}
            await self._store.release(series.id, build, "done", **said)
            return Built(number=newest.number, digest=digest, report=report, is_new=False)
        before = await self._store.digests(series, series.revision)
        hashes = {split: sha256() for split in SPLITS}
        for facts in _batches(kept, ROWS_AT_ONCE):
            added = await self._work(_additions, found, facts, before, hashes)
            await self._store.write(series, build, added=added)
        for some in _batches(sorted(before - {fact.digest for fact in kept}), ROWS_AT_ONCE):
            await self._store.write(series, build, removed=some)
        await self._name_owners(series, build, found, kept)
        manifest = {
            "format": FORMAT,
            "name": series.name,
            "version": str(series.revision + 1),
            "digest": digest,
            "task": recipe.task,
            "purpose": series.purpose,
            "splits": {
                split: {"rows": sum(fact.split == split for fact in kept), "sha256": hashes[split].hexdigest()}
                for split in SPLITS
            },
            "recipe": recipe.as_json(),
            "parent": newest.digest if newest else None,
            "licence": recipe.licence,
        }
        if recipe.task == "classify":
            manifest["labels"] = list(recipe.classes) or sorted({fact.class_name or "" for fact in kept})
        if recipe.task == "extract":
            manifest["schema"] = recipe.schema
        number = await self._store.publish(
            series,
            build,
            apart_from=apart_from,
            digest=digest,
            rows=len(kept),
            report=canonical(report),
            manifest=canonical(manifest),
            who=who,
        )
        return None if number is None else Built(number=number, digest=digest, report=report, is_new=True)

    async def _name_owners(self, series: Series, build: str, found: Candidates, kept: Sequence[Fact]) -> None:
        """Say whose rows are that were kept before anybody said it."""
        owned = [fact for fact in kept if fact.subject is not None]
        unnamed = await nobodys(self._store, series.tenant, [fact.digest for fact in owned])
        for facts in _batches((fact for fact in owned if fact.digest in unnamed), ROWS_AT_ONCE):
            contents = await self._work(list, map(found.content, facts))
            await name_owners(self._store, series, build, list(map(_addition, facts, contents)))

    async def _texts(self, tenant: str, recipe: Recipe, prediction: Prediction) -> dict[str, str]:
        if self._passages is None or recipe.task != "answer" or not prediction.passages:
            return {}
        return await self._passages.texts(tenant, prediction)

    async def _work(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do it in a thread, and rest."""
        started = time.monotonic()
        done = await asyncio.to_thread(do, *args, **kwargs)
        await asyncio.sleep(self._rest * (time.monotonic() - started))
        return done


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, so many at a time."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _lookup(known: Mapping[str, str]) -> Callable[[Mapping[str, Any]], str | None]:
    """What finds the text of a passage that a prediction was given."""
    return lambda passage: known.get(str(passage.get("id")))


def _take(
    recipe: Recipe,
    found: Candidates,
    page: Sequence[tuple[Prediction, Sequence[Opinion]]],
    texts: Sequence[dict[str, str]],
    split: Split | None,
) -> None:
    """Make rows of a page of predictions."""
    for (prediction, opinions), known in zip(page, texts, strict=True):
        try:
            found.add([row_of(recipe, prediction, opinions, _lookup(known), split=split)])
        except Unusable as error:
            found.dropped[error.reason] += 1


def _add_sessions(texts: Texts, sessions: Sequence[Sequence[Fact]], found: Candidates) -> None:
    """Compare sessions by all that they ask."""
    texts.add("\n".join(map(found.question, facts)) for facts in sessions)


def _questions(facts: Sequence[Fact], found: Candidates) -> dict[str, str]:
    """What rows ask, word for word, by their digests."""
    return {fact.digest: bare(found.question(fact)) for fact in facts}


def _additions(
    found: Candidates, facts: Sequence[Fact], before: set[str], hashes: Mapping[Split, Any]
) -> list[Addition]:
    """The rows of a page that are new, while the lines of all go into the digests of their files."""
    new = []
    for fact in facts:
        content = found.content(fact)
        line = line_of(fact.digest, fact.content_digest, content, fact.prediction_id, fact.label_id)
        hashes[fact.split].update(line.encode() + b"\n")
        if fact.digest not in before:
            new.append(_addition(fact, content))
    return new


def _addition(fact: Fact, content: str) -> Addition:
    return Addition(
        digest=fact.digest,
        content_digest=fact.content_digest,
        prediction_id=fact.prediction_id,
        label_id=fact.label_id,
        split=fact.split,
        subject=fact.subject,
        content=content,
    )


def _plain(step: Step) -> dict[str, Any]:
    return {"name": step.name, "kept": step.kept, "dropped": step.dropped, "noted": step.noted}


def _count(reason: str, count: int) -> Counter[str]:
    return Counter({reason: count} if count else {})
