"""The rival that every tuned classifier has to beat: a linear model on sentence vectors.

The main rule: it is measured as the arms are, on the same rows, with vectors that come over OpenAI's API from where
they would be served; so it stands in the same tables, and `compare` can recommend it.
"""

import base64
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from finetune.dataset import Row, read_dataset
from finetune.errors import BadConfig, BadDataset, Unreachable
from finetune.evaluate import Tell, conclude
from finetune.evaluations import Arm, EvaluateConfig, Evaluation
from finetune.scoring import Answer
from finetune.statistics import Floats

BATCH = 64
STRENGTHS = (1.0, 10.0, 100.0)
"""Inverse regularisation strengths to choose from, by cross-validation on the training rows."""


def probe(config: EvaluateConfig, *, key: str | None = None, tell: Tell = lambda *_: None) -> Evaluation:
    """Fit on the split `train`, answer the other, and write what `evaluate` writes. The one arm names the vectors.

    Raises:
        TrainingError: the dataset is not one of classes, of two or more, or nothing answers.
    """
    dataset, (arm,) = read_dataset(config.dataset), config.all_arms
    if dataset.manifest.task != "classify":
        raise BadConfig(f"dataset: a linear probe tells classes, and the task is {dataset.manifest.task!r}")
    train, rows = dataset.split("train"), dataset.split(config.split)[: config.limit]
    if len({row.label for row in train}) < 2:
        raise BadDataset(f"{dataset.folder}: all rows of `train` are {train[0].label!r}; a probe needs two classes")
    started_at = int(time.time())
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=arm.url, headers=headers, timeout=arm.timeout_seconds) as client:
        vectors = []
        for at in range(0, len(train), BATCH):
            vectors.append(_embed(client, arm, train[at : at + BATCH]))
            tell("embedding the training rows", min(at + BATCH, len(train)), len(train))
        model = _fit(np.concatenate(vectors), [row.label or "" for row in train])
        answers = []
        for row in rows:  # One at a time, as requests come: the time is that of one answer.
            asked = time.perf_counter()
            said = str(model.predict(_embed(client, arm, [row]))[0])
            answers.append(Answer(row=row.row, text=said, seconds=time.perf_counter() - asked))
            tell(arm.name, len(answers), len(rows))
    return conclude(dataset, config, rows, {arm.name: answers}, started_at)


def _fit(vectors: Floats, labels: Sequence[str]) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from threadpoolctl import threadpool_limits

    folds = min(5, *(labels.count(label) for label in set(labels)))
    model = LogisticRegression(max_iter=1000)
    with threadpool_limits(1):  # The matrices are small: several threads would wait for each other most of the time.
        if folds < 2:  # A class with one row cannot be both fitted and tested.
            return model.set_params(C=STRENGTHS[1]).fit(vectors, labels)
        search = GridSearchCV(model, {"C": list(STRENGTHS)}, cv=StratifiedKFold(folds, shuffle=True, random_state=0))
        return search.fit(vectors, labels)


def _embed(client: httpx.Client, arm: Arm, rows: Sequence[Row]) -> Floats:
    body = {"model": arm.model, "input": [row.asked[-1].content for row in rows], "encoding_format": "base64"}
    try:
        response = client.post("/embeddings", json=body)
    except httpx.TransportError as error:
        raise Unreachable(f"{arm.name}: {arm.url} does not answer ({error}); is it running?") from error
    if response.status_code != httpx.codes.OK:
        raise Unreachable(f"{arm.name}: {arm.url} refuses with {response.status_code}: {response.text[:200]}")
    found = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in response.json()["data"]]
    return np.stack(found).astype(float)
