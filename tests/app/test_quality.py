"""Quality per release: every figure is what anybody would compute from the rows, in either database."""

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from app.errors import InvalidRequest
from app.feedback import Given, Stated
from app.predictions import Prediction, Where, created_at, uuid7
from app.predictions.history import first_id
from app.quality import Figure, Quality, ReleaseQuality
from app.quality.answers import SHARES
from app.quality.figures import MAX_RELEASES
from app.quality.labels import Labelled, label_figures, weighed
from app.quality.making import Maker
from app.review import Finding
from observability.estimates import Moments, mean, mean_score, prediction_powered, quantile
from observability.matching import exact_match, token_f1
from tests.postgres import on_either_kind
from tests.review_world import EPOCH, World, emptied, person, prediction, replica

CLASSES = ("billing", "contract", "other")
NOW = datetime.now(UTC)


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    async with replica(await emptied(module_database_url)) as world:
        yield world


@pytest.fixture
def quality(world: World) -> Quality:
    return Quality(Maker(world.database).make)


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
                valid=chance.choice([None, True, True, False]),
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
            if row.valid is not None:
                shares["valid"].append((row, row.valid))
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


@on_either_kind("module_database_url")
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
    rows = traffic(1_300)  # Three pages.
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


async def test_what_a_chat_page_asked_for_itself_counts_only_if_it_is_named(world, quality):
    await world.predict(2)
    await world.predict(1, assignment="chore")
    counted = []
    for where in (Where(), Where(assignment="chore")):
        (release,) = (await quality.report("acme", where)).releases
        counted.append(release.answers)
    assert counted == [2, 1]


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


@on_either_kind("module_database_url")
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
    judged = [is_right if chance.random() < 0.85 else not is_right for is_right in right]
    await judge_all(world, ids, judged)
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
        truths, scores = ([each == (name == "right") for each in column] for column in (right[::2], judged))
        assert_is(share, prediction_powered(truths, scores[::2], Moments.of(scores), [0.5] * 300))
        assert share.method == "prediction-powered"
        assert share.effective_n > share.n == 300
        assert share.high - share.low < 0.9 * (plain.high - plain.low)
        assert share.low < sum(each == (name == "right") for each in right) / 600 < share.high
    assert found["class_share", "right"].value + found["class_share", "wrong"].value == pytest.approx(1)


async def test_a_judge_does_not_speak_for_answers_that_nobody_drew_by_lot(world, quality):
    chance = random.Random(5)
    ids, right = await world.predict(1000), [number % 4 != 0 for number in range(1000)]
    doubtful = [0.5 + 0.2 * each + 0.1 * chance.random() for each in right[:150]]
    await judge_all(world, ids, [*doubtful, *(chance.choice([0.95, 1.0]) for _ in right[150:])])
    said = zip(ids[:150], right, strict=False)
    await asyncio.gather(*(label(world, id_, class_name="right" if each else "wrong") for id_, each in said))
    found = await only_release(quality)
    assert_is(found["class_share", "right"], mean_score(right[:150]))


async def test_a_judge_of_a_few_answers_is_not_used(world, quality):
    ids = await world.predict(200)
    await judge_all(world, ids[:100], [number % 3 > 0 for number in range(100)])
    said = ("right" if number % 2 else "wrong" for number in range(100))
    await asyncio.gather(*(label(world, id_, class_name=each) for id_, each in zip(ids[:100], said, strict=True)))
    assert (await only_release(quality))["class_share", "right"].method == "wilson"


async def judge_all(world: World, ids: list[str], scores: Sequence[float]) -> None:
    judge = person("judge")
    said = (Given(prediction_id=id_, source="judge", rating=score) for id_, score in zip(ids, scores, strict=True))
    await asyncio.gather(*(world.feedback.give(judge, each) for each in said))


@on_either_kind("module_database_url")
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


# --- several queues, and guesses ---


def labelled(session: int, chances: dict[str, float], *, is_right: bool, **facts: Any) -> Labelled:
    """What is known of a labelled answer."""
    given = {
        "tenant": "acme",
        "made_at": 0.0,
        "signals": (0.0, 0.0, 0.0),
        "true_class": "right" if is_right else "wrong",
    }
    given |= {"said": None, "exact": None, "f1": None, "judged": None, "delay_seconds": 0.0}
    return Labelled(session=session, chances=chances, **{**given, **facts})


