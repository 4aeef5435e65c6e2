"""A worse canary is taken back, an equal one is not, and the decision follows again from what was heard."""

import asyncio
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Conflict
from app.guards import replay
from app.guards.judging import PATH_POINTS, Path, Seen, State, judge, session_of, signals
from app.rollouts import begin, promote, roll_back, set_canary
from app.trial_plans import GUARDS, TrialPlan
from app.vetting import folder_digest
from observability.sequential import Plan
from tests.guard_world import Guarded, guarded
from tests.migrated import migrated
from tests.review_world import prediction

ALL = TrialPlan(bets=Plan(guards=tuple(GUARDS.values())))
FAILED = {"outcome": "failed", "error_code": "engine_unavailable", "answer": None, "completion_tokens": None}
REFUSED = {"verdict": "abstained:engine_abstained"}
SEEN = Seen(
    id="1", tenant="t", user=None, conversation=None, arm="canary", outcome="finished", finish_reason="stop",
    verdict=None, retrieval_outcome=None, total_seconds=1.0, is_wordless=False, found_nothing=False, opening="Hello",
)  # fmt: skip


@pytest.fixture
async def world(tmp_path):
    async with guarded(f"sqlite:///{migrated(tmp_path / 'hallmark.db')}", tmp_path) as world:
        yield world


@pytest.fixture
async def any_world(database_url, tmp_path):
    """A world on either kind of database, for what several workers or much of the SQL decide."""
    async with guarded(database_url, tmp_path) as world:
        yield world


async def replayed(world: Guarded):
    trial = await world.trial()
    heard = await world.trials.heard(trial.id)
    return trial, replay(trial.plan, ((each.arm, each.badness) for each in heard))


# --- what an answer says ---


@pytest.mark.parametrize(
    ("facts", "bad"),
    [
        ({}, set()),
        ({"outcome": "failed"}, {"failed", "error"}),
        ({"is_wordless": True}, {"failed"}),
        ({"finish_reason": "length"}, {"failed"}),
        ({"verdict": "abstained:nothing_relevant"}, {"refused"}),
        ({"verdict": "replaced:unsupported_answer"}, {"unsupported"}),
        ({"finish_reason": "content_filter"}, {"refused"}),
        ({"opening": "I'm sorry, but I can't help with that."}, {"refused"}),
        ({"opening": "I cannot provide that information."}, {"refused"}),
        ({"opening": "I can help with that."}, set()),
        ({"opening": None}, set()),
        ({"total_seconds": 30.5}, {"slow"}),
        ({"total_seconds": None}, set()),
        ({"found_nothing": True}, {"index_empty"}),
        ({"is_hollow": True}, {"degenerate"}),
        ({"opening": "!" * 80}, {"degenerate"}),
        ({"opening": " the the the the the the the the the the"}, {"degenerate"}),
        ({"opening": "<unk>" * 16}, {"degenerate"}),
        ({"opening": "!" * 23}, set()),
        ({"opening": "----------------------------- and then it says something"}, set()),
        ({"opening": "No, no, no, that is not what the contract says at all."}, set()),
    ],
)
def test_an_answer_speaks_to_every_guard_that_needs_no_label(facts, bad):
    said = signals(msgspec.structs.replace(SEEN, **facts), TrialPlan())
    assert said.keys() == {"failed", "refused", "unsupported", "slow", "error", "index_empty", "degenerate"}
    assert {name for name, value in said.items() if value} == bad


@pytest.mark.parametrize("outcome", ["open", "cancelled", "interrupted"])
def test_an_answer_that_nobody_let_come_to_its_end_says_nothing(outcome):
    assert signals(msgspec.structs.replace(SEEN, outcome=outcome), TrialPlan()) == {}


def test_a_session_is_a_conversation_else_a_user_else_an_answer_of_one_tenant():
    def session(**facts):
        return session_of("5eed" * 8, msgspec.structs.replace(SEEN, **facts))

    assert session(conversation="c", user="u") == session(id="2", conversation="c", user="v")
    assert session(user="u") == session(id="2", user="u")
    different = [
        session(),
        session(id="2"),
        session(user="u"),
        session(conversation="u"),
        session(user="u", tenant="s"),
    ]
    assert len(set(different)) == len(different)
    assert session_of("0bad" * 8, SEEN) != session()


