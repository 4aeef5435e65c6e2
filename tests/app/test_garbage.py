"""What an answer leaves behind: nothing that only the garbage collector could free.

What lies in a circle is not used again at once: each answer then works in memory that is cold, and collections come
between answers. When a span led back to the request that it was of, that cost one part in twelve of an answer's
processor time.
"""

import gc
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from tests.fake_tgi import FakeTGI
from tests.service import Api, live_service

OURS = ("app.", "observability.", "retrieval.")


@contextmanager
def garbage() -> Iterator[Counter[str]]:
    """Count what of ours only a collection frees, of all that becomes free in the block."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        for thing in gc.garbage:
            kind = type(thing)
            if kind.__module__.startswith(OURS):
                found[f"{kind.__module__}.{kind.__qualname__}"] += 1
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.fixture
async def api(tmp_path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    # Traced and left out by the sampler, as most requests are: their spans are noted.
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path, engine_url=tgi.url, tenants=1) as service,
        service.tenant() as api,
    ):
        await api.add("kettle.md", "# Kettle\n\nThe kettle boils one litre in 90 seconds.")
        yield api


@pytest.mark.parametrize("retrieval", ["off", "auto"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_leaves_nothing_to_the_collector(api: Api, stream: bool, retrieval: str) -> None:
    async def answer() -> None:
        asked = {"retrieval": {"mode": retrieval}}
        if stream:
            assert (await api.stream("How long does the kettle take for a litre?", **asked)).done
        else:
            await api.answer("How long does the kettle take for a litre?", **asked)

    await answer()  # What the first of a kind makes stays.
    with garbage() as found:
        for _ in range(5):
            await answer()
        await api.records(6)  # All are on record, and let go.
    assert found == {}
