"""What drifts raises an alarm that names it, what does not stays quiet, and a worker may be killed at any moment."""

import pytest

from tests.drift_world import drift_world


@pytest.fixture
async def world(tmp_path):
    async with drift_world(f"sqlite:///{tmp_path / 'drift.db'}") as world:
        await world.begin()
        yield world


async def test_a_new_topic_raises_an_alarm_that_names_its_questions(world):
    await world.queue()
    await world.ask(400)
    new = []
    for _ in range(2):
        new += (await world.ask(200, topic=lambda n: 6 if n % 4 == 0 else n % 6))[::4]
    await world.ask(1)
    await world.watch()
    state = await world.drift.state("acme", "hallmark@1")
    assert (state.alarm, state.kinds, state.windows, state.is_doubtful) == (True, ("inputs",), 2, True)
    assert state.since == world.clock.now
    assert len(state.examples) == 5
    assert set(state.examples) <= set(new)
