"""Quality per release: every figure is what anybody would compute from the rows, in either database."""

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from app.access import KeyStore
from app.database import Database
from app.errors import InvalidRequest, Unavailable
from app.feedback import Given, Stated
from app.predictions import Prediction, Where, created_at, uuid7
from app.predictions.history import first_id
from app.quality import Figure, Gauges, Quality, ReleaseQuality, Report
from app.quality.answers import MAX_RELEASES, SHARES
from app.rollouts import Rollout
from observability.estimates import mean, mean_score, quantile
from observability.matching import exact_match, token_f1
from observability.metrics import Metrics
from tests.review_world import World, emptied, person, prediction, replica

CLASSES = ("billing", "contract", "other")
NOW = datetime.now(UTC)


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    async with replica(await emptied(module_database_url)) as world:
        yield world


@pytest.fixture
def quality(world: World) -> Quality:
    return Quality(world.database)


def made(at: datetime, **facts: Any) -> Prediction:
    return prediction(id=first_id(at)[:14] + uuid7()[14:], **facts)


def by_name(release: ReleaseQuality) -> dict[tuple[str, str | None], Figure]:
    found = {(each.name, each.class_name): each for each in release.figures}
    assert len(found) == len(release.figures)
    return found


async def only_release(quality: Quality, **where: Any) -> dict[tuple[str, str | None], Figure]:
    (release,) = (await quality.report("acme", Where(**where))).releases
    return by_name(release)


def assert_is(found: Figure, expected: Any) -> None:
    for name in ("value", "low", "high", "effective_n"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9), name
    assert (found.n, found.method) == (expected.n, expected.method)


# --- what every answer tells ---


def traffic(count: int = 700) -> list[Prediction]:
    """Answers of two releases in conversations, by users and by nobody; some fail, abstain, are cut or asked again."""
    chance = random.Random(11)
    rows = []
    for n in range(count):
        conversation = f"c{chance.randrange(40)}" if chance.random() < 0.5 else None
        question = f"q{chance.randrange(3)}" if conversation else None
        release = f"desk@{1 + (int(conversation[1:]) if conversation else n) % 2}"
        answer = "x" * chance.choice([0, 10, 10, 40])
        verdict = chance.choice(
            [
                "answered",
                "answered",
                "abstained:nothing_relevant",
                "abstained:engine_abstained",
                "abstained:empty_answer",
                None,
            ]
        )
        spans = [(chance.randrange(20), chance.randrange(20, 40)) for _ in range(chance.randrange(3))]
        citations = (
            None
            if verdict is None
            else [
                {"status": chance.choice(["supported", "weak"]), "answer_start": start, "answer_end": end, "quote": "…"}
                for start, end in spans
            ]
        )
        rows.append(
            made(
                NOW - timedelta(hours=2) + timedelta(seconds=n),
                release_name=release,
                outcome=chance.choices(["finished", "failed", "cancelled", "interrupted"], [90, 4, 4, 2])[0],
                conversation=conversation,
                user=f"u{chance.randrange(9)}" if chance.random() < 0.3 else None,
                question=question,
                answer=answer or None,
                verdict=verdict,
                citations=citations,
                finish_reason=chance.choice(["stop", "stop", "length", "content_filter", None]),
                store=chance.random() < 0.9,
                prompt_tokens=chance.choice([None, chance.randrange(1_000)]),
                completion_tokens=chance.randrange(300),
                total_seconds=chance.lognormvariate(0, 1),
                first_token_seconds=chance.choice([None, chance.random()]),
            )
        )
    return rows


def session(row: Prediction) -> str:
    return f"c{row.conversation}" if row.conversation else f"u{row.user}" if row.user else row.id