@given(st.lists(st.tuples(st.sampled_from(["stable", "canary"]), st.booleans(), st.booleans()), max_size=120))
def test_what_is_known_can_be_kept_and_taken_up_anywhere(said):
    state = kept = State.begin(ALL)
    for arm, failed, found_nothing in said:
        badness = {"failed": float(failed), "error": float(failed), "index_empty": float(found_nothing)}
        state, decision = judge(state, arm, badness)
        kept = msgspec.json.decode(msgspec.json.encode(kept), type=State)
        kept, again = judge(kept, arm, badness)
        assert (kept, again) == (state, decision)
        if decision:
            break


@given(st.integers(1, 2_000))
def test_a_path_keeps_its_length_and_its_order(count):
    path = Path()
    for n in range(1, count + 1):
        path = path.add(n, float(n))
    ns = [n for n, _ in path.points]
    assert len(ns) < PATH_POINTS
    assert ns == list(range(path.every, count + 1, path.every))


# --- plans ---


def test_a_trial_keeps_the_plan_with_which_it_began():
    rollout = set_canary(begin("hallmark", 1), 2, 0.1)
    assert rollout.plan == TrialPlan()
    assert set_canary(rollout, 2, 0.5).plan == set_canary(rollout, 2, 0.5, TrialPlan()).plan == rollout.plan
    with pytest.raises(Conflict, match="plan is fixed") as refused:
        set_canary(rollout, 2, 0.5, ALL)
    assert refused.value.param == "plan"
    assert set_canary(rollout, 3, 0.1, ALL).plan == ALL
    assert promote(rollout).plan is roll_back(rollout, {1}).plan is None


# --- trials ---


async def test_a_canary_that_refuses_is_rolled_back_with_its_evidence_and_the_decision_follows_again(any_world):
    world = any_world
    await world.canary()
    for _ in range(6):
        await world.answer("stable", 40)
        await world.answer("canary", 10, **REFUSED)
    await world.watch()
    rollout, change = await world.rollout(), await world.last_change()
    assert (rollout.stable, rollout.canary, rollout.share) == (1, None, 0.0)
    assert (change.who, change.action) == ("guard:refused", "rollback")
    assert "100.0% of 30 canary sessions against 0.0%" in change.why
    assert "E-values by canary sessions: 1: " in change.why
    trial, (state, decision, used) = await replayed(world)
    assert trial.status == "rolled_back"
    assert trial.decision.e_value >= trial.decision.threshold == 400
    assert (state, decision, used) == (trial.state, trial.decision, trial.observations)


async def test_an_equal_canary_is_not_rolled_back_and_earns_its_promotion(world):
    await world.canary()
    said = [(arm, REFUSED if number % 5 == 0 else {}) for number in range(150) for arm in ["stable"] * 4 + ["canary"]]
    await world.answers(said)
    await world.watch()
    trial, (state, decision, used) = await replayed(world)
    assert (await world.rollout()).canary == 2
    assert (trial.status, trial.decision, decision) == ("running", None, None)
    assert (state, used) == (trial.state, 750)
    assert trial.state.trial.verdict.action == "promote"


async def test_nothing_is_decided_before_thirty_sessions_and_a_burst_of_errors_needs_ten(world):
    await world.canary()
    await world.answer("stable", 116)
    await world.answer("canary", 29, **REFUSED)
    await world.watch()
    assert (await world.rollout()).canary == 2
    await world.answers([("canary", FAILED)] * 4 + [("stable", {})] * 3 + [("canary", FAILED)] * 5)
    await world.watch()
    change = await world.last_change()
    assert change.who in ("guard:error_burst", "guard:refused")


async def test_a_burst_of_errors_is_the_canarys_only_if_the_stable_release_answers(world):
    await world.canary()
    await world.answer("stable", 10, **FAILED)
    await world.answer("canary", 10, **FAILED)
    await world.watch()
    assert (await world.rollout()).canary == 2
    await world.answer("stable", 8)
    await world.answer("canary", 1, **FAILED)
    await world.watch()
    assert (await world.last_change()).who == "guard:error_burst"
    trial, (state, decision, _) = await replayed(world)
    assert (state, decision) == (trial.state, trial.decision)
    assert trial.decision.why.startswith("10 of the canary's last 10 sessions failed")


async def test_a_few_stable_sessions_that_fail_as_the_canarys_do_are_enough_to_wait_for_more(world):
    await world.canary()
    await world.answer("stable", 2, **FAILED)
    await world.answer("canary", 12, **FAILED)
    await world.watch()
    assert (await world.rollout()).canary == 2
    await world.answer("stable", 3)
    await world.watch()
    assert (await world.last_change()).who == "guard:error_burst"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
