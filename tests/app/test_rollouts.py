"""Who gets the canary is a hash that every replica computes alike, and a change of a rollout is a value."""

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Conflict
from app.releases import Prompt, Release, Releases
from app.rollouts import Lot, Rollout, begin, identity_of, pause, promote, resume, roll_back, set_canary, set_shadow

SEED = "5eed" * 8
PEOPLE = [f"t\0c{number}" for number in range(20_000)]
RELEASES = [Release("hallmark", number, "tgi", Prompt("p", "{sources} {question}")) for number in (1, 2, 3)]

identities = st.text(max_size=50)
shares = st.floats(0, 1)


@given(identities, shares, shares)
def test_a_growing_share_only_ever_takes_more_identities(identity, one, other):
    low, high = sorted((one, other))
    assert (identity in Lot("a", SEED, low)) <= (identity in Lot("a", SEED, high))


@given(identities)
def test_nobody_is_in_a_share_of_nothing_and_everybody_in_the_whole(identity):
    assert identity not in Lot("a", SEED, 0.0)
    assert identity in Lot("a", SEED, 1.0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_what_it_says(share):
    found = statistics.fmean(person in Lot("a", SEED, share) for person in PEOPLE)
    assert abs(found - share) < 5 * (share * (1 - share) / len(PEOPLE)) ** 0.5


def test_another_name_or_another_trial_takes_other_people():
    first = {person for person in PEOPLE if person in Lot("a", SEED, 0.1)}
    for other in (Lot("b", SEED, 0.1), Lot("a", SEED[::-1], 0.1)):
        both = {person for person in first if person in other}
        assert len(both) < 0.2 * len(first)


def test_every_process_computes_the_same():
    code = (
        "import sys; from app.rollouts import Lot; lot = Lot('a', sys.argv[1], 0.3); "
        "print(''.join(str(int(f't\\0c{n}' in lot)) for n in range(500)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, SEED], capture_output=True, text=True, cwd=root, timeout=50)
    assert done.stdout.strip() == "".join(str(int(person in Lot("a", SEED, 0.3))) for person in PEOPLE[:500])


def test_an_identity_is_the_conversation_else_the_user_else_nothing():
    assert identity_of("t", "c1", "u1") == identity_of("t", "c1", "u2")
    assert identity_of("t", None, "u1") == identity_of("t", "", "u1")
    assert identity_of("t", None, None) is None
    different = {identity_of("t", "x", None), identity_of("t", None, "x"), identity_of("u", "x", None)}
    assert len(different) == 3


def test_without_an_identity_chance_decides_for_each_request():
    random.seed(7)
    found = [None in Lot("a", SEED, 0.5) for _ in range(2_000)]
    assert 800 < sum(found) < 1_200


def split(rollout: Rollout) -> Releases:
    releases = Releases()
    assert releases.replace(RELEASES, [rollout]) == []
    return releases


def test_a_request_goes_to_stable_or_canary_and_says_which():
    releases = split(set_canary(begin("hallmark", 1), 2, 0.25))
    found = [releases.resolve("hallmark", person) for person in PEOPLE[:4000]]
    assert {(choice.release.number, choice.role) for choice in found} == {(1, "stable"), (2, "canary")}
    again = split(msgspec.json.decode(msgspec.json.encode(set_canary(begin("hallmark", 1), 2, 0.25)), type=Rollout))
    assert again.resolve("hallmark@3", PEOPLE[0]).role == "pinned"
    assert [releases.resolve("hallmark", person) for person in PEOPLE[:4000]] == found  # Sticky.


def test_a_paused_rollout_sends_everything_to_stable():
    rollout = set_shadow(set_canary(begin("hallmark", 1), 2, 1.0), 3, 1.0)
    assert split(rollout).resolve("hallmark", "x").role == "canary"
    paused = split(pause(rollout)).resolve("hallmark", "x")
    assert (paused.role, paused.shadow) == ("stable", None)
    assert split(resume(pause(rollout))).resolve("hallmark", "x").role == "canary"


def test_a_shadow_is_sampled_and_never_beside_itself():
    releases = split(set_shadow(begin("hallmark", 1), 3, 0.5))
    found = [releases.resolve("hallmark", "x").shadow for _ in range(400)]
    assert 100 < found.count(None) < 300
    assert {release.number for release in found if release} == {3}
    itself = split(set_shadow(set_canary(begin("hallmark", 1), 3, 1.0), 3, 1.0))
    assert itself.resolve("hallmark", "x").shadow is None
    assert releases.resolve("hallmark@1").shadow is None  # A pin is for comparing by hand.


def test_a_name_whose_stable_release_is_missing_stays_as_it_was():
    releases = split(begin("hallmark", 1))
    assert releases.replace(RELEASES, [begin("hallmark", 9), begin("other", 1)]) == ["hallmark", "other"]
    assert releases.resolve("hallmark").release.number == 1
    assert releases.serving == [RELEASES[0]]


def test_a_canary_that_is_missing_gets_nothing():
    assert split(set_canary(begin("hallmark", 1), 9, 1.0)).resolve("hallmark", "x").role == "stable"


# --- changes ---


def test_a_share_that_grows_keeps_its_people_and_another_canary_draws_its_own():
    first = set_canary(begin("hallmark", 1), 2, 0.1)
    grown = set_canary(first, 2, 0.5)
    assert grown.seed == first.seed
    assert len(first.seed) == 32
    assert set_canary(first, 3, 0.1).seed != first.seed
    assert (first.revision, grown.revision) == (2, 3)


def test_promoting_ends_the_trial_and_remembers_what_was_stable():
    after = promote(set_shadow(set_canary(begin("hallmark", 1), 2, 0.1), 2, 0.5))
    assert after == Rollout(name="hallmark", revision=4, stable=2, previous=(1,))
    kept = promote(set_shadow(set_canary(begin("hallmark", 1), 2, 0.1), 3, 0.5))
    assert kept.shadow == 3
    assert promote(begin("hallmark", 1), 3).stable == 3


def test_rolling_back_ends_the_trial_first_and_then_goes_back_step_by_step():
    trial = set_canary(promote(promote(begin("hallmark", 1), 2), 3), 1, 0.5)
    ended = roll_back(trial, {1, 2, 3})
    assert (ended.stable, ended.canary, ended.previous) == (3, None, (1, 2))
    back = roll_back(ended, {1, 2, 3})
    assert (back.stable, back.previous) == (2, (1,))
    assert roll_back(back, {1, 2, 3}).stable == 1
    assert roll_back(ended, {1, 3}).stable == 1  # What was deleted meanwhile is passed over.
    with pytest.raises(Conflict, match="no release was stable before"):
        roll_back(begin("hallmark", 1), {1})


def test_what_does_not_fit_the_state_is_refused():
    rollout = begin("hallmark", 1)
    with pytest.raises(Conflict, match="no canary"):
        promote(rollout)
    with pytest.raises(Conflict, match="stable release already"):
        promote(rollout, 1)
    with pytest.raises(Conflict, match="stable release already"):
        set_canary(rollout, 1, 0.5)
    with pytest.raises(Conflict, match="not paused"):
        resume(rollout)
    with pytest.raises(Conflict, match="paused already"):
        pause(pause(rollout))


def test_a_paused_rollout_that_is_given_a_canary_goes_on():
    assert not set_canary(pause(begin("hallmark", 1)), 2, 0.1).paused


def test_what_can_be_gone_back_to_is_bounded():
    rollout = begin("hallmark", 1)
    for number in range(2, 60):
        rollout = promote(rollout, number)
    assert rollout.previous == tuple(range(39, 59))


@pytest.mark.slow
@pytest.mark.alone
def test_resolving_costs_a_few_microseconds():
    releases = split(set_shadow(set_canary(begin("hallmark", 1), 2, 0.1), 3, 0.1))
    best = min(_seconds_of(releases) for _ in range(20))
    assert best < 6e-6


def _seconds_of(releases: Releases) -> float:
    started = time.perf_counter()
    for person in PEOPLE[:2_000]:
        releases.resolve("hallmark", person)
    return (time.perf_counter() - started) / 2_000