def recomputed(rows: list[Prediction]) -> dict[str, Any]:  # noqa: C901 - a list of definitions.
    """Every figure of one release's rows once more, from their definitions in the documentation, all at once."""
    done = [row for row in rows if row.outcome == "finished"]
    shares: Mapping[str, list[tuple[Prediction, float]]] = defaultdict(list)
    for row in rows:
        if row.outcome != "cancelled":
            shares["failed"].append((row, row.outcome != "finished"))
    following: dict[str, Prediction] = {}
    for row in reversed(done):
        verdict = row.verdict or ""
        shares["abstained"].append((row, verdict.split(":")[0] == "abstained"))
        shares["refused"].append((row, "engine_abstained" in verdict or row.finish_reason == "content_filter"))
        if row.store:
            shares["empty"].append((row, row.answer is None or verdict == "abstained:empty_answer"))
        if row.finish_reason is not None:
            shares["truncated"].append((row, row.finish_reason == "length"))
        if row.store and row.answer and row.citations is not None and not verdict.startswith("abstained"):
            covered = {at for each in row.citations for at in range(each["answer_start"], each["answer_end"])}
            shares["citation_coverage"].append((row, min(1.0, len(covered) / len(row.answer))))
        if row.conversation and row.store:
            after = following.get(row.conversation)
            shares["regenerated"].append((row, after is not None and after.question == row.question))
            following[row.conversation] = row
    found = {
        name: mean_score([value for _, value in pairs], sessions=[session(row) for row, _ in pairs])
        for name, pairs in shares.items()
    }
    for name in ("prompt_tokens", "completion_tokens"):
        known = [row for row in done if getattr(row, name) is not None]
        found[name] = mean([getattr(row, name) for row in known], sessions=[session(row) for row in known])
    for name in ("first_token_seconds", "total_seconds"):
        known = [row for row in done if getattr(row, name) is not None]
        for suffix, share in (("median", 0.5), ("p95", 0.95)):
            values = [getattr(row, name) for row in known]
            found[f"{name}_{suffix}"] = quantile(values, share, sessions=[session(row) for row in known])
    return found


async def test_figures_of_every_answer_are_those_recomputed_from_the_rows(world, quality):
    rows = traffic()
    await world.ship(rows)
    await world.ship([made(NOW - timedelta(hours=1), tenant="other", release_name="desk@1", answer=None)])
    await world.ship([made(NOW - timedelta(days=9), release_name="desk@1", answer=None)])
    report = await quality.report("acme", Where())
    assert [each.release for each in report.releases] == ["desk@1", "desk@2"]
    for release in report.releases:
        mine = [row for row in rows if row.release_name == release.release]
        assert release.answers == sum(row.outcome == "finished" for row in mine)
        found = by_name(release)
        for name, expected in recomputed(mine).items():
            assert_is(found[name, None], expected)
        cited = [row.citations for row in mine if row.outcome == "finished" and row.citations]
        statuses = [each["status"] for citations in cited for each in citations]
        supported = found["citations_supported", None]
        assert supported.value == pytest.approx(statuses.count("supported") / len(statuses))
        assert supported.n == len(cited)
        assert supported.low < supported.value < supported.high


async def test_a_page_more_or_less_changes_nothing(world, quality):
    rows = traffic(2_300)  # Three pages.
    await world.ship(rows)
    (first, _) = (await quality.report("acme", Where())).releases
    mine = [row for row in rows if row.release_name == first.release]
    for name, expected in recomputed(mine).items():
        assert_is(by_name(first)[name, None], expected)


async def test_a_release_without_answers_in_the_window_is_not_reported(world, quality):
    await world.ship([made(NOW - timedelta(days=9))])
    assert (await quality.report("acme", Where())).releases == []
    (release,) = (await quality.report("acme", Where(since=NOW - timedelta(days=10)))).releases
    assert release.answers == 1


async def test_the_window_is_half_open_and_names_itself(world, quality):
    start = NOW.replace(microsecond=0) - timedelta(hours=5)
    await world.ship([made(start + timedelta(minutes=n)) for n in range(4)])
    report = await quality.report("acme", Where(since=start + timedelta(minutes=1), until=start + timedelta(minutes=3)))
    assert [each.answers for each in report.releases] == [2]
    assert (report.since, report.until) == (start + timedelta(minutes=1), start + timedelta(minutes=3))


async def test_a_tenants_report_holds_nothing_of_another(world, quality):
    (mine,) = await world.predict()
    (theirs,) = await world.predict(tenant="other", release_name="theirs@1")
    await world.rate(mine, rating=True)
    await world.feedback.give(person("u", "acme"), Given(prediction_id=theirs, rating=False))
    await world.labels.state(person("r", "acme"), Stated(prediction_id=theirs, class_name="wrong"))
    (release,) = (await quality.report("acme", Where())).releases
    assert (release.release, release.labelled) == ("hallmark@1", 0)
    assert by_name(release)["thumbs_up", None].n == 1
    assert (await quality.report("nobody", Where())).releases == []