async def test_an_outage_of_the_engine_that_both_share_takes_no_canary_back(world, share):
    chance = random.Random(3)
    await world.canary(share=share)
    for facts in ({}, FAILED):  # What the stable release said before it is not what it says now.
        await world.answers([("canary" if chance.random() < share else "stable", facts) for _ in range(150)])
        await world.watch()
    assert (await world.rollout()).canary == 2


async def test_an_index_that_gives_the_canary_nothing_is_noticed(world):
    await world.canary()
    await world.answer("stable", 10, retrieval_outcome="used", passages=[{"passage_id": "p"}])
    await world.answer("canary", 8, retrieval_outcome="irrelevant", passages=[])
    await world.answer("canary", 2, retrieval_outcome="irrelevant", passages=[{"passage_id": "p"}])
    await world.watch()
    assert (await world.rollout()).canary == 2
    await world.answer("canary", 5, retrieval_outcome="empty", passages=[])
    await world.answer("stable", 3, retrieval_outcome="used", passages=[{"passage_id": "p"}])
    await world.answer("canary", 4, retrieval_outcome="empty", passages=[])
    await world.watch()
    assert (await world.last_change()).who == "guard:empty_index"


@pytest.mark.parametrize(
    "nonsense",
    [{"answer": "!" * 200}, {"answer": None, "completion_tokens": 64}, {"answer": "", "completion_tokens": 64}],
)
async def test_an_engine_whose_numbers_are_no_numbers_is_taken_back_after_ten_sessions(world, nonsense):
    await world.canary()
    await world.answer("canary", 5, **nonsense)
    await world.answer("stable", 10)
    await world.answer("canary", 4, **nonsense)
    await world.watch()
    assert (await world.rollout()).canary == 2
    await world.answer("canary", 1, **nonsense)
    await world.watch()
    assert (await world.last_change()).who == "guard:degenerate_output"
    trial, (state, decision, _) = await replayed(world)
    assert (state, decision) == (trial.state, trial.decision)
    assert "one short pattern over and over" in trial.decision.why


@pytest.mark.parametrize(
    "sense",
    [
        {"answer": None, "completion_tokens": 64, "store": False},
        {"answer": None, "completion_tokens": 64, "tool_calls": [{"id": "c", "type": "function"}]},
        {"answer": None, "completion_tokens": 0, "verdict": "abstained:nothing_relevant"},
    ],
)
async def test_what_was_not_kept_or_is_a_call_is_no_nonsense(world, sense):
    await world.canary()
    await world.answer("canary", 6, **sense)
    await world.answer("stable", 10)
    await world.answer("canary", 6, **sense)
    await world.watch()
    assert (await world.rollout()).canary == 2


async def test_a_session_is_heard_once_however_much_it_says(any_world):
    world = any_world
    await world.canary()
    mine = await world.answer("canary", 12, conversation="one", **FAILED)
    others = await world.answer("stable", 3, user="two")
    await world.watch()
    await world.answer("canary", 12, conversation="one", **FAILED)
    pinned = await world.answer("canary", 1, conversation="three", outcome="cancelled")
    later = await world.answer("canary", 1, conversation="three")
    await world.answer("canary", 1, assignment="pinned")
    await world.answer("canary", 1, release_name="other@2")
    await world.watch()
    assert pinned
    assert await world.sessions() == [mine[0], others[0], *later]


async def test_many_stable_sessions_are_thinned_by_chance(world):
    await world.canary(share=0.01)
    await world.answer("stable", 400)
    await world.answer("canary", 5)
    await world.watch()
    evidence = (await world.trial()).state.trial.evidence["failed"]
    assert evidence.canary.n == 5
    assert 10 <= evidence.stable.n <= 70  # 32 are to be expected, with a standard deviation of 5.5.


async def test_thumbs_are_heard_where_the_plan_asks_for_them(any_world):
    world = any_world
    await world.canary(plan=ALL)
    for _ in range(4):
        liked, disliked = await world.answer("stable", 40), await world.answer("canary", 10)
        await asyncio.gather(*(world.rate(rated, True) for rated in liked))
        await asyncio.gather(*(world.rate(rated, False) for rated in disliked))
    await world.watch()
    assert (await world.last_change()).who == "guard:disliked"
    trial, (state, decision, _) = await replayed(world)
    assert (state, decision) == (trial.state, trial.decision)


