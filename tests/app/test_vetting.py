"""A release is held against the engine before it may serve, and what is wrong is told by field."""

import hashlib
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.engines import EngineInfo
from app.engines.tgi import TGIEngine
from app.errors import EngineUnavailable
from app.messages import Generation, Piece
from app.releases import Prompt, Release, RetrievalPlan, Task
from app.vetting import Site, folder_digest, vet
from tests.fake_tgi import FakeTGI

INFO = EngineInfo(model_id="org/base", revision="abc", max_total_tokens=1_000, adapters=("tone",))
RELEASE = Release("hallmark", 1, "tgi", Prompt("p", "{sources} {question}"), base_model="org/base", base_revision="abc")
SITE = Site(engine="tgi")


class AnEngine:
    """Says what it is told to say; counts a token a character."""

    def __init__(self, info: EngineInfo = INFO, *, base: Any = None, adapted: Any = None) -> None:
        self.info = info
        self.logprobs = {None: base, "tone": adapted}

    async def describe(self) -> EngineInfo:
        return self.info

    async def count_tokens(self, text: str) -> int:
        return len(text)

    async def generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        found = self.logprobs[generation.adapter]
        if found == "refuse":
            raise EngineUnavailable("away")
        yield [Piece(text="A", logprobs={"content": found} if found else None, finish_reason="length")]

    async def healthy(self) -> bool:
        return True

    async def aclose(self) -> None:
        pass


def variant(**fields: Any) -> Release:
    return msgspec.structs.replace(RELEASE, **fields)


async def test_a_release_that_says_what_the_engine_says_has_no_problems():
    assert await vet(RELEASE, AnEngine(), SITE) == []
    assert await vet(variant(adapter="tone"), AnEngine(), SITE) == []
    assert await vet(variant(base_model=None, base_revision=None), AnEngine(), SITE) == []


@pytest.mark.parametrize("dialect", ["embedded", "vllm"])
async def test_where_any_weights_can_get_a_name_the_name_has_to_hold_the_digest(dialect):
    site, digest = Site(engine="tgi", dialect=dialect), hashlib.sha256(b"weights").hexdigest()
    release = variant(adapter="tone", adapter_digest=digest)
    (problem,) = await vet(release, AnEngine(), site)
    assert f"not known to serve 'tone@{digest[:16]}', but tone" in problem
    for name in (f"tone@{digest[:16]}", f"tone-{digest[:16]}"):
        served = AnEngine(msgspec.structs.replace(INFO, adapters=(name,)))
        named = name if name.startswith("tone-") else "tone"
        assert await vet(variant(adapter=named, adapter_digest=digest), served, site) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"engine": "vllm"}, "`engine` is 'vllm'; it is held against the engine 'tgi'"),
        ({"served_model": "tuned"}, "`served_model` is 'tuned'"),
        ({"base_model": "org/other"}, "`base_model` is 'org/other'; the engine serves 'org/base'"),
        ({"base_revision": "xyz"}, "`base_revision` is 'xyz'; the engine serves 'abc'"),
        ({"adapter": "toen"}, "not known to serve 'toen', but tone"),
        (
            {"retrieval": RetrievalPlan(collection="papers")},
            "`retrieval.collection` is 'papers'; here it is 'hallmark'",
        ),
        ({"retrieval": RetrievalPlan(fusion="rrf")}, "`retrieval.fusion` is 'rrf'"),
        ({"task": Task("classify", ("a" * 200, "yes")), "max_tokens": 1_000}, "the engine has room for 1000"),
        ({"max_tokens": 760}, "the engine has room for 1000"),
        ({"prompt": Prompt("p", "{sources} {question}" + "x" * 500)}, "Shorten `prompt.template`"),
    ],
)
async def test_what_does_not_agree_is_told_by_field(fields, said):
    (problem,) = await vet(variant(**fields), AnEngine(), SITE)
    assert said in problem