async def test_thumbs_count_as_their_author_says_now(world, quality):
    ids = await world.predict(6)
    for number, id_ in enumerate(ids):
        await world.rate(id_, rating=number < 2)
    await world.rate(ids[0], rating=False)  # Changed.
    await world.rate(ids[5], rating=4.0)  # No thumb any more.
    found = (await only_release(quality))["thumbs_up", None]
    assert (found.n, found.value) == (5, pytest.approx(1 / 5))


async def test_too_many_releases_are_refused_by_name(world, quality):
    await world.ship([prediction(release_name=f"r@{n}") for n in range(MAX_RELEASES + 1)])
    with pytest.raises(InvalidRequest, match="release") as refusal:
        await quality.report("acme", Where())
    assert refusal.value.param == "release"
    assert len((await quality.report("acme", Where(release="r@7"))).releases) == 1


# --- what labels tell ---


async def label(world: World, id_: str, *, by: str = "anna", **said: Any) -> None:
    await world.labels.state(person(by), Stated(prediction_id=id_, **said))


async def classified(world: World, *, sampled: bool, count: int = 240) -> list[tuple[Prediction, str, float | None]]:
    """Answers that name classes, with their true ones: a queue prefers the doubtful, which are wrong more often."""
    chance = random.Random(5)
    rows = []
    for n in range(count):
        truth = chance.choice(CLASSES)
        is_doubtful = chance.random() < 0.3
        is_right = chance.random() < (0.5 if is_doubtful else 0.9)
        said = truth if is_right else chance.choice([*CLASSES, "no class at all"])
        probability = (0.8 if is_doubtful else 0.2) if sampled else None
        row = prediction(answer=f" {said}\n", conversation=f"c{n // 3}")
        if probability is None or chance.random() < probability:
            rows.append((row, truth, probability))
    await world.ship([row for row, _, _ in rows])
    policy = "low_support" if sampled else None
    await asyncio.gather(
        *(
            label(world, row.id, class_name=truth, policy=policy, sampling_probability=probability)
            for row, truth, probability in rows
        )
    )
    return rows


@pytest.mark.parametrize("sampled", [False, True], ids=["unweighted", "sampled"])
async def test_classes_are_scored_as_scikit_learn_does(world, quality, sampled):
    rows = await classified(world, sampled=sampled)
    (release,) = (await quality.report("acme", Where())).releases
    assert (release.sampled, release.labelled) == (sampled, len(rows))
    found = by_name(release)
    truths = [truth for _, truth, _ in rows]
    answers = [row.answer.strip() for row, _, _ in rows]
    weights = [1 / (probability or 1) for _, _, probability in rows]
    accuracy = found["accuracy", None]
    assert accuracy.value == pytest.approx(accuracy_score(truths, answers, sample_weight=weights))
    assert accuracy.method == ("hajek" if sampled else "wilson")
    assert accuracy.low < accuracy.value < accuracy.high
    assert 0 < accuracy.effective_n <= accuracy.n == len(rows)
    options: dict[str, Any] = {"labels": CLASSES, "sample_weight": weights, "zero_division": np.nan}
    for average in ("micro", "macro", None):
        expected = precision_recall_fscore_support(truths, answers, average=average, **options)
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            if average:
                assert found[f"{name}_{average}", None].value == pytest.approx(value)
            else:
                each = {class_name: found[name, class_name].value for class_name in CLASSES}
                assert each == pytest.approx(dict(zip(CLASSES, value, strict=True)))
    for class_name in CLASSES:
        share = sum(w for w, truth in zip(weights, truths, strict=True) if truth == class_name) / sum(weights)
        assert found["class_share", class_name].value == pytest.approx(share)
    sessions = [row.conversation for row, _, _ in rows]
    right = [truth == answer for truth, answer in zip(truths, answers, strict=True)]
    assert_is(accuracy, mean_score(right, [1 / weight for weight in weights], sessions=sessions))


