"""Read the state of a trial from its folder: progress, result, and the parameters it used.

The folder is the only record of a trial. A sweep that is started again reads here which trials are
done.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.run.config import RunConfig, flatten
from deta.platform.run.fence import Fence
from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run import FAILURES, OUTCOME_FILE, AttemptOutcome
from deta.platform.run.run_file import FREE_TO_CHANGE
from deta.platform.study.design import Trial
from deta.platform.study.trial_record import Status, TrialCost, TrialRecord
from deta.platform.tracking.upload_plan import read_record

STOPPED_BY, VERIFIED = "deta.stopped_by", "deta.verified"  # tags of the trial's MLflow run
SPEEDS = 50  # the number of recent speeds to keep


class MismatchError(RuntimeError):
    """A trial was trained with parameters other than its own."""


def last_failure(folder: Path) -> str:
    """Return the last error of a run's workers, preferring a root cause over a lost connection."""
    found = []
    for path in sorted((folder / FAILURES).glob("rank-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(f"{content['type']}: {content['message']}")
        except (OSError, ValueError, KeyError):
            continue
    # A worker that loses a peer reports a connection error.
    own = [text for text in found if "onnection" not in text and "peer" not in text]
    return (own or found or [""])[0]


@dataclass
class TrialFolder:
    """The state of one trial; `poll` brings it up to date."""

    trial: Trial
    name: str
    config: RunConfig
    folder: Path
    step: int = 0
    num_steps: int = 0
    samples: int = 0
    curve: dict[int, float] = field(default_factory=dict)  # samples seen to AP
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    speeds: list[float] = field(default_factory=list)  # images/s
    remaining_s: float | None = None
    ended: Literal["", "FINISHED", "FAILED", "KILLED"] = ""
    reason: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    has_end: bool = False  # the training reached its last step
    stop_requested: bool = False  # by the stop file
    is_active: bool = False  # begun and not ended
    wall_s: float = 0.0  # in earlier starts
    _began_s: float | None = None
    _last_s: float = 0.0
    _offset_bytes: int = 0

    def poll(self) -> None:
        """Read new events."""
        for event, offset_bytes in read_events(self.folder, self._offset_bytes):
            self._offset_bytes = offset_bytes
            self._apply(event)

    @property
    def is_done(self) -> bool:
        """Return whether nothing is left to do. A killed trial will continue."""
        return self.ended in ("FINISHED", "FAILED")

    @property
    def status(self) -> Status:
        if self.ended == "FAILED":
            return "failed"
        if self.ended == "FINISHED":
            if STOPPED_BY in self.tags:
                return "stopped"
            return "finished" if "AP" in self.metrics else "failed"
        return "running" if self.is_active else "waiting"

    @property
    def ap(self) -> float | None:
        return self.metrics.get("AP")

    @property
    def images_per_s(self) -> float | None:
        # The first speed includes the start-up.
        speeds = self.speeds[1:] or self.speeds
        return statistics.median(speeds) if speeds else None

    @property
    def total_s(self) -> float:
        """Return the seconds from start to last event, summed over all starts."""
        running_s = self._last_s - self._began_s if self._began_s is not None else 0.0
        return self.wall_s + running_s

    def record(self, run_url: str = "") -> TrialRecord:
        cluster = self.config.cluster
        wall_s = self.total_s or None
        held = None if wall_s is None else wall_s / 3600 * cluster.num_workers
        return TrialRecord(
            name=self.name,
            cell=self.trial.cell.key,
            seed=self.trial.seed,
            status=self.status,
            reason=self.reason,
            metrics=dict(self.metrics),
            curve=tuple(sorted(self.curve.items())),
            parameters=dict(self.trial.changes),
            cost=TrialCost(
                wall_s=wall_s,
                gpu_hours=held if cluster.gpu else held and 0.0,
                cpu_hours=held and held * cluster.cpus_per_worker,
                images_per_s=self.images_per_s,
            ),
            run_id=read_record(self.folder).run_id,
            run_url=run_url,
        )

    def write_end(self, *, failed: str = "", stopped_by: str = "", killed: str = "") -> None:
        """Record how the trial ended, once its workers are gone or fenced off.

        Args:
            failed: the reason, if the trial did not finish.
            stopped_by: who stopped it and why: "asha: …".
        """
        self.poll()
        if self.ended or not self.folder.is_dir():
            return
        # Workers that are being ended now, here or on another node, cannot write any more.
        Fence.acquire(self.folder, "the sweep, which ended this trial")
        self.poll()
        status, reason = "KILLED", killed or "the sweep was stopped"
        if self.has_end:
            status, reason = "FINISHED", self.reason
        elif stopped_by:
            status, (who, _, reason) = "FINISHED", stopped_by.partition(": ")
            self._write("tags", tags={STOPPED_BY: who})
        elif failed:
            status, reason = "FAILED", failed
        self._write("ended", status=status, reason=reason)

    def _write(self, kind: str, **values: object) -> None:
        journal = Journal(self.folder)
        journal.write(kind, **values)
        journal.close()
        self.poll()

    def verify(self) -> bool:
        """Compare the parameters that the workers used with those of the trial.

        A checkpoint holds the configuration from which the worker built model, loader and
        optimizer; its state shows how many samples a step takes.

        Returns:
            False if there is nothing to compare yet.

        Raises:
            MismatchError: names keys and both values.
        """
        newest = newest_checkpoint(self.folder / "checkpoints")
        if newest is None:
            return False
        used, given = flatten(newest.config), flatten(self.config)
        different = [
            f"{key} is {used.get(key)!r}, not {given.get(key)!r}"
            for key in dict.fromkeys([*given, *used])
            if used.get(key) != given.get(key)
            # These may change between starts, unless the sweep varies them.
            and (key in self.trial.changes or not key.startswith(FREE_TO_CHANGE))
        ]
        state = newest.state
        if state.samples_seen != state.step * self.config.total_batch_size:
            different.append(
                f"{state.samples_seen} samples were seen in {state.step} steps, not "
                f"{self.config.total_batch_size} in each"
            )
        if different:
            raise MismatchError(
                f"{self.name} ({self.folder}) was trained with parameters other than its own: "
                + "; ".join(different)
            )
        if VERIFIED not in self.tags:
            self._write("tags", tags={VERIFIED: "true"})
        return True

    def lasting_failure(self) -> str:
        """Return the error that every retry of the trial would meet; empty if none."""
        path = self.folder / OUTCOME_FILE
        if not path.exists():
            return ""
        outcome = AttemptOutcome(**json.loads(path.read_text(encoding="utf-8")))
        return outcome.message if outcome.kind == "refused" else ""

    def _apply(self, event: dict[str, Any]) -> None:
        kind, time_s = event["kind"], event["time_s"]
        if kind == "starting":
            self._close_start()
            self._began_s = time_s
            self.is_active, self.ended, self.reason = True, "", ""
            self.has_end = self.stop_requested = False
            self.tags.pop(STOPPED_BY, None)
            self.remaining_s = None
        elif kind == "begin":
            self.step, self.num_steps = event["step"], event["num_steps"]
            self.samples = self.step * self.config.total_batch_size
        elif kind == "progress":
            values = event["metrics"]
            self.step, self.samples = event["step"], values["train/samples_seen"]
            self.speeds = [*self.speeds[-SPEEDS:], values["train/images_per_s"]]
            self.remaining_s = event["remaining_s"]
        elif kind == "evaluation":
            values = event["metrics"]
            # A trial that is stopped at its last evaluation has finished all the same.
            self.has_end = bool(self.num_steps) and event["step"] >= self.num_steps
            own = {n.removeprefix("val/"): v for n, v in values.items() if n.startswith("val/")}
            others = ("epoch", "samples_seen", "seconds")
            self.metrics = {name: value for name, value in own.items() if name not in others}
            if "val/AP" in values:
                self.curve[values["val/samples_seen"]] = values["val/AP"]
        elif kind == "tags":
            self.tags |= event["tags"]
        elif kind == "stopping":
            self.stop_requested = True
        elif kind == "end":
            self.has_end, self.reason = True, event.get("reason", "")
        elif kind == "ended":
            self.ended, self.is_active = event["status"], False
            self.reason = event.get("reason", "")
            self._close_start()
        if kind in ("starting", "begin", "progress", "evaluation", "checkpoint", "end"):
            self._last_s = time_s

    def _close_start(self) -> None:
        if self._began_s is not None:
            self.wall_s += max(0.0, self._last_s - self._began_s)
        self._began_s = None
