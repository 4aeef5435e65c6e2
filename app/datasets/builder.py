"""Makes a version: gathers rows, sieves them, writes them, and makes them count all at once.

The main rule: work goes to a thread page by page, with a rest after each, so that answers go first.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from typing import Any, Protocol, TypeVar

import msgspec

from app.datasets import sieve
from app.datasets.candidates import Candidates, Fact, Step
from app.datasets.examples import Unusable, line_of
from app.datasets.opinions import Opinion, row_of
from app.datasets.reading import Asked, Reading
from app.datasets.recipes import FORMAT, SPLITS, Recipe, fixed
from app.datasets.similarity import Texts, bare
from app.datasets.store import ROWS_AT_ONCE, Addition, Series, Store
from app.errors import Conflict, InvalidRequest
from app.lineage import canonical, dataset_digest
from app.predictions import Prediction

TEXTS_AT_ONCE = 200
MAX_COMPARED = 200_000
"""Questions of other datasets that a build compares with."""

T = TypeVar("T")


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
        spoken_of = 0
        async for page in self._reading.pages(series.tenant, recipe):
            texts = [await self._texts(series.tenant, recipe, each) for each, _ in page]
            await self._work(lambda page=page, texts=texts: _take(recipe, found, page, texts))
            spoken_of += len(page)
        found.dropped["unlabelled"] += max(0, count - spoken_of)
        return recipe, found.keep("query", found.facts, +found.dropped, predictions=count)

    async def build(
        self, series: Series, build: str, recipe: Recipe, found: Candidates, steps: list[Step], *, who: str, tell: Tell
    ) -> Built:
        """Make a version of the rows that were found.

        Raises:
            InvalidRequest: no row is left.
            Conflict: a question is in an evaluation set and the recipe refuses that; or the claim is held no more.
        """
        await self._store.sweep(series.id, build=build)
        steps.append(found.keep("same", *await self._work(lambda: sieve.once(found.facts))))
        await tell("comparing")
        await self._dedup(recipe, found, steps)
        await self._check_leaks(series, recipe, found, steps)
        seed = recipe.split.seed
        steps.append(found.keep("balance", *sieve.balanced(found.facts, recipe.balance, seed)))
        steps.append(found.keep("limit", *sieve.limited(found.facts, recipe.max_rows, seed)))
        if not found.facts:
            dropped = sum((Counter(step.dropped) for step in steps), Counter())
            told = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
            raise InvalidRequest(f"No row is left: {told or 'nothing was found'}. Widen the recipe.", param="query")
        await tell("writing")
        return await self._publish(series, build, recipe, found, steps, who)

    # --- the steps that compare ---

    async def _dedup(self, recipe: Recipe, found: Candidates, steps: list[Step]) -> None:
        if not recipe.dedup.near:
            return
        sessions = sieve.sessions_of(found.facts)
        texts = Texts()
        for some in _batches(sessions, TEXTS_AT_ONCE):
            await self._work(lambda some=some: texts.add("\n".join(map(found.question, facts)) for facts in some))
        near = await self._work(lambda: texts.near(recipe.dedup.threshold))
        steps.append(found.keep("dedup", *sieve.without_repeats(sessions, near)))

    async def _check_leaks(self, series: Series, recipe: Recipe, found: Candidates, steps: list[Step]) -> None:
        """Compare with the datasets for the other purpose: what is trained on and what is measured by are apart."""
        other = "evaluation" if series.purpose == "training" else "training"
        known, sessions = dict[str, str](), dict[str, str]()
        async for page in self._reading.asked(series.tenant, other, but=series.name):
            await self._work(lambda page=page: _note(page, known, sessions))
            if len(known) > MAX_COMPARED:
                raise InvalidRequest(
                    f"More than {MAX_COMPARED:,} questions of other datasets are to be compared with.", param="leakage"
                )
        texts = Texts()
        for some in _batches(known, TEXTS_AT_ONCE):
            await self._work(lambda some=some: texts.add(some))
        asked: list[str] = []
        for facts in _batches(found.facts, TEXTS_AT_ONCE):
            questions = await self._work(lambda facts=facts: [bare(found.question(fact)) for fact in facts])
            await self._work(lambda questions=questions: texts.add(questions))
            asked += questions
        near = await self._work(lambda: texts.near(recipe.leakage.threshold, keeping=len(known)))
        names = list(known.values())
        leaking, sets = dict[str, str](), Counter[str]()
        for at, (fact, question) in enumerate(zip(found.facts, asked, strict=True)):
            original = near[len(known) + at]
            name = known.get(question) or sessions.get(fact.session)
            if name is None and original is not None and original < len(known):
                name = names[original]
                leaking[fact.digest] = "leak_near"
            elif name is not None:
                leaking[fact.digest] = "leak_exact" if question in known else "leak_session"
            if name is not None:
                sets[f"in_{name}"] += 1
        telling = {
            fact.digest: len(question) >= sieve.MIN_TELLING
            for fact, question in zip(found.facts, asked, strict=True)
            if fact.digest in leaking
        }
        if leaking and recipe.leakage.action == "refuse":
            told = ", ".join(f"{count} {name}" for name, count in sorted(sets.items()))
            raise Conflict(f"{len(leaking)} rows ask what {other} sets ask: {told}.", param="leakage")
        if recipe.leakage.action == "report":
            steps.append(found.keep("leakage", found.facts, Counter(), **sets))
        else:
            steps.append(found.keep("leakage", *sieve.without_leaks(found.facts, leaking, telling), **sets))

    # --- writing ---

    async def _publish(
        self, series: Series, build: str, recipe: Recipe, found: Candidates, steps: list[Step], who: str
    ) -> Built:
        erased = await self._store.tombstones(series.tenant, [fact.digest for fact in found.facts])
        gone = _count("erased", sum(fact.digest in erased for fact in found.facts))
        kept = sorted((each for each in found.facts if each.digest not in erased), key=lambda fact: fact.digest)
        steps.append(found.keep("erased", kept, gone))
        digest = dataset_digest(fact.digest for fact in kept)
        report = {"steps": [_plain(step) for step in steps], "rows": sieve.composition(kept)}
        newest = await self._store.version(series.tenant, series.name, "latest") if series.revision else None
        if newest is not None and newest.digest == digest:
            await self._store.release(series.id, build)
            return Built(number=newest.number, digest=digest, report=report, is_new=False)
        before = await self._store.digests(series, series.revision)
        hashes = {split: sha256() for split in SPLITS}
        for facts in _batches(kept, ROWS_AT_ONCE):
            added = await self._work(lambda facts=facts: list(_additions(found, facts, before, hashes)))
            await self._store.write(series, build, added=added)
        for some in _batches(sorted(before - {fact.digest for fact in kept}), ROWS_AT_ONCE):
            await self._store.write(series, build, removed=some)
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
            digest=digest,
            rows=len(kept),
            report=canonical(report),
            manifest=canonical(manifest),
            who=who,
        )
        return Built(number=number, digest=digest, report=report, is_new=True)

    async def _texts(self, tenant: str, recipe: Recipe, prediction: Prediction) -> dict[str, str]:
        if self._passages is None or recipe.task != "answer" or not prediction.passages:
            return {}
        return await self._passages.texts(tenant, prediction)

    async def _work(self, do: Callable[[], T]) -> T:
        started = time.monotonic()
        done = await asyncio.to_thread(do)
        await asyncio.sleep(self._rest * (time.monotonic() - started))
        return done


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, so many at a time."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _take(
    recipe: Recipe,
    found: Candidates,
    page: Sequence[tuple[Prediction, Sequence[Opinion]]],
    texts: Sequence[dict[str, str]],
) -> None:
    """Make rows of a page of predictions."""
    for (prediction, opinions), known in zip(page, texts, strict=True):
        try:
            found.add([row_of(recipe, prediction, opinions, lambda each, known=known: known.get(str(each.get("id"))))])
        except Unusable as error:
            found.dropped[error.reason] += 1


def _note(page: Sequence[Asked], known: dict[str, str], sessions: dict[str, str]) -> None:
    for each in page:
        known.setdefault(bare(each.question), each.dataset)
        sessions.setdefault(each.session, each.dataset)


def _additions(
    found: Candidates, facts: Sequence[Fact], before: set[str], hashes: dict[Any, Any]
) -> Iterator[Addition]:
    """The rows of a page that are new, while the lines of all go into the digests of their files."""
    for fact in facts:
        content = found.content(fact)
        line = line_of(fact.digest, fact.content_digest, content, fact.prediction_id, fact.label_id)
        hashes[fact.split].update(line.encode() + b"\n")
        if fact.digest not in before:
            yield Addition(
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
