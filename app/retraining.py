"""The whole way from labels to a canary: dataset, training, draft release, evaluation, canary.

The main rule: no canary without an evaluation that shows, row by row, that it is not worse than the stable release by
the margin. Each step is noted in the run's folder when it is done, so that whoever is cut off goes on where it was.
Training is another program, which shares files with this one and nothing else.
"""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from app import publishing
from app.client import Client, ServiceFailure
from app.dataset_commands import ended, export_version
from app.retrain_files import (
    EvaluationRead,
    RecommendationRead,
    State,
    TestedRead,
    decoded,
    load,
    read_file,
    read_json,
    save,
)

CANDIDATE, STABLE = "candidate", "stable"
OUTAGES = frozenset(
    {"429", "500", "502", "503", "504", "engine_error", "engine_interrupted", "engine_timeout", "engine_unavailable",
     "features_unavailable", "internal_error", "overloaded", "rate_limit_exceeded", "record_unavailable",
     "retrieval_unavailable", "timeout", "unavailable", "unreachable"}
)  # fmt: skip
"""Failures that say of the service, and not of a release, that it did not answer: our error codes, and where there was
none what training calls it."""
MOST_OUTAGES = 0.01
"""The share of the rows that may be lost to them: it moves a difference by so much at most."""
Tell = Callable[[str], object]


class TrainerFailed(ServiceFailure):
    """`hallmark-train` ended with an error, which it has told."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an evaluation decided, and what it rests on."""

    passes: bool
    reason: str
    evaluation: EvaluationRead
    tested: TestedRead


@dataclass(frozen=True, slots=True)
class Trainer:
    """The training program."""

    command: Sequence[str]
    key: str
    """Handed over in the environment, where no list of processes shows it."""

    def __call__(self, *arguments: str | Path | None, quiet: bool = False) -> None:
        """Run it, and leave the terminal to it, or if `quiet` what it says of its progress and errors alone.

        Raises:
            TrainerFailed: it cannot be started, or ended with an error.
        """
        given = [*self.command, *(str(each) for each in arguments if each is not None)]
        inherited = os.environ  # noqa: TID251 - what a child inherits is not configuration read.
        try:
            told = subprocess.DEVNULL if quiet else None
            environment = {**inherited, "HALLMARK_API_KEY": self.key}
            done = subprocess.run(given, env=environment, stdout=told, check=False)  # noqa: S603
        except OSError as error:
            raise TrainerFailed(
                f"{self.command[0]}: {error.strerror}. Install `hallmark[train]`, or name it with --trainer."
            ) from error
        if done.returncode:
            raise TrainerFailed(
                f"`{' '.join(given[:3])} ...` ended with {done.returncode}. Once that is put right, run this again: it "
                "goes on where it was."
            )