async def test_a_release_without_retrieval_needs_no_collection_and_no_room_for_passages():
    off = RetrievalPlan(mode="off", collection="nowhere")
    assert await vet(variant(retrieval=off, max_tokens=960), AnEngine(), SITE) == []
    assert await vet(variant(retrieval=off, max_tokens=970), AnEngine(), SITE) != []


async def test_all_disagreements_are_told_at_once():
    assert len(await vet(variant(engine="vllm", base_model="x", adapter="y"), AnEngine(), SITE)) == 3


async def test_what_an_engine_does_not_say_is_not_held_against_a_release():
    assert await vet(RELEASE, AnEngine(EngineInfo(model_id="org/base")), SITE) == []


async def test_the_settings_name_for_the_base_model_will_do():
    named = Site(engine="tgi", base_model="smollm2-135m-instruct")
    assert await vet(variant(base_model="smollm2-135m-instruct"), AnEngine(), named) == []


FIRST, SECOND = [{"token": "A", "logprob": -0.5}], [{"token": "A", "logprob": -0.4}]


@pytest.mark.parametrize(
    ("base", "adapted", "suspicious"),
    [(FIRST, FIRST, True), (FIRST, SECOND, False), (None, None, False), (FIRST, "refuse", False)],
)
async def test_an_adapter_that_answers_exactly_as_the_base_model_is_not_there(base, adapted, suspicious):
    problems = await vet(variant(adapter="tone"), AnEngine(base=base, adapted=adapted), SITE)
    assert [("exactly as its base model" in problem) for problem in problems] == [True] * suspicious


async def test_only_tgi_is_suspected_of_that():
    release = variant(adapter="tone", engine="vllm")
    assert await vet(release, AnEngine(base=FIRST, adapted=FIRST), Site(engine="vllm", dialect="vllm")) == []


async def test_an_engine_that_is_away_cannot_be_asked():
    engine = TGIEngine("http://127.0.0.1:9")
    with pytest.raises(EngineUnavailable):
        await vet(RELEASE, engine, SITE)
    await engine.aclose()


async def test_a_real_adapter_of_the_stand_in_is_known_by_the_settings():
    async with FakeTGI(adapters=("tone",)) as tgi:
        for adapters, count in (((), 1), (("tone",), 0)):
            engine = TGIEngine(tgi.url, adapters=adapters)
            found = await vet(variant(base_revision=None, adapter="tone"), engine, SITE)
            await engine.aclose()
            assert len(found) == count, found


# --- the adapter's folder ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tone"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "README.md").write_text("about")
    return folder


def test_the_digest_is_what_the_documented_command_prints(folder):
    command = "sha256sum adapter_config.json adapter_model.safetensors | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert folder_digest(folder) == printed.split()[0]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
async def test_a_folder_that_was_changed_is_noticed(folder, name):
    site = Site(engine="tgi", adapter_folder=folder.parent)
    release = variant(adapter="tone", adapter_digest=folder_digest(folder))
    assert await vet(release, AnEngine(), site) == []
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    (problem,) = await vet(release, AnEngine(), site)
    assert problem.startswith("`adapter_digest` is ")
    assert folder_digest(folder) in problem


async def test_a_folder_on_this_machine_needs_a_digest_in_the_release(folder):
    site = Site(engine="tgi", adapter_folder=folder.parent)
    (problem,) = await vet(variant(adapter="tone"), AnEngine(), site)
    assert folder_digest(folder) in problem
    (folder / "adapter_model.safetensors").unlink()
    (problem,) = await vet(variant(adapter="tone"), AnEngine(), site)
    assert "cannot be read" in problem


async def test_a_folder_on_another_machine_is_taken_at_its_word(tmp_path):
    release = variant(adapter="tone", adapter_digest=hashlib.sha256(b"").hexdigest())
    assert await vet(release, AnEngine(), Site(engine="tgi", adapter_folder=tmp_path)) == []
