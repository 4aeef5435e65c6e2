"""Alerts over a database: what fires and what does not, that each is told once, and that workers may die and double."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.access import KeyStore
from app.alerts import AlertGauges, Evaluator, Notifier, OutboxReports
from app.alerts.webhook import NotDelivered
from app.errors import Conflict, NotFound, Unavailable
from app.feedback import LabelLog, Stated
from app.quality.figures import Asked, Report
from app.quality.making import Maker
from app.registry.rows import Step
from app.rollouts import promote, roll_back, set_canary
from observability.collectors import MAX_ALERT_RELEASES, AlertSample, AlertTally
from observability.metrics import Metrics
from tests.alert_world import TENANT, Alerting, alerting, drifted
from tests.migrated import migrated
from tests.review_world import person

REFUSED: dict[str, Any] = {
    "name": "refusals",
    "kind": "threshold",
    "figure": "refused",
    "above": 0.2,
    "keep_seconds": 0,
}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Alerting]:
    async with alerting(migrated(tmp_path / "hallmark.db")) as world:
        yield world


async def refuse(world: Alerting, count: int, **facts: Any) -> list[str]:
    return await world.answer(count, verdict="abstained:engine_abstained", **facts)


# --- from finding to telling, on both kinds of database ---


async def test_an_alert_fires_once_keeps_its_history_and_is_resolved(database_url: str) -> None:
    async with alerting(database_url) as world:
        await world.set_rules({**REFUSED, "for_seconds": 45})
        await world.answer(30)
        await refuse(world, 30)
        await world.look()
        assert (await world.only()).state == "pending"
        assert await world.told() == []
        await world.look()
        await world.look()
        await world.look()
        alert = await world.only()
        assert (alert.state, alert.subject.release, alert.kind, alert.severity) == (
            "firing",
            "hallmark@1",
            "threshold",
            "ticket",
        )
        assert (alert.facts["n"], alert.facts["value"], alert.facts["above"]) == (60, 0.5, 0.2)
        assert alert.facts["low"] > 0.2
        assert await world.told() == ["firing"]
        await world.answer(1_000)
        await world.look()
        assert await world.active() == []
        assert await world.told() == ["firing", "resolved"]
        found, events = await world.alerts.get(TENANT, alert.id)
        assert found.resolved_at == world.clock.now
        assert [each.action for each in events] == ["pending", "firing", "resolved"]
        assert [each.why for each in events][-1].startswith("refused is 0.0283")
        # It may fire again: what is resolved is another matter.
        await refuse(world, 1_000)
        await world.look()
        await world.look(after_seconds=50)
        assert (await world.only()).id != alert.id


async def test_workers_that_do_the_same_at_once_write_it_once(database_url: str) -> None:
    async with alerting(database_url) as world:
        await world.set_rules(REFUSED)
        await refuse(world, 60)
        others = [world.new_evaluator() for _ in range(3)]
        for _ in range(2):
            world.clock.pass_seconds(30)
            await asyncio.gather(*(world.look(after_seconds=0, evaluator=each) for each in others))
        await world.only()
        assert await world.told() == ["firing"]
        await world.answer(2_000)
        world.clock.pass_seconds(30)
        await asyncio.gather(*(world.look(after_seconds=0, evaluator=each) for each in others))
        assert await world.told() == ["firing", "resolved"]


# From Python 3.13 on an interpreter tells that the driver lets go of a connection whose opening is cancelled.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_step_that_dies_loses_nothing_and_doubles_nothing(world: Alerting) -> None:
    """Killed at any await, another worker's round comes to the same as one that nobody killed."""
    await world.set_rules(REFUSED)
    await refuse(world, 60)
    for steps in range(40):
        evaluator = world.new_evaluator()
        world.clock.pass_seconds(30)
        round_ = asyncio.ensure_future(world.look(after_seconds=0, evaluator=evaluator))
        for _ in range(steps):
            await asyncio.sleep(0)
        round_.cancel()
        await asyncio.gather(round_, return_exceptions=True)
    await world.look()
    await world.only()
    assert await world.told() == ["firing"]


# --- what is bad ---


