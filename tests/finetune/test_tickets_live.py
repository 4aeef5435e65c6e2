"""The embedded model learns to route tickets that share no sentence with what it was trained on, as it is served."""

import resource
from pathlib import Path

import pytest

from app.engines.local import DEFAULT_MODEL
from app.engines.local.weights import WeightsUnavailable, find_weights
from finetune.config import TrainConfig
from finetune.evaluate import evaluate
from finetune.evaluations import Arm, EvaluateConfig
from finetune.tickets import PROMPT, write_tickets
from finetune.train import train
from tests.embedded_engine import embedded_engine

HELD_OUT = 120
CPU_SECONDS = 1200
"""Ten minutes of two cores."""


@pytest.mark.long
@pytest.mark.timeout(5400)  # Ten minutes on two idle cores; beside other work much longer.
def test_a_small_run_improves_a_held_out_task_as_it_is_served(tmp_path: Path) -> None:
    try:
        model = find_weights(DEFAULT_MODEL, Path.home() / ".cache" / "hallmark").location
    except WeightsUnavailable as error:
        pytest.skip(str(error))
    write_tickets(tmp_path / "tickets", train=480, heldout=HELD_OUT)
    config = TrainConfig(
        dataset=tmp_path / "tickets",
        base=model,
        output=tmp_path / "adapter",
        prompt=PROMPT,
        max_tokens=128,
        check_every_steps=60,
        check_rows=12,
        patience=0,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    manifest = train(config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < CPU_SECONDS
    with embedded_engine(model, {"tickets": config.output}) as url:
        arms = tuple(Arm(name=name, model=served, url=f"{url}/v1", prompt=PROMPT, max_tokens=8, timeout_seconds=600)
                     for name, served in (("base", "tgi"), ("tuned", "tickets")))  # fmt: skip
        found = evaluate(EvaluateConfig(dataset=config.dataset, output=tmp_path / "evaluation", arms=arms))
    print((tmp_path / "evaluation" / "report.md").read_text(), manifest["metrics"], manifest["seconds"])
    (change,) = found.comparisons
    assert (change.arm, change.against) == ("tuned", "base")
    assert change.difference.low > 0, change
    assert not found.arms[1].failures