async def test_labels_that_judge_answers_are_shares_of_classes_and_no_accuracy(world, quality):
    ids = await world.predict(10)
    for number, id_ in enumerate(ids):
        await label(world, id_, class_name="wrong" if number < 3 else "right")
    found = await only_release(quality)
    assert found["class_share", "wrong"].value == pytest.approx(0.3)
    assert ("accuracy", None) not in found


async def test_labels_of_unknown_probability_are_left_out_beside_sampled_ones(world, quality):
    ids = await world.predict(6)
    for number, id_ in enumerate(ids):
        sampled = {"policy": "uniform", "sampling_probability": 0.5} if number < 4 else {}
        await label(world, id_, class_name="right" if number < 2 else "wrong", **sampled)
    (release,) = (await quality.report("acme", Where())).releases
    assert (release.labelled, release.labels_left_out, release.sampled) == (4, 2, True)
    share = by_name(release)["class_share", "right"]
    # All the same probability: as if unweighted.
    assert (share.value, share.n, share.method) == (0.5, 4, "wilson")


async def test_of_several_labels_the_commonest_class_counts_and_every_right_answer(world, quality):
    (id_,) = await world.predict(answer="four weeks")
    for by, said in {"anna": "right", "ben": "wrong", "cleo": "wrong"}.items():
        await label(world, id_, by=by, class_name=said)
    for by, answer in {"dora": "Four weeks.", "emil": "a month"}.items():
        await label(world, id_, by=by, answer=answer)
    await label(world, id_, by="fred", class_name="right")
    await world.labels.withdraw(person("fred"), (await world.labels.find("acme", prediction_id=id_, limit=1))[0].id)
    found = await only_release(quality)
    assert found["class_share", "wrong"].value == 1.0
    assert found["class_share", "wrong"].n == 1
    assert found["exact_match", None].value == found["token_f1", None].value == 1.0


async def test_right_answers_are_matched_as_squad_does(world, quality):
    pairs = [("four weeks", "Four weeks."), ("two weeks notice", "four weeks"), ("no idea", "a month"), (None, "x")]
    for said, right in pairs:
        (id_,) = await world.predict(answer=said)
        await label(world, id_, answer=right)
    found = await only_release(quality)
    known = [(said, right) for said, right in pairs if said is not None]
    assert_is(found["exact_match", None], mean_score([exact_match(said, [right]) for said, right in known]))
    assert_is(found["token_f1", None], mean_score([token_f1(said, [right]) for said, right in known]))


async def test_a_judge_of_all_answers_makes_the_interval_of_labels_narrower(world, quality):
    chance = random.Random(9)
    right = [chance.random() < 0.6 for _ in range(600)]
    ids = await world.predict(600)
    await judge_all(world, ids, [is_right if chance.random() < 0.85 else not is_right for is_right in right])
    labelled = list(zip(ids, right, strict=True))[::2]
    await asyncio.gather(
        *(
            label(world, id_, class_name="right" if is_right else "wrong", sampling_probability=0.5)
            for id_, is_right in labelled
        )
    )
    found = await only_release(quality)
    for name in ("right", "wrong"):
        share = found["class_share", name]
        plain = mean_score([is_right == (name == "right") for is_right in right[::2]])
        assert share.method == "prediction-powered"
        assert share.effective_n > share.n == 300
        assert share.high - share.low < 0.9 * (plain.high - plain.low)
        assert share.low < sum(each == (name == "right") for each in right) / 600 < share.high
    assert found["class_share", "right"].value + found["class_share", "wrong"].value == pytest.approx(1)


async def test_a_judge_of_a_few_answers_is_not_used(world, quality):
    ids = await world.predict(200)
    await judge_all(world, ids[:100], [number % 3 > 0 for number in range(100)])
    said = ("right" if number % 2 else "wrong" for number in range(100))
    await asyncio.gather(*(label(world, id_, class_name=each) for id_, each in zip(ids[:100], said, strict=True)))
    assert (await only_release(quality))["class_share", "right"].method == "wilson"


async def judge_all(world: World, ids: list[str], scores: list[bool]) -> None:
    judge = person("judge")
    said = (Given(prediction_id=id_, source="judge", rating=score) for id_, score in zip(ids, scores, strict=True))
    await asyncio.gather(*(world.feedback.give(judge, each) for each in said))