async def test_chance_alone_raises_nothing_and_too_few_answers_neither(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await refuse(world, 15)
    await world.answer(35)  # 30 %, and its interval begins at 19 %.
    await world.look()
    assert await world.active() == []
    await world.set_rules({**REFUSED, "min_n": 200})
    await refuse(world, 140)
    await world.look()
    assert await world.active() == []
    await refuse(world, 10)
    await world.look()
    assert (await world.only()).state == "firing"


async def test_what_becomes_unknown_goes_on_firing(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await refuse(world, 60)
    await world.look()
    await world.look(after_seconds=3_700)  # The hour's answers are gone, and none came since.
    assert (await world.only()).state == "firing"
    await world.answer(60)
    world.clock.now = time.time_ns() // 1_000_000 + 3_700_000
    await world.look(after_seconds=30)
    assert (await world.only()).state == "firing"


async def test_a_figure_below_its_bound(world: Alerting) -> None:
    rule = {"name": "cited", "kind": "threshold", "figure": "citations_supported", "below": 0.9}
    await world.set_rules(rule)
    weak = [{"status": "weak", "answer_start": 0, "answer_end": 4}]
    await world.answer(60, verdict="answered", citations=weak)
    await world.look()
    assert (await world.only()).facts["high"] < 0.9


async def test_the_budget_of_errors_burns_in_both_windows_or_it_is_over(world: Alerting) -> None:
    await world.set_rules(
        {"name": "errors", "kind": "burn_rate", "share": "failed", "objective": 0.99, "keep_seconds": 0}
    )
    await world.answer(200, outcome="failed")
    await world.answer(200)
    await world.look()
    alert = await world.only()
    assert (alert.facts["value"], alert.facts["n"], alert.facts["burn_rate"]) == (0.5, 400, pytest.approx(50))
    # Within the hour, but no longer in the last five minutes.
    await world.look(after_seconds=400)
    assert await world.active() == [alert] or (await world.active())[0].state == "firing"


async def test_a_budget_that_burns_as_it_may_is_no_alert(world: Alerting) -> None:
    await world.set_rules({"name": "errors", "kind": "burn_rate", "share": "failed", "objective": 0.95})
    await world.answer(5, outcome="failed")
    await world.answer(95)
    await world.look()
    assert await world.active() == []


@pytest.mark.parametrize(
    ("share", "facts"),
    [
        ("refused", {"verdict": "abstained:engine_abstained"}),
        ("abstained", {"verdict": "abstained:nothing_relevant"}),
        ("unsupported", {"verdict": "extracted:unsupported_answer"}),
        ("truncated", {"finish_reason": "length"}),
        ("slow", {"total_seconds": 31.0}),
    ],
)
async def test_every_share_that_an_objective_may_bound(world: Alerting, share: str, facts: dict[str, Any]) -> None:
    await world.set_rules({"name": "b", "kind": "burn_rate", "share": share, "objective": 0.95})
    await world.answer(60, **facts)
    await world.look()
    assert (await world.only()).facts["share"] == share


async def test_answers_that_stop_are_missed_once_somebody_asked_before(world: Alerting) -> None:
    await world.set_rules(
        {"name": "quiet", "kind": "absence", "missing": "answers", "window_seconds": 600, "keep_seconds": 0}
    )
    await world.look()
    await world.look(after_seconds=700)
    assert await world.active() == []  # Nobody ever asked.
    await world.answer(release_digest=await digest(world))
    world.clock.pass_seconds(-700)
    await world.look()
    assert await world.active() == []
    await world.look(after_seconds=700)
    assert (await world.only()).why.startswith("the last answer was 7")


async def test_labels_that_stop_are_missed(world: Alerting) -> None:
    rule = {"name": "labels", "kind": "absence", "missing": "labels", "window_seconds": 600, "keep_seconds": 0}
    await world.set_rules(rule)
    (answered,) = await world.answer()
    await world.look(after_seconds=700)
    assert (await world.only()).facts["missing"] == "labels"
    world.clock.now = time.time_ns() // 1_000_000 + 599_999
    async with LabelLog(world.database) as labels:
        await labels.state(person("anna"), Stated(prediction_id=answered, class_name="right"))
    await world.look(after_seconds=0, evaluator=world.new_evaluator())
    assert await world.active() == []


async def test_a_figure_that_is_missing_where_there_are_answers(world: Alerting) -> None:
    rule = {
        "name": "uncited",
        "kind": "absence",
        "missing": "figure",
        "figure": "citations_supported",
        "window_seconds": 600,
    }
    await world.set_rules(rule)
    await world.look()
    assert await world.active() == []
    then = time.time_ns() // 1_000_000 + 599_999
    await world.answer(60)
    world.clock.now = then
    await world.look(after_seconds=0)
    alert = await world.only()
    assert alert.facts["answers"] == 60


async def digest(world: Alerting) -> str:
    return (await world.registry.get("hallmark@1")).release.digest


async def test_drift_is_told_with_its_kinds_and_examples_and_only_what_the_rule_names(world: Alerting) -> None:
    await world.set_rules({"name": "drift", "kind": "drift", "shifts": ["outputs"], "keep_seconds": 0})
    await world.answer()
    world.drift.states[TENANT, "hallmark@1"] = drifted("inputs")
    await world.look()
    assert await world.active() == []
    world.drift.states[TENANT, "hallmark@1"] = drifted("inputs", "outputs")
    await world.look()
    assert (await world.only()).facts == {"kinds": ["outputs"], "since": 1, "examples": ["p1", "p2"]}
    world.drift.states[TENANT, "hallmark@1"] = drifted()
    await world.look()
    assert await world.active() == []


# --- whose rules, whose alerts ---


async def test_a_team_that_sets_nothing_is_told_of_refusals_and_errors(world: Alerting) -> None:
    await refuse(world, 40)
    await world.answer(40, outcome="failed")
    await world.answer(20, answer="")
    await world.look()
    assert {alert.subject.rule for alert in await world.active()} == {"errors", "refusals", "empty_answers"}


async def test_a_releases_own_rules_come_before_its_names_and_those_before_the_usual(world: Alerting) -> None:
    assert (await world.rules.holding("hallmark@1"))[0] is None
    await world.set_rules(REFUSED)
    await world.set_rules(target="hallmark@1")
    assert await world.rules.holding("hallmark@1") == ("hallmark@1", ())
    await refuse(world, 60)
    await world.look()
    assert await world.active() == []
    await world.rules.set("hallmark@1", None, who="anna", why="back")
    assert (await world.rules.holding("hallmark@1"))[0] == "hallmark"
    await world.look()
    await world.only()
    revisions = await world.rules.history("hallmark@1", limit=10)
    assert [(each.revision, each.rules, each.who) for each in revisions] == [(2, None, "anna"), (1, (), "test")]
    with pytest.raises(Conflict):
        await world.rules.set("hallmark@1", (), who="bert", why="", revision=1)
    # The same again is no change, and a rule that is gone ends its alert.
    await world.rules.set("hallmark@1", (), who="test", why="")
    assert (await world.rules.set("hallmark@1", (), who="bert", why="")).revision == 3
    await world.look()
    assert await world.active() == []


async def test_a_tenant_is_judged_by_its_own_answers_and_sees_its_own_alerts(world: Alerting) -> None:
    await KeyStore(world.database).create(name="other", tenant="other", scopes=("chat",))
    await world.set_rules(REFUSED)
    await world.answer(500)
    await refuse(world, 60, tenant="other")
    await world.look()
    assert await world.active() == []
    alert = await world.only("other")
    with pytest.raises(NotFound):
        await world.alerts.get(TENANT, alert.id)
    with pytest.raises(NotFound):
        await world.alerts.acknowledge(TENANT, alert.id, who="anna", why="")
    assert await world.told() == []
    assert await world.told("other") == ["firing"]


async def test_figures_are_made_of_labels_that_are_all_of_one_session(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await refuse(world, 600)
    ids = await world.answer(100, user="app")  # As an application does whose own users it does not tell.
    async with LabelLog(world.database) as labels:
        for number, each in enumerate(ids):
            said = "right" if number % 2 else "wrong"
            await labels.state(person("anna"), Stated(prediction_id=each, class_name=said))
    await world.look()
    assert (await world.only()).state == "firing"


async def test_a_rule_that_fails_ends_no_other(world: Alerting, caplog: pytest.LogCaptureFixture) -> None:
    async def make(asked: Asked) -> Report:
        if asked.tenant == "aaa":
            raise ZeroDivisionError("sapphire")
        return await Maker(world.database).make(asked)

    await KeyStore(world.database).create(name="other", tenant="aaa", scopes=("chat",))
    await world.set_rules(REFUSED)
    for tenant in ("aaa", TENANT):
        await refuse(world, 60, tenant=tenant)
    await world.look(evaluator=Evaluator(world.database, make, world.clock, tells=True, drift=world.drift))
    assert await world.active("aaa") == []
    assert (await world.only()).state == "firing"
    assert "cannot be judged: ZeroDivisionError" in caplog.text
    assert "sapphire" not in caplog.text


async def test_a_silence_keeps_it_quiet_and_what_still_fires_afterwards_is_told(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    made = await world.alerts.silence(TENANT, rule="refusals", release="*", seconds=100, who="anna", why="known")
    assert [each.id for each in await world.alerts.silences(TENANT)] == [made.id]
    assert await world.alerts.silences("other") == []
    await refuse(world, 60)
    await world.look()
    assert (await world.only()).state == "firing"
    assert await world.told() == []
    await world.look(after_seconds=100)
    assert await world.told() == ["firing"]
    await world.look()
    assert await world.told() == ["firing"]


async def test_a_silence_of_a_name_is_of_all_its_releases(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await world.alerts.silence(TENANT, rule="*", release="hallmar", seconds=100, who="anna", why="another")
    silence = await world.alerts.silence(TENANT, rule="*", release="hallmark", seconds=100, who="anna", why="known")
    await refuse(world, 60)
    await world.look()
    assert ((await world.only()).state, await world.told()) == ("firing", [])
    await world.alerts.end_silence(TENANT, silence.id)
    await world.look()
    assert await world.told() == ["firing"]


async def test_a_rollback_is_silenced_by_its_name_for_everybody(world: Alerting) -> None:
    await world.alerts.silence(TENANT, rule="*", release="*", seconds=86_400, who="anna", why="our own alone")
    silence = await world.alerts.silence(TENANT, rule="rollback", release="*", seconds=86_400, who="anna", why="known")
    assert silence in await world.alerts.silences("other")
    await take_back(world)
    assert ((await world.only()).subject.rule, await world.told()) == ("rollback", [])
    await world.alerts.end_silence("other", silence.id)
    await world.look()
    assert await world.told("other") == ["firing"]


async def test_a_rule_that_has_the_name_of_the_deployments_is_silenced_with_it(world: Alerting) -> None:
    await world.set_rules({**REFUSED, "name": "outbox"})
    await world.alerts.silence(TENANT, rule="outbox", release="*", seconds=100, who="anna", why="known")
    await refuse(world, 60)
    await world.look()
    assert ((await world.only()).state, await world.told()) == ("firing", [])


async def test_what_fired_and_went_in_silence_is_never_told(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    made = await world.alerts.silence(TENANT, rule="*", release="hallmark@1", seconds=1_000, who="anna", why="")
    await refuse(world, 60)
    await world.look()
    await world.answer(2_000)
    await world.look()
    assert (await world.active(), await world.told()) == ([], [])
    with pytest.raises(NotFound):
        await world.alerts.end_silence("other", made.id)
    await world.alerts.end_silence(TENANT, made.id)
    assert await world.alerts.silences(TENANT) == []


async def test_an_alert_is_acknowledged_by_somebody_and_stays(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await refuse(world, 60)
    await world.look()
    alert = await world.alerts.acknowledge(TENANT, (await world.only()).id, who="anna", why="looking")
    await world.look()
    assert (alert.acknowledged_by, (await world.only()).acknowledged_by) == ("anna", "anna")
    _, events = await world.alerts.get(TENANT, alert.id)
    assert [(each.action, each.who) for each in events] == [("firing", None), ("acknowledged", "anna")]
    await world.answer(2_000)
    await world.look()
    with pytest.raises(Conflict):
        await world.alerts.acknowledge(TENANT, alert.id, who="anna", why="")


# --- what is looked at without a rule ---


async def test_a_canary_that_nobody_asks_raises_an_alert_of_the_deployment(world: Alerting) -> None:
    await world.set_rules()
    await world.canary()
    world.clock.pass_seconds(3_700)
    await world.watch()
    await world.look()
    alert = await world.only()
    assert (alert.subject.tenant, alert.subject.rule, alert.subject.release) == ("", "trial", "hallmark@2")
    assert "no traffic" in alert.why
    # Another tenant sees it too; its notification is there once.
    assert (await world.only("other")).id == alert.id
    assert await world.told("other") == ["firing"]


async def take_back(world: Alerting) -> None:
    """Put a release on trial, have a guard take it back, and look."""
    await world.set_rules()
    await world.canary()
    await world.answer(10, outcome="failed", assignment="canary", release_name="hallmark@2")
    await world.answer(10, assignment="stable", release_name="hallmark@1")
    await world.watch()
    await world.look()


async def test_a_rollback_is_told_for_a_day(world: Alerting) -> None:
    await take_back(world)
    alert = await world.only()
    assert (alert.kind, alert.severity, alert.facts["guard"]) == ("rollback", "page", "error_burst")
    await world.look(after_seconds=3_600)
    assert await world.told() == ["firing"]
    await world.look(after_seconds=86_400)
    assert await world.active() == []


@pytest.mark.parametrize("ending", [lambda rollout, _: promote(rollout), roll_back], ids=["promoted", "ended"])
async def test_a_rollback_is_not_told_again_when_a_later_trial_has_ended(world: Alerting, ending: Step) -> None:
    await take_back(world)
    step: Step = lambda rollout, _: set_canary(rollout, 2, 0.5)  # noqa: E731
    await world.registry.change("hallmark", "canary", step, who="anna")
    await world.watch()
    await world.look()
    assert await world.told() == ["firing", "resolved"]
    await world.registry.change("hallmark", "end", ending, who="anna")
    await world.watch()
    await world.look()
    assert await world.told() == ["firing", "resolved"]


class Outbox:
    rows = 3
    lag_seconds = 0.0


async def test_an_outbox_that_does_not_move_or_whose_replica_is_gone_raises_an_alert(world: Alerting) -> None:
    await world.set_rules()
    outbox = Outbox()
    reports = OutboxReports(world.database, outbox, "one")
    await reports.report()
    await world.look()
    assert await world.active() == []
    outbox.lag_seconds = 400.0
    await reports.report()
    await world.look()
    assert (await world.only()).facts == {"stuck": ["one"], "silent": []}
    outbox.lag_seconds = 0.0
    await reports.report()
    await world.look()
    await world.look(after_seconds=61)
    assert await world.active() == []
    await world.look(after_seconds=600)
    assert (await world.only()).facts == {"stuck": [], "silent": ["one"]}
    # Stopped in good order with an empty outbox, it takes its row away.
    outbox.rows = 0
    async with reports:
        pass
    await world.look()
    await world.look(after_seconds=61)
    assert await world.active() == []


async def test_an_alert_ends_when_its_release_serves_no_more(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await world.canary()
    await refuse(world, 60, release_name="hallmark@2", assignment="pinned")
    await world.look()
    assert (await world.only()).subject.release == "hallmark@2"
    await world.registry.change("hallmark", "rollback", _rolled_back, who="test")
    await world.look()
    assert await world.active() == []
    assert (await world.notifications())[-1].action == "resolved"


def _rolled_back(rollout: Any, available: set[int]) -> Any:
    from app.rollouts import roll_back

    return roll_back(rollout, available)


async def test_a_database_that_is_away_ends_the_round_and_the_next_finds_everything(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await refuse(world, 60)
    evaluator = world.new_evaluator()
    world.clock.pass_seconds(1)
    assert await evaluator.step()

    class Away:
        def __getattr__(self, _: str) -> Any:
            raise Unavailable("away")

    there, evaluator._database = evaluator._database, Away()  # type: ignore[assignment]
    with pytest.raises(Unavailable):
        await world.look(after_seconds=0, evaluator=evaluator)
    evaluator._database = there
    assert not await evaluator.step()  # Not at once: somebody has to wait.
    await world.look(evaluator=evaluator)
    await world.only()


async def test_metrics_show_how_many_fire_and_when_somebody_looked_and_stay_bounded(world: Alerting) -> None:
    metrics = Metrics(version="test", process=False)
    gauges = AlertGauges(world.database, metrics.alerted)
    await gauges.refresh()
    assert "hallmark_alerts_timestamp_seconds 1" not in metrics.render()[0].decode()
    await fired(world)
    await gauges.refresh()
    text = metrics.render()[0].decode()
    labels = {"kind": "threshold", "severity": "ticket", "state": "firing", "release": "hallmark@1"}
    assert metrics.registry.get_sample_value("hallmark_alerts", labels) == 1
    assert metrics.registry.get_sample_value("hallmark_alert_notifications", {"state": "waiting"}) == 1
    assert metrics.registry.get_sample_value("hallmark_alerts_timestamp_seconds") == world.clock.now / 1000
    assert TENANT not in text
    many = [AlertSample("drift", "page", "firing", f"hallmark@{n:03}", 1) for n in range(80)]
    metrics.alerted(AlertTally(many, 0, 0, None))
    found = [line for line in metrics.render()[0].decode().splitlines() if line.startswith("hallmark_alerts{")]
    assert len(found) == MAX_ALERT_RELEASES + 1
    assert any('release="other"' in line and line.endswith(" 30.0") for line in found)


# --- telling ---


class Receiver:
    """A webhook that takes what it is told to take."""

    def __init__(self, *problems: NotDelivered | None) -> None:
        self.problems = list(problems)
        self.got: list[tuple[str, dict[str, Any]]] = []

    async def send(self, message_id: str, body: bytes) -> None:
        self.got.append((message_id, json.loads(body)))
        problem = self.problems.pop(0) if self.problems else None
        if problem is not None:
            raise problem


async def fired(world: Alerting) -> None:
    await world.set_rules(REFUSED)
    await refuse(world, 60)
    await world.look()


async def test_what_is_told_holds_figures_and_no_content(world: Alerting) -> None:
    await fired(world)
    receiver = Receiver()
    notifier = Notifier(world.database, receiver, world.clock)  # type: ignore[arg-type]
    assert await notifier.step()
    assert not await notifier.step()
    ((message_id, body),) = receiver.got
    (kept,) = await world.notifications()
    assert (kept.id, kept.state, kept.attempts) == (message_id, "delivered", 1)
    assert body["type"] == "alert.firing"
    data = body["data"]
    assert {name: data[name] for name in ("tenant", "rule", "release", "severity", "state")} == {
        "tenant": TENANT,
        "rule": "refusals",
        "release": "hallmark@1",
        "severity": "ticket",
        "state": "firing",
    }
    assert set(data["facts"]) == {"figure", "value", "low", "high", "n", "effective_n", "window_seconds", "above"}
    assert "Four weeks" not in json.dumps(body)


async def test_what_is_not_taken_is_tried_again_later_and_later_under_the_same_id_and_then_given_up(
    world: Alerting, caplog: pytest.LogCaptureFixture
) -> None:
    await fired(world)
    receiver = Receiver(*[NotDelivered("It answered 500.")] * 200)
    notifier = Notifier(world.database, receiver, world.clock)  # type: ignore[arg-type]
    begun, pauses = world.clock.now, []
    while (kept := (await world.notifications())[0]).state == "waiting":
        pauses.append((kept.next_at - world.clock.now) / 1000)
        world.clock.now = max(world.clock.now, kept.next_at)
        assert await notifier.step()
        assert not await notifier.step()
    assert (kept.state, kept.problem) == ("dead", "It answered 500.")
    assert 86_400 <= (world.clock.now - begun) / 1000 < 90_100
    assert len({message_id for message_id, _ in receiver.got}) == 1
    assert 20 <= kept.attempts == len(receiver.got) <= 60
    assert pauses[1] <= 5 < pauses[4] <= pauses[-1] <= 3_600
    assert "given up" in caplog.text


async def test_one_that_is_gone_for_good_is_not_tried_again(world: Alerting) -> None:
    await fired(world)
    notifier = Notifier(world.database, Receiver(NotDelivered("It answered 410.", for_good=True)), world.clock)  # type: ignore[arg-type]
    assert await notifier.step()
    assert (await world.notifications())[0].state == "dead"


async def test_a_worker_killed_while_it_tells_leaves_it_to_another_under_the_same_id(world: Alerting) -> None:
    await fired(world)

    class Killed(Receiver):
        async def send(self, message_id: str, body: bytes) -> None:
            await super().send(message_id, body)
            raise asyncio.CancelledError

    killed, other = Killed(), Receiver()
    with pytest.raises(asyncio.CancelledError):
        await Notifier(world.database, killed, world.clock).step()  # type: ignore[arg-type]
    notifier = Notifier(world.database, other, world.clock)  # type: ignore[arg-type]
    assert not await notifier.step()  # As far as anybody knows it is being told.
    world.clock.pass_seconds(15)
    assert await notifier.step()
    assert killed.got[0][0] == other.got[0][0]
    assert (await world.notifications())[0].state == "delivered"


async def test_of_workers_that_tell_at_once_one_does(world: Alerting) -> None:
    await fired(world)
    receivers = [Receiver() for _ in range(4)]
    notifiers = [Notifier(world.database, each, world.clock) for each in receivers]  # type: ignore[arg-type]
    await asyncio.gather(*(each.step() for each in notifiers))
    assert sum(len(each.got) for each in receivers) == 1


async def test_without_a_webhook_nothing_piles_up(world: Alerting, caplog: pytest.LogCaptureFixture) -> None:
    world.evaluator = world.new_evaluator(tells=False)
    await fired(world)
    assert await world.told() == []
    assert "The alert refusals of hallmark@1 is firing: refused is 1 " in caplog.text