@pytest.mark.parametrize(
    ("rounds", "off_by", "share_covered"), [(50, 0.015, 0.9), pytest.param(300, 0.006, 0.93, marks=pytest.mark.slow)]
)
def test_answers_in_several_queues_are_weighed_so_that_the_mean_is_right_and_covered(rounds, off_by, share_covered):
    chance = np.random.default_rng(3)
    covered, values = 0, []
    for _ in range(rounds):
        rows = []
        for answer in range(1_500):
            is_doubtful = chance.random() < 0.3
            rates = {"even": 0.05, "doubtful": 0.4 if is_doubtful else 0.02}
            taken = {queue: rate for queue, rate in rates.items() if chance.random() < rate}
            if taken:
                rows.append(labelled(answer, taken, is_right=chance.random() < (0.4 if is_doubtful else 0.9)))
        (share,) = [each for each in label_figures(rows, 1_500, None).figures if each.class_name == "right"]
        values.append(share.value)
        covered += share.low <= 0.75 <= share.high
    assert np.mean(values) == pytest.approx(0.75, abs=off_by)
    assert covered / rounds >= share_covered


def test_a_queue_of_a_slice_is_left_out_beside_one_of_all_and_speaks_alone_for_its_slice():
    of_all = [labelled(n, {"all": 0.1}, is_right=True) for n in range(10)]
    of_slice = [labelled(10 + n, {}, is_right=False, chances_in_slices={"slice": 0.5}) for n in range(5)]
    found = weighed([*of_all, *of_slice])
    assert ([row.session for row in found.rows], found.left_out) == (list(range(10)), 5)
    assert [row.probability for row in weighed(of_slice).rows] == [0.5] * 5


async def test_a_queue_of_one_users_answers_says_nothing_of_all_and_what_waits_is_told(world, quality):
    await world.queue()
    await world.queue("slice", where=Where(since=EPOCH.since, user="u"))
    await world.predict(3)
    await world.predict(2, user="u")
    await world.fill()
    await world.review("anna", "right", count=5)
    (leased,) = await world.lease("ben", 1, queue="slice")
    await world.reviews.complete(person("ben"), leased.review.id, Finding(class_name="wrong"))
    (release,) = (await quality.report("acme", Where())).releases
    assert (release.sampled, release.labelled, release.labels_left_out) == (True, 5, 0)
    found = by_name(release)
    assert found["class_share", "wrong"].value == pytest.approx(1 / 5)
    assert (found["reviewed", None].n, found["reviewed", None].value) == (7, pytest.approx(6 / 7))


async def signalled(world: World, count: int, at: datetime, *, label_share: float, seed: int) -> list[tuple[str, bool]]:
    """Answers whose support and retrieval score say something of whether they are right; some are labelled."""
    chance = random.Random(seed)
    rows, said = [], []
    for number in range(count):
        support, score = chance.random(), chance.random()
        is_right = chance.random() < 0.15 + 0.4 * support + 0.4 * score
        row = made(
            at + timedelta(seconds=number),
            verdict="answered",
            answer="Four weeks to the end of a month.",
            citations=[{"status": "supported", "support": support, "answer_start": 0, "answer_end": 10}],
            passages=[{"dense_score": score}, {"dense_score": 0.0}],
        )
        rows.append(row)
        said.append((row.id, is_right))
    await world.ship(rows)
    labels = [(id_, is_right) for id_, is_right in said if chance.random() < label_share]
    await asyncio.gather(*(label(world, id_, class_name="right" if right else "wrong") for id_, right in labels))
    return said


async def test_answers_without_labels_are_guessed_from_labels_before_the_window(world, quality):
    await signalled(world, 400, NOW - timedelta(days=5), label_share=1.0, seed=1)
    said = await signalled(world, 500, NOW - timedelta(hours=1), label_share=0.02, seed=2)
    found = await only_release(quality, since=NOW - timedelta(hours=2))
    guess = found["class_share_guessed", "right"]
    assert (guess.method, guess.n, guess.doubts) == ("calibrated", 500, [])
    assert guess.low < sum(is_right for _, is_right in said) / 500 < guess.high
    assert guess.high - guess.low < 0.5 * (found["class_share", "right"].high - found["class_share", "right"].low)
    assert found["class_share_guessed", "wrong"].value == pytest.approx(1 - guess.value, abs=0.03)


async def test_a_guess_says_when_it_may_be_wrong(world):
    async def drifted(tenant, releases):
        return [release for release in releases if (tenant, release) == ("acme", "hallmark@1")]

    await signalled(world, 60, NOW - timedelta(hours=1), label_share=1.0, seed=1)
    found = await only_release(Quality(Maker(world.database).make))
    guess = found["class_share_guessed", "right"]
    assert (guess.value, guess.low, guess.high, guess.doubts) == (None, 0.0, 1.0, ["too_few_labels"])
    await signalled(world, 300, NOW - timedelta(days=40), label_share=1.0, seed=2)
    found = await only_release(Quality(Maker(world.database, drifted=drifted).make))
    guess = found["class_share_guessed", "right"]
    assert guess.value is not None
    assert guess.doubts == ["drifted", "outdated"]
