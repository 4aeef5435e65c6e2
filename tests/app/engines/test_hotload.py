"""Adapters are loaded into engines that take them while they run."""

import asyncio
from pathlib import Path

import pytest

from app.engines.hotload import ensure_loaded
from app.engines.tgi import TGIEngine
from app.errors import ServiceError
from tests.adapter_folder import write_adapter
from tests.fake_successors import FakeSuccessor
from tests.fake_tgi import FakeTGI


def loads(engine: FakeTGI) -> int:
    return sum(request.path == "/v1/load_lora_adapter" for request in engine.requests)


@pytest.mark.parametrize("dialect", ["embedded", "vllm"])
async def test_an_adapter_is_loaded_once_and_answers_by_its_name(dialect: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "tone", None)
    fake = FakeSuccessor("vllm") if dialect == "vllm" else FakeTGI(lists_adapters=True)
    async with fake as server:
        engine = TGIEngine(server.url, dialect=dialect)
        assert await ensure_loaded(engine, "tone", tmp_path / "tone")
        assert await ensure_loaded(engine, "tone", tmp_path / "tone")
        assert (server.adapters, loads(server)) == (("tone",), 1)
        assert engine.adapters == ("tone",)
        await engine.aclose()


async def test_two_that_load_the_same_at_once_both_have_it(tmp_path: Path) -> None:
    write_adapter(tmp_path / "tone", None)
    async with FakeTGI(lists_adapters=True) as server:
        engine = TGIEngine(server.url, dialect="embedded")
        both = (ensure_loaded(engine, "tone", tmp_path / "tone") for _ in range(2))
        assert await asyncio.gather(*both) == [True, True]
        assert server.adapters == ("tone",)
        await engine.aclose()


async def test_what_the_engine_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    async with FakeTGI(lists_adapters=True) as server:
        engine = TGIEngine(server.url, dialect="embedded")
        with pytest.raises(ServiceError, match=r"has no adapter_config\.json"):
            await ensure_loaded(engine, "tone", tmp_path / "none")
        await engine.aclose()


async def test_an_engine_that_takes_them_at_its_start_only_is_not_asked(tmp_path: Path) -> None:
    async with FakeTGI() as server:
        engine = TGIEngine(server.url)
        assert not await ensure_loaded(engine, "tone", tmp_path)
        assert not server.requests
        await engine.aclose()
