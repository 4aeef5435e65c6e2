"""Asks every arm the same rows and says what each was worth, with intervals, and what it took.

The main rule: arms are compared row by row, so that what makes a row hard is in no difference. The figures of a task
are those of the field: accuracy and macro F1; exact match and token F1, citations and abstentions; valid data.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import msgspec
import numpy as np

from finetune.asking import ask_all
from finetune.dataset import Dataset, Row, read_dataset
from finetune.errors import BadConfig
from finetune.evaluations import (
    ANSWERS,
    GIVEN,
    MEASURED,
    PICTURE,
    RESULTS,
    SCORES,
    Arm,
    ArmResult,
    Comparison,
    EvaluateConfig,
    Evaluation,
    RowFacts,
    write_json,
    write_lines,
)
from finetune.report import draw_arms, evaluation_markdown
from finetune.scoring import Answer, Score, score
from finetune.statistics import MIN_SESSIONS, Estimate, Floats, Sample, bootstrap, difference, mean

Tell = Callable[[str, int, int], None]


def evaluate(config: EvaluateConfig, *, key: str | None = None, tell: Tell = lambda *_: None) -> Evaluation:
    """Ask, judge and write `evaluation.json`, `report.md`, `arms.png`, `scores.jsonl` and `answers.jsonl`.

    `tell` is told the arm, how many rows are answered, and of how many.

    Raises:
        TrainingError: says which setting, row or server is wrong, and what to do.
    """
    dataset = read_dataset(config.dataset)
    if dataset.manifest.task == "preference":
        raise BadConfig("dataset: pairs of preferences have no right answer to score by; take a set of answers")
    rows = dataset.split(config.split)[: config.limit]
    started_at = int(time.time())
    answers: dict[str, list[Answer]] = {}
    for arm in config.all_arms:
        answers[arm.name] = []
        for answer in ask_all(arm, rows, dataset.manifest, key=key, concurrency=config.concurrency):
            answers[arm.name].append(answer)
            tell(arm.name, len(answers[arm.name]), len(rows))
    return conclude(dataset, config, rows, answers, started_at)


def conclude(
    dataset: Dataset, config: EvaluateConfig, rows: Sequence[Row], answers: dict[str, list[Answer]], started_at: int
) -> Evaluation:
    """Write what was answered, judge it, and write what was found.

    The answers come first, so that nothing loses what was asked for hours. The results come after all that they are
    read with, and name its digest: where they are, they are of these rows. Pictures come last: only people want them.
    """
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    for earlier in (RESULTS, PICTURE):
        (output / earlier).unlink(missing_ok=True)
    write_lines(output / ANSWERS, [{"arm": name, "answer": each} for name in answers for each in answers[name]])
    found, facts = judge(dataset, config, rows, answers, started_at)
    found = msgspec.structs.replace(found, scores_sha256=write_lines(output / SCORES, facts))
    (output / "report.md").write_text(evaluation_markdown(found), encoding="utf-8")
    write_json(output / RESULTS, found)
    draw_arms(output / PICTURE, found)
    return found


def judge(
    dataset: Dataset, config: EvaluateConfig, rows: Sequence[Row], answers: dict[str, list[Answer]], started_at: int
) -> tuple[Evaluation, list[RowFacts]]:
    """Score all answers and make the figures of them."""
    scores = {
        name: [score(row, answer, dataset.manifest) for row, answer in zip(rows, found, strict=True)]
        for name, found in answers.items()
    }
    sample = Sample.of([row.weight for row in rows], [row.session for row in rows])
    facts = [
        RowFacts(
            row=row.row,
            session=row.session,
            slice=row.slice,
            weight=row.weight,
            label=row.label,
            scores={name: found[n] for name, found in scores.items()},
        )
        for n, row in enumerate(rows)
    ]
    evaluation = Evaluation(
        dataset=f"{dataset.manifest.name} {dataset.manifest.version}",
        dataset_digest=dataset.manifest.digest,
        split=config.split,
        task=dataset.manifest.task,
        rows=len(rows),
        sessions=int(sample.sessions.max()) + 1,
        concurrency=config.concurrency,
        started_at=started_at,
        arms=tuple(_result(arm, rows, answers[arm.name], scores[arm.name], sample) for arm in config.all_arms),
        comparisons=compare_arms(scores, sample),
    )
    return evaluation, facts


def compare_arms(scores: dict[str, list[Score]], sample: Sample) -> tuple[Comparison, ...]:
    """Each arm against each one before it."""
    values = {name: column(found) for name, found in scores.items()}
    return tuple(
        Comparison(later, earlier, difference(values[later], values[earlier], sample))
        for earlier, later in combinations(values, 2)
    )


def column(scores: Sequence[Score]) -> Floats:
    """The scores as numbers."""
    return np.array([each.score for each in scores])


def _result(arm: Arm, rows: Sequence[Row], answers: list[Answer], scores: list[Score], sample: Sample) -> ArmResult:
    came = [answer for answer in answers if answer.failure is None]
    seconds = np.array([answer.seconds for answer in came] or [0.0])
    names = sorted({row.slice for row in rows if row.slice is not None})
    slices = {name: np.array([row.slice == name for row in rows]) for name in names}
    return ArmResult(
        name=arm.name,
        model=arm.model,
        url=arm.url,
        retrieval=arm.retrieval,
        releases=tuple(sorted({answer.release for answer in came if answer.release})),
        figures=figures(rows, scores, sample),
        slices={name: mean(column(scores)[kept], sample.where(kept)) for name, kept in slices.items()},
        failures=dict(Counter(answer.failure for answer in answers if answer.failure is not None)),
        seconds={
            "mean": round(float(seconds.mean()), 4),
            "p50": round(float(np.quantile(seconds, 0.5)), 4),
            "p95": round(float(np.quantile(seconds, 0.95)), 4),
        },
        tokens={
            "prompt": round(float(np.mean([answer.prompt_tokens for answer in came] or [0])), 1),
            "completion": round(float(np.mean([answer.completion_tokens for answer in came] or [0])), 1),
        },
        cost=round(float(seconds.mean()) * 1000, 3) if arm.cost is None else arm.cost,
        cost_unit=MEASURED if arm.cost is None else GIVEN,
    )


def figures(rows: Sequence[Row], scores: list[Score], sample: Sample) -> dict[str, Estimate]:
    """The figures of the task. `score` is what arms are compared by."""
    found = {"score": mean(column(scores), sample)}
    if rows[0].task == "classify":
        return found | {
            "macro_f1": _macro_f1([row.label or "" for row in rows], scores, sample),
            "unfit": mean(np.array([float(each.said is None and not each.failed) for each in scores]), sample),
        }
    parts = {
        "exact_match": [each.exact for each in scores],
        "token_f1": [each.token_f1 for each in scores],
        "valid": [each.valid for each in scores],
        "abstained_right": [None if each.answerable is not False else float(bool(each.abstained)) for each in scores],
        "abstained_wrong": [None if each.answerable is not True else float(bool(each.abstained)) for each in scores],
    }
    for name, values in parts.items():
        kept = np.array([value is not None for value in values])
        if kept.any():
            found[name] = mean(np.array([value for value in values if value is not None]), sample.where(kept))
    if rows[0].task == "answer":
        cited = np.array([[each.cited_right, each.cited, each.to_cite_found, each.to_cite] for each in scores], float)
        found["citation_precision"] = _ratio(cited[:, :2], sample)
        found["citation_recall"] = _ratio(cited[:, 2:], sample)
    return found


def _ratio(parts: Floats, sample: Sample) -> Estimate:
    """The sum of the first column over that of the second, by the rows that have something of the second."""

    def statistic(sums: Floats) -> Floats:
        return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)

    kept = parts[:, 1] > 0
    return bootstrap(statistic, parts[kept], sample.where(kept))


def _macro_f1(truths: list[str], scores: list[Score], sample: Sample) -> Estimate:
    """F1 averaged over the classes that there are, each from its counts of right, told and true rows."""
    classes = {name: n for n, name in enumerate(sorted(set(truths)))}
    width = len(classes)
    parts = np.zeros((len(truths), 3 * width))
    for n, (truth, each) in enumerate(zip(truths, scores, strict=True)):
        parts[n, 2 * width + classes[truth]] = 1
        if each.said in classes:
            parts[n, width + classes[each.said]] = 1
            parts[n, classes[truth]] = each.said == truth

    def statistic(sums: Floats) -> Floats:
        right, told, true = np.split(sums, 3, axis=1)
        scored = np.divide(2 * right, told + true, out=np.full(right.shape, np.nan), where=told + true > 0)
        averaged: Floats = np.nanmean(scored, axis=1)
        return averaged

    found = bootstrap(statistic, parts, sample)
    # As the quality figures do: the effective rows of a class, on harmonic average, each class with the same say.
    own = parts[:, 2 * width :]
    of_class = Sample(sample.weights / (own @ (sample.weights @ own)), sample.sessions)
    enough = of_class.equal_sessions >= MIN_SESSIONS * width
    return found if enough else msgspec.structs.replace(found, low=0.0, high=1.0)
