"""The four arms as `hallmark-train evaluate` asks them: of releases of a running service, through its whole gateway."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.dataset import write_dataset
from finetune.evaluations import read_results
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import Api, live_service

pytestmark = pytest.mark.slow

FACTS = {
    "How fast does the Aurora kettle boil one litre?": "The Aurora kettle boils one litre in 90 seconds.",
    "How often do I descale the Aurora kettle?": "Descale the Aurora kettle every 30 days with citric acid.",
    "How long does the warranty of the Aurora kettle last?": "The warranty of the Aurora kettle lasts 24 months.",
    "How much does the Borealis toaster weigh?": "The Borealis toaster weighs 2300 grams.",
    "How many slots does the Borealis toaster have?": "The Borealis toaster has four slots.",
    "Where does the crumb tray of the Borealis toaster slide out?": "The crumb tray slides out at the back.",
}
NOWHERE = ["Who designed the harbour bridge of Sydney?", "Which planet has the most moons?"]
LEARNT = [*FACTS][:3]
"""What the adapter says without any passage."""


def engine(body: dict[str, Any]) -> Tokens:
    """Stands for a model that reads what it is given, and otherwise makes something up, unless it has learnt it."""
    prompt = " ".join(str(each["content"]) for each in body["messages"])
    asked = next((each for each in (*FACTS, *NOWHERE) if each in prompt), "")
    fact = FACTS.get(asked, "")
    knows = fact in prompt or (body["model"] == "tone" and asked in LEARNT)
    return Tokens(fact if fact and knows else "Most people guess a wrong number such as 77.")


async def rows_of(api: Api) -> list[dict[str, Any]]:
    """Rows as a dataset made of reviewed answers has them, with passages of the service's own documents."""
    rows = []
    for asked in (*FACTS, *NOWHERE):
        found = (await api.client.post("/v1/search", json={"query": asked, "top_k": 3})).json()["hits"]
        wanted = ("id", "document_id", "text")
        passages = [{name: each["passage"][name] for name in wanted} for each in found]
        right = FACTS.get(asked)
        rows.append(
            {
                "task": "answer",
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": right or "No answer."},
                ],
                "passages": passages,
                # Passages overlap: of two that say it the better one is cited.
                "citations": [each["id"] for each in passages if right and right in each["text"]][:1],
                "answerable": right is not None,
            }
        )
    return rows


async def test_base_and_adapter_are_measured_with_and_without_retrieval_as_they_are_served(tmp_path: Path) -> None:
    settings = {"retrieval": {"passage_tokens": 32}, "engine": {"dialect": "embedded"}}
    async with (
        FakeTGI(default=engine, adapters=("tone",), lists_adapters=True) as tgi,
        live_service(tmp_path / "data", engine_url=tgi.url, settings=settings) as service,
        service.client() as client,
    ):
        api = Api(client, "default", service.key)
        for name in ("kettle", "toaster"):
            await api.add(f"{name}.md", "\n\n".join(each for each in FACTS.values() if name in each or "tray" in each))
        made = await client.post("/v1/releases", json={"name": "hallmark", "adapter": "tone"})
        assert (made.json()["id"], made.json()["approved"]) == ("hallmark@2", True), made.text
        write_dataset(
            tmp_path / "dataset", {"train": [], "heldout": await rows_of(api)}, name="faq", version="1", task="answer"
        )
        file = tmp_path / "evaluation.toml"
        file.write_text(
            f'dataset = "dataset"\noutput = "out"\nurl = "{service.url}/v1"\n'
            '[four]\nbase = "hallmark@1"\nadapter = "hallmark@2"\n'
        )
        runner = CliRunner(env={"HALLMARK_API_KEY": service.key, "COLUMNS": "200"})
        done = await asyncio.to_thread(runner.invoke, app, ["evaluate", str(file)])
        assert done.exit_code == 0, done.output
        records = await api.records(4 * (len(FACTS) + len(NOWHERE)))
    found, facts = read_results(tmp_path / "out")
    arms = {arm.name: arm for arm in found.arms}
    assert [*arms] == ["base", "base + retrieval", "adapter", "adapter + retrieval"]
    assert {name: arm.releases for name, arm in arms.items()} == {
        "base": ("hallmark@1",),
        "base + retrieval": ("hallmark@1",),
        "adapter": ("hallmark@2",),
        "adapter + retrieval": ("hallmark@2",),
    }
    assert all(arm.failures == {} for arm in found.arms)
    # What was measured is what was served: by each release, with passages in half of the cases.
    served = {(each["release_name"], each["retrieval_mode"]) for each in records}
    assert served == {(f"hallmark@{number}", mode) for number in (1, 2) for mode in ("off", "auto")}
    scores = {name: [row.scores[name].score for row in facts] for name in arms}
    assert sum(scores["base"]) < sum(scores["adapter"]) < sum(scores["base + retrieval"])
    with_retrieval = arms["adapter + retrieval"].figures
    assert with_retrieval["exact_match"].value == 1
    assert with_retrieval["citation_precision"].value == with_retrieval["citation_recall"].value == 1
    assert with_retrieval["abstained_right"].value == 1
    assert arms["base"].figures["abstained_right"].value == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "The index: the adapter adds nothing" in report
    compared = ["compare", str(tmp_path / "out"), "--output", str(tmp_path / "recommendation"), "--margin", "0.2"]
    done = await asyncio.to_thread(runner.invoke, app, compared)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "recommendation" / "recommendation.json").read_text())
