"""The folder a run works in: which run it is, and which of its checkpoints are whole.

The main rule: a run goes on only from a checkpoint that was finished, and only with the very inputs it began with.
"""

import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from finetune.dataset import canonical
from finetune.errors import BadOutput

WHOLE = "whole"
"""A file in a checkpoint's folder, written when all others are, and removed before any of them is."""
STATE = "trainer_state.json"
"""What the library keeps its place in."""
KEPT = 2
"""Checkpoints at a time, besides the best one."""


class Work:
    """The work folder of one run; as a context it is held against other runs."""

    def __init__(self, folder: Path, inputs: dict[str, Any]) -> None:
        self.folder = folder
        self._inputs = json.loads(canonical(inputs))
        self._lock: IO[str] | None = None
        self.run = str(uuid.uuid4())
        self.started_at = time.time()
        self.checkpoint: str | None = None
        self.resumed_from_step: int | None = None

    def finished_manifest(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The manifest in the output folder, if it is of these very inputs; empty where there is none.

        Raises:
            BadOutput: the folder holds the adapter of another run.
        """
        differs = [name for name in self._inputs if manifest and manifest.get(name) != self._inputs[name]]
        if differs:
            raise BadOutput(
                f"output: {self.folder.parent} holds a finished adapter of another run (its {' and '.join(differs)} "
                "differ); choose another folder, or remove that one"
            )
        return manifest

    def __enter__(self) -> "Work":
        """Take the folder, and find the checkpoint to go on from.

        Raises:
            BadOutput: another run works here, or the checkpoints are of other inputs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if _first_process():
            self._lock = (self.folder / "lock").open("w", encoding="utf-8")
        try:
            self._hold()
            self._identify()
            self._find_checkpoint()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the folder."""
        if self._lock:
            self._lock.close()

    def ended(self, patience: int) -> tuple[Any, Path] | None:
        """The trainer's state and the checkpoint to keep, where all steps were done and only the adapter is missing.

        The library would train a step more, or lose the best checkpoint of a folder that was moved.
        """
        if self.checkpoint is None:
            return None
        from transformers import TrainerState

        state = TrainerState.load_from_json(str(Path(self.checkpoint) / STATE))
        if state.global_step < state.max_steps and not _no_better(state.log_history, patience):
            return None
        best = state.best_global_step if patience else None
        return state, self._checkpoint(best) if best else Path(self.checkpoint)

    def clear(self) -> None:
        """Remove the checkpoints of a finished run; what TensorBoard reads stays."""
        for path in self.folder.iterdir():
            if path.name == "runs":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _hold(self) -> None:
        if self._lock:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadOutput(f"output: another run is at work in {self.folder}; choose another folder") from error

    def _identify(self) -> None:
        file = self.folder / "run.json"
        if file.is_file():
            begun = json.loads(file.read_text(encoding="utf-8"))
            differs = [name for name in self._inputs if begun["inputs"].get(name) != self._inputs[name]]
            if differs:
                raise BadOutput(
                    f"output: {self.folder} has checkpoints of a run with another {' and '.join(differs)}; put that "
                    "back as it was to go on, or remove the folder to begin anew"
                )
            self.run, self.started_at = begun["run"], begun["started_at"]
        elif _first_process():
            begun = {"run": self.run, "started_at": self.started_at, "inputs": self._inputs}
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(begun), encoding="utf-8")
            partial.replace(file)

    def _find_checkpoint(self) -> None:
        found = {}
        for path in self.folder.glob("checkpoint-*"):
            step = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if step and (path / WHOLE).is_file() and (path / STATE).is_file():
                found[int(step[1])] = path
            elif _first_process():
                shutil.rmtree(path)  # What a killed run was writing, or removing.
        if found:
            self.resumed_from_step = max(found)
            self.checkpoint = str(found[self.resumed_from_step])

    def mark_whole(self, step: int, best_step: int | None) -> None:
        """Mark the checkpoint of a step, which has all its files by now, and remove older ones but the best."""
        with (self._checkpoint(step) / WHOLE).open("w") as file:
            os.fsync(file.fileno())
        steps = sorted(int(path.name.partition("-")[2]) for path in self.folder.glob("checkpoint-*"))
        for older in steps[:-KEPT]:
            if older != best_step:
                (self._checkpoint(older) / WHOLE).unlink(missing_ok=True)
                shutil.rmtree(self._checkpoint(older))

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


def callbacks(work: Work, patience: int, watch: Callable[[dict[str, float]], None]) -> list[Any]:
    """What the trainer calls back: checkpoints are marked whole, progress is told, and no better score ends the run."""
    from transformers import TrainerCallback

    class MarkWhole(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the library's names.
            if state.is_world_process_zero:
                work.mark_whole(state.global_step, state.best_global_step)

    class Tell(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:  # noqa: ARG002
            if state.is_world_process_zero:
                known = {"loss": "loss", "eval_loss": "heldout_loss"}
                losses = {ours: float(told["logs"][theirs]) for theirs, ours in known.items() if theirs in told["logs"]}
                watch({"step": state.global_step, "last_step": state.max_steps, **losses})

    class StopEarly(TrainerCallback):
        """It counts in the log that every checkpoint holds, so a run that went on stops where it would have."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if _no_better(state.log_history, patience):
                control.should_training_stop = True

    return [MarkWhole(), Tell(), StopEarly()]


def _no_better(log: list[dict[str, Any]], patience: int) -> bool:
    """Whether so many scores have come without a better one; never, if the patience is 0."""
    scores = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return bool(patience and scores) and len(scores) - 1 - scores.index(min(scores)) >= patience


def _first_process() -> bool:
    """Whether this is the only process of the run, or the one that writes; as `accelerate launch` says it."""
    return os.environ.get("RANK", "0") == "0"  # noqa: TID251 - set by the launcher, not by a person.