async def test_a_thumb_that_comes_before_its_answer_is_heard_with_it(any_world):
    world = any_world
    await world.canary(plan=ALL)
    facts = {"assignment": "canary", "release_name": "hallmark@2", "completion_tokens": 5}
    late = prediction(**facts)
    await world.rate(late.id, False)
    (there,) = await world.answer("canary")
    await world.rate(there, True)
    await world.watch()  # Past the first thumb, of whose answer nothing is known yet.
    await world.ship(late)
    await world.watch()
    heard = await world.trials.heard((await world.trial()).id)
    said = [each.badness["disliked"] for each in heard if each.kind == "feedback"]
    assert said == [0.0, 1.0]
    trial, (state, decision, _) = await replayed(world)
    assert (state, decision) == (trial.state, trial.decision)


async def test_an_adapter_that_is_not_the_releases_any_more_is_taken_back_at_once(world, tmp_path):
    folder = tmp_path / "adapters" / "tone"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    world.watcher = world.new_watcher(adapter_folders={"tgi": tmp_path / "adapters"})
    await world.canary(adapter="tone", adapter_digest=folder_digest(folder))
    await world.watch()
    assert (await world.rollout()).canary == 2
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    await world.watch()
    change = await world.last_change()
    assert change.who == "guard:adapter_digest"
    assert folder_digest(folder) in change.why
    assert (await world.trial()).status == "rolled_back"


async def test_what_a_person_ended_is_left_alone(world):
    await world.canary()
    await world.answer("stable", 160)
    await world.answer("canary", 40, **FAILED)
    await world.registry.change("hallmark", "promote", lambda rollout, _: promote(rollout), who="person")
    await world.watch()
    assert (await world.last_change()).who == "person"
    assert (await world.trial()).status == "ended"


async def test_a_paused_trial_hears_nothing(world):
    await world.canary()
    pausing = lambda rollout, _: msgspec.structs.replace(rollout, revision=rollout.revision + 1, paused=True)  # noqa: E731
    await world.registry.change("hallmark", "pause", pausing, who="person")
    await world.answer("stable", 20, **FAILED)
    await world.watch()
    assert (await world.trial()).observations == 0


async def test_a_canary_without_traffic_or_feedback_raises_an_alarm_once_and_it_ends_with_the_silence(world, caplog):
    await world.canary(plan=ALL)
    await world.answer("stable", 5)
    await world.watch()
    assert (await world.trial()).alarm is None
    world.clock.pass_seconds(3_600)
    await world.watch()
    await world.watch()
    assert "gets no traffic" in (await world.trial()).alarm
    assert len([line for line in caplog.messages if "cannot come to an end" in line]) == 1
    (rated,) = await world.answer("canary", 1)
    await world.watch()
    assert "the guard disliked has heard nothing" in (await world.trial()).alarm
    await world.rate(rated, True)
    await world.watch()
    assert (await world.trial()).alarm is None


# --- several workers ---


async def test_several_workers_hear_every_session_once_and_roll_back_once(any_world):
    world = any_world
    await world.canary()
    workers = [world.watcher, world.new_watcher(batch_rows=7), world.new_watcher(batch_rows=16)]
    answered: list[str] = []
    for _ in range(8):
        answered += await world.answer("stable", 20)
        answered += await world.answer("canary", 5, **REFUSED)
        await asyncio.gather(*(each.step() for each in workers))
    while any(await asyncio.gather(*(each.step() for each in workers))):
        pass
    changes = await world.registry.changes("hallmark", limit=10)
    assert [change.who for change in changes].count("guard:refused") == 1
    heard = await world.sessions()
    assert heard == answered[: len(heard)]
    trial, (state, decision, used) = await replayed(world)
    assert (state, decision, used) == (trial.state, trial.decision, len(heard))


# From Python 3.13 on an interpreter tells that the driver lets go of a connection whose opening is cancelled.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_worker_that_died_between_reading_and_writing_has_changed_nothing(any_world):
    world = any_world
    await world.canary()
    for _ in range(6):
        await world.answer("stable", 40)
        await world.answer("canary", 10, **REFUSED)
    for turns in range(1, 60, 3):
        step = asyncio.ensure_future(world.new_watcher(batch_rows=11).step())
        for _ in range(turns):
            await asyncio.sleep(0)
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
    await world.watch()
    assert (await world.last_change()).who == "guard:refused"
    trial, (state, decision, used) = await replayed(world)
    assert (state, decision, used) == (trial.state, trial.decision, trial.observations)