@dataclass(frozen=True, slots=True)
class Retraining:
    """One run."""

    client: Client
    trainer: Trainer
    folder: Path
    config: Path | None
    adapters: Path | None
    tell: Tell

    def bring_dataset(self, *, earlier: Sequence[State] = ()) -> State | None:
        """Build the dataset's next version and export it; gives an earlier run that had the very same, if one did."""
        state = load(self.folder)
        if state.dataset_digest is not None:
            return None
        plan = state.plan
        if plan.recipe is not None and state.version is None:
            if state.build is None:
                body = {"recipe": plan.recipe, "purpose": "training"}
                state.build = self.client.call("POST", f"/v1/datasets/{plan.dataset}/builds", json=body)["id"]
                save(self.folder, state)
            build = ended(self.client, self.client.call("GET", f"/v1/datasets/{plan.dataset}/builds/{state.build}"))
            if build["state"] != "done":
                state.build = None
                save(self.folder, state)
                raise ServiceFailure(build["error"]["message"] if build["error"] else "The build was cancelled.")
            state.version = build["version"]
            save(self.folder, state)
        label = f"{plan.dataset}@{state.version}" if state.version else plan.dataset
        state.version, manifest = export_version(self.client, label, self.folder / "dataset")
        if plan.evaluation:
            export_version(self.client, plan.evaluation, self.folder / "evaluation-set")
        state.dataset_digest = manifest["digest"]
        save(self.folder, state)
        rows = {split: facts["rows"] for split, facts in manifest["splits"].items()}
        self.tell(
            f"dataset {plan.dataset}@{state.version}: {rows['train']} rows to train on, {rows['heldout']} held out"
        )
        same = (each for each in earlier if each.dataset_digest == state.dataset_digest and _made_alike(each, state))
        return next(same, None)

    def give_up(self, reason: str) -> None:
        """Note that nothing will come of this run."""
        state = load(self.folder)
        state.outcome, state.reason = "given up", reason
        save(self.folder, state)

    def train(self) -> None:
        """Train, or go on training, and verify what came of it."""
        state = load(self.folder)
        if state.adapter_digest is not None:
            return
        base = ("--base", state.plan.base) if state.plan.base else ()
        folders = ("--dataset", self.folder / "dataset", "--output", self.folder / "adapter")
        self.trainer("train", self.config, *folders, *base)
        adapter = publishing.read_adapter(self.folder / "adapter")
        if adapter.manifest.dataset_digest != state.dataset_digest:
            raise publishing.NotPublished(
                f"The adapter was trained on {adapter.manifest.dataset_digest}, not on {state.dataset_digest}, which "
                "was exported for it."
            )
        state.adapter_digest = adapter.manifest.adapter_digest
        save(self.folder, state)

    def draft(self) -> bool:
        """Publish the adapter as a release that nobody is answered by yet; anew where another is stable by now.

        False where it has become the stable one meanwhile, by hand, so that nothing is left to do.

        Raises:
            NeedsRestart: the engine has to be started with the adapter.
            NotPublished: something keeps it from serving.
        """
        state = load(self.folder)
        stable = publishing.stable_release(self.client, state.plan.name)
        if state.release == stable["id"]:
            state.outcome, state.reason = "promoted", f"{state.release} was promoted by hand."
            save(self.folder, state)
            return False
        if state.stable != stable["id"]:
            state.stable, state.release, state.evaluation = stable["id"], None, None
            save(self.folder, state)
        # Also where it was done: an engine that was started since has forgotten its adapters.
        adapter = publishing.read_adapter(self.folder / "adapter")
        made = publishing.publish(
            self.client, adapter, stable, adapters=self.adapters, dataset=self.folder / "dataset", tell=self.tell
        )
        state.release = made["id"]
        save(self.folder, state)
        self.tell(f"{made['id']} is a draft beside {stable['id']}")
        return True

    def evaluate(self) -> Verdict:
        """Ask the draft and the stable release the same rows through the gateway, and judge."""
        state = load(self.folder)
        assert state.release
        assert state.stable
        results = self.folder / f"evaluation-of-{state.release}-beside-{state.stable}"
        compared = results / "comparison"
        if state.evaluation is None:
            asked = self.folder / ("evaluation-set" if state.plan.evaluation else "dataset")
            answer_tokens = self.client.call("GET", f"/v1/releases/{state.stable}")["content"]["max_tokens"]
            # The costs say no more than which of the two is to be tested against the other.
            arms = [
                part
                for arm, label, cost in ((CANDIDATE, state.release, 0), (STABLE, state.stable, 1))
                for part in ("--arm", f"{arm}={label},url={self.client.url}/v1,max_tokens={answer_tokens},cost={cost}")
            ]
            limit = ("--limit", str(state.plan.limit)) if state.plan.limit else ()
            if not (results / "evaluation.json").exists():
                self.trainer("evaluate", "--dataset", asked, "--split", "heldout", "--output", results, *arms, *limit)
            margin = ("--margin", f"{state.plan.margin:g}")
            # It would tell of costs saved, which were given for the order alone.
            self.trainer("compare", results, "--output", compared, *margin, "--reference", STABLE, quiet=True)
        content = read_file(results / "evaluation.json")
        digest = sha256(content).hexdigest()
        if state.evaluation not in (None, digest):
            raise ServiceFailure(f"{results}: it is not the evaluation that was noted; run this with --anew.")
        evaluation = decoded(content, results / "evaluation.json", EvaluationRead)
        if reason := not_asked(evaluation, state):
            # Such an evaluation, kept, would be judged again for ever: what was asked of it was not answered.
            state.evaluation = None
            save(self.folder, state)
            (results / "evaluation.json").unlink()
            raise ServiceFailure(f"{reason} Run this again once all are well: it evaluates anew.")
        recommendation = read_json(compared / "recommendation.json", RecommendationRead)
        verdict = judge(evaluation, recommendation, state)
        state.evaluation = digest
        save(self.folder, state)
        return verdict

    def finish(self, verdict: Verdict, share: float, plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Start the canary, or note why not; gives the rollout.

        Raises:
            NotPublished: another release is stable or being tried by now.
        """
        state = load(self.folder)
        state.reason = verdict.reason
        if not verdict.passes:
            state.outcome = "refused"
            save(self.folder, state)
            return None
        label = state.release or ""
        rollout = self.client.call("GET", f"/v1/rollouts/{state.plan.name}")
        if rollout["canary"] != label:  # It may have begun just before this was cut off.
            if publishing.stable_release(self.client, state.plan.name, for_canary=True)["id"] != state.stable:
                raise publishing.NotPublished(
                    f"{rollout['stable']} is stable by now, and {label} was evaluated beside {state.stable}. Run this "
                    "again: it is then evaluated anew."
                )
            why = f"evaluation {state.evaluation} (SHA-256 of evaluation.json): {verdict.reason}"
            rollout = publishing.start_canary(self.client, label, share, why=why, plan=plan)
        state.outcome = "canary"
        save(self.folder, state)
        return rollout


def not_asked(evaluation: EvaluationRead, state: State) -> str | None:
    """Why it says nothing of the two releases, whatever its figures are; None if it does."""
    labels = {CANDIDATE: state.release, STABLE: state.stable}
    for arm in evaluation.arms:
        label = labels.get(arm.name)
        away = {code: count for code, count in arm.failures.items() if code in OUTAGES}
        if sum(away.values()) > MOST_OUTAGES * evaluation.rows:
            kinds = ", ".join(f"{count} {code}" for code, count in sorted(away.items()))
            return f"The service did not answer {sum(away.values())} of {evaluation.rows} rows for {label} ({kinds})."
        others = [each for each in arm.releases if each != label]
        if others:
            return f"{', '.join(others)} answered in place of {label}."
    return None


def judge(evaluation: EvaluationRead, recommendation: RecommendationRead, state: State) -> Verdict:
    """Whether the candidate may be tried: it is not worse by the margin.

    Raises:
        ServiceFailure: the candidate is not in the results.
    """
    tested = next((each for each in recommendation.tested if each.arm == CANDIDATE), None)
    if tested is None:
        raise ServiceFailure("The evaluation says nothing of the candidate; run this with --anew.")
    drop = f"its score is {-100 * tested.drop.value:+.1f} points beside {state.stable} on {evaluation.rows} rows"
    least, margin = f"{-100 * tested.drop.upper:+.1f}", f"{100 * state.plan.margin:g}"
    if tested.outcome == "passes":
        reason = f"{drop}, with 95 % certainty above {least}; {margin} points less are allowed."
        return Verdict(True, reason, evaluation, tested)
    why = {
        "too few rows": f"too few rows to tell: need about {tested.rows_needed} more labels",
        "worse": "it seems worse than allowed, and more labels will not help it",
        "a slice is worse": "it is worse on a part of the rows",
    }.get(tested.outcome, tested.outcome)
    reason = f"{drop}, with 95 % certainty above {least}, where {margin} points less are allowed: {why}."
    return Verdict(False, reason, evaluation, tested)


def default_recipe(stable: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset of what was asked by the public name, for what its release is to do."""
    task = stable["content"]["task"]
    shape: dict[str, Any] = {"task": task["kind"]}
    if task["kind"] == "classify":
        shape["classes"] = task["labels"]
    if task["kind"] == "extract":
        shape["schema"] = task["schema"]
    return {**shape, "query": {"model": stable["name"]}}


def reasons_to_start(
    client: Client, stable: str, dataset: str, *, if_drifted: bool, min_new_labels: int | None
) -> list[str]:
    """Which of the conditions hold: a drift alarm of the stable release, or so many labels since the dataset's version.

    Raises:
        ServiceFailure: the service cannot tell.
    """
    found = []
    if if_drifted:
        report = client.call("GET", "/v1/drift", params={"release": stable, "windows": 1})["data"]
        kinds = sorted({alarm["kind"] for each in report for alarm in each["alarms"]})
        if kinds:
            found.append(f"{stable} has a drift alarm: {', '.join(kinds)}")
    if min_new_labels is not None:
        since = _newest_version_at(client, dataset)
        count = _labels_since(client, since, enough=min_new_labels)
        if count >= min_new_labels:
            found.append(f"{min_new_labels} labels or more " + (f"since {since}" if since else "and no dataset yet"))
    return found


def _newest_version_at(client: Client, dataset: str) -> str | None:
    try:
        return str(client.call("GET", f"/v1/datasets/{dataset}/versions/latest")["created_at"])
    except ServiceFailure as error:
        if error.status == 404:
            return None
        raise


def _labels_since(client: Client, since: str | None, *, enough: int) -> int:
    count, before = 0, None
    while count < enough:
        given = {"since": since, "before": before, "limit": 200}
        page = client.call("GET", "/v1/labels", params={name: each for name, each in given.items() if each is not None})
        count += len(page["data"])
        if (before := page["next"]) is None:
            break
    return count


def _made_alike(earlier: State, state: State) -> bool:
    """Whether an earlier run went to its end with all that this one has."""
    return earlier.outcome in ("canary", "refused", "promoted") and earlier.plan == state.plan