async def test_the_delay_of_labels_is_from_the_answer_to_its_first_label(world, quality):
    rows = [made(NOW - timedelta(hours=hours)) for hours in (1, 2, 3)]
    await world.ship(rows)
    for row in rows:
        await label(world, row.id, class_name="right")
        await label(world, row.id, by="ben", class_name="right")
    stated = {each.prediction_id: each.id for each in await world.labels.find("acme") if each.author.endswith("anna")}
    delay = (await only_release(quality))["label_delay_seconds_median", None]
    expected = (created_at(stated[rows[1].id]) - created_at(rows[1].id)).total_seconds()
    assert delay.value == pytest.approx(expected)
    assert (delay.n, delay.unit) == (3, "seconds")


# --- how it is kept ---


async def test_a_report_is_kept_for_a_while_and_not_for_another_question(world, quality):
    await world.predict()
    first = await quality.report("acme", Where())
    await world.predict()
    assert await quality.report("acme", Where()) is first
    (release,) = (await quality.report("acme", Where(release="hallmark"))).releases
    assert release.answers == 2


async def test_every_figure_without_rows_says_so(world, quality):
    await world.predict(outcome="failed", answer=None)
    found = await only_release(quality)
    assert {name for name, _ in found} >= set(SHARES)
    abstained = found["abstained", None]
    assert (abstained.value, abstained.low, abstained.high, abstained.n) == (None, 0.0, 1.0, 0)
    assert found["failed", None].value == 1.0
    assert not math.isnan(found["failed", None].high)


# --- on /metrics ---


async def test_metrics_show_the_shares_of_serving_releases_and_nothing_that_users_name(world):
    await world.ship([prediction(release_name=f"hallmark@{n % 3 + 1}", user=f"u{n}") for n in range(30)])
    await world.ship([prediction(tenant="other", verdict="abstained:nothing_relevant")])
    await world.ship([made(NOW - timedelta(hours=25))])
    for id_ in await world.predict(2, answer="billing"):
        await label(world, id_, class_name="billing")
    for tenant in ("acme", "other"):
        await KeyStore(world.database).create(name="k", tenant=tenant, scopes=["chat"])
    metrics = Metrics(version="0", process=False)

    async def rollouts() -> list[Rollout]:
        return [Rollout(name="hallmark", revision=1, stable=1, canary=3), Rollout(name="idle", revision=1, stable=1)]

    await Gauges(Quality(world.database), rollouts=rollouts, show=metrics.judged).refresh()
    families = {each.name: each for each in text_string_to_metric_families(metrics.render()[0].decode())}
    shown = {
        (each.labels["release"], each.labels["figure"]): each.value
        for each in families["hallmark_quality_answers"].samples
    }
    assert {release for release, _ in shown} == {"hallmark@1", "hallmark@3"}
    assert all(set(each.labels) == {"release", "figure"} for each in families["hallmark_quality"].samples)
    assert shown["hallmark@1", "abstained"] == 13  # Ten, one of the other tenant, two that are labelled.
    assert shown["hallmark@1", "accuracy"] == 2
    assert ("hallmark@1", "class_share") not in shown
    values = {
        (each.labels["release"], each.labels["figure"]): each.value for each in families["hallmark_quality"].samples
    }
    assert values["hallmark@1", "abstained"] == pytest.approx(1 / 13)
    (at,) = families["hallmark_quality_timestamp_seconds"].samples
    assert abs(at.value - datetime.now(UTC).timestamp()) < 60


async def test_metrics_are_computed_again_and_survive_an_outage():
    outcomes = [Unavailable("The database is away.", retry_after_seconds=1.0), RuntimeError("a defect"), None]
    shown = asyncio.Event()

    class Flaky(Quality):
        async def of_releases(self, releases, *, window):
            if not outcomes:
                await asyncio.Event().wait()
            if (failure := outcomes.pop(0)) is not None:
                raise failure
            return Report(since=NOW, until=NOW, computed_at=NOW, labels_are_cut=False, releases=[])

    async def rollouts() -> list[Rollout]:
        return []

    flaky = Flaky(Database("sqlite://"))
    gauges = Gauges(flaky, rollouts=rollouts, show=lambda *_: shown.set(), every_seconds=0.0, first_after_seconds=0.0)
    async with gauges:
        await asyncio.wait_for(shown.wait(), 20)
    assert outcomes == []
