"""Analyses each evaluation of a training, and keeps the best and the newest in the run's folder.

    evaluations/step-00000840/   evaluation.json and its files (evaluation_folder.py)
                                 explanation.json, report.html

Only rank 0 does this. A failure here never ends a run: it is logged in the journal. Metrics are
computed at every evaluation. The report decodes and draws images, so it is written only for the
best evaluation, if it takes at most `REPORT_SHARE` of the time since the report before, and always
for the first and the last one.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from deta.platform.analysis.analysis import (
    EXPLANATION,
    Explanation,
    explain,
    scalars,
    write_explanation,
)
from deta.platform.analysis.images import image_opener
from deta.platform.analysis.report import write_evaluation_report
from deta.platform.checkpoint.format import read_manifest
from deta.platform.evaluation.coco_metrics import CocoMetrics
from deta.platform.evaluation.evaluate_model import EvaluationResult
from deta.platform.evaluation.evaluation_folder import (
    EVALUATIONS,
    REPORT,
    Origin,
    best_evaluation,
    read_evaluation,
    write_evaluation,
)
from deta.platform.run.config import flatten
from deta.platform.run.run import Run
from deta.platform.run.run_state import RunState

logger = logging.getLogger(__name__)

REPORT_SHARE = 0.03  # a report may take this share of the time since the previous one


class EvaluationHistory:
    """The evaluations of a run, analysed and saved in its folder; each worker makes one."""

    def __init__(self, run: Run, log_event: Callable[..., None]) -> None:
        """
        Args:
            log_event: appends an event to the journal, as `Recorder.log_event` does.
        """
        self.run = run
        self.log_event = log_event
        self.explanation: Explanation | None = None  # of the present evaluation
        self.report_written_s: float | None = None  # by time.monotonic
        self.report_took_s = 0.0

    def explain(self, evaluation: EvaluationResult, step: int, seconds: float) -> dict[str, float]:
        """Return further metrics for MLflow, and the share of time that computing them took.

        Args:
            seconds: duration of the evaluation.
        """
        self.explanation = None
        try:
            self.explanation = explain(self.run.val_set.ground_truth, evaluation.results)
            found = scalars(self.explanation)
        except Exception as error:  # a failed analysis must not end the run
            self._log_failure(step, "explained", error)
            return {}
        took_s = self.explanation.seconds
        share = took_s / (seconds + took_s)
        return found | {"val/explain_seconds": took_s, "val/explain_share": share}

    def save(self, evaluation: EvaluationResult, state: RunState, seconds: float) -> None:
        """Write the evaluation of a saved checkpoint; keep it and the best, remove the others."""
        step, began_s = state.step, time.monotonic()
        folder = self.run.folder / EVALUATIONS / f"step-{step:08d}"
        try:
            origin = self._origin(state, seconds)
            ground_truth = self.run.val_set.ground_truth
            write_evaluation(folder, ground_truth, evaluation.results, evaluation.metrics, origin)
            if self.explanation is not None:
                write_explanation(folder / EXPLANATION, self.explanation)
                if self._wants_report(state):
                    self._write_report(folder, self.explanation, evaluation.metrics, origin)
            best = best_evaluation(folder.parent.parent) or folder
            for other in folder.parent.glob("step-*"):
                if other not in (best, folder):
                    shutil.rmtree(other, ignore_errors=True)
            is_last = (folder / REPORT).exists() and self.run.is_done(state)
            if is_last and not (best / REPORT).exists():  # the budget did not allow it
                read = read_evaluation(best)
                explanation = explain(read.ground_truth, read.results)
                self._write_report(best, explanation, read.metrics, read.origin)
            self.log_event("evaluation_kept", step=step, seconds=time.monotonic() - began_s)
        except Exception as error:  # a full disk, an unreadable image, a bug
            self._log_failure(step, "saved", error)
        finally:
            self.explanation = None  # free its memory: it holds all boxes

    def _origin(self, state: RunState, seconds: float) -> Origin:
        config, path = self.run.config, self.run.checkpoints / f"step-{state.step:08d}"
        weights = ""
        if path.is_dir():  # missing if the save failed
            weights = read_manifest(path)["model.safetensors"].sha256
        return Origin(
            description=f"{config.name}, step {state.step}",
            data_fingerprint=self.run.val_set.fingerprint,
            annotations=config.data.val_annotations,
            image_folder=config.data.val_images,
            weights_sha256=weights,
            config=flatten(config),
            engine=config.evaluation.engine,
            epoch=state.epoch,
            step=state.step,
            seconds={
                "evaluation": seconds,
                "explanation": self.explanation.seconds if self.explanation else 0.0,
            },
        )

    def _wants_report(self, state: RunState) -> bool:
        is_last = self.run.is_done(state)
        is_best = state.metrics.get("AP") == state.best_ap
        if not (self.run.config.num_pictures > 0 and (is_best or is_last)):
            return False
        if self.report_written_s is None or is_last:
            return True
        since_s = time.monotonic() - self.report_written_s
        return self.report_took_s <= REPORT_SHARE * since_s

    def _write_report(
        self, folder: Path, explanation: Explanation, metrics: CocoMetrics, origin: Origin
    ) -> None:
        began_s = time.monotonic()
        ground_truth, images = self.run.val_set.ground_truth, image_opener(self.run.val_set)
        write_evaluation_report(folder / REPORT, explanation, metrics, origin, ground_truth, images)
        self.report_written_s = time.monotonic()
        self.report_took_s = self.report_written_s - began_s
        path = str((folder / REPORT).relative_to(self.run.folder))
        self.log_event("report", step=origin.step, seconds=self.report_took_s, path=path)

    def _log_failure(self, step: int, what: str, error: Exception) -> None:
        message = f"the evaluation could not be {what}: {error or type(error).__name__}"
        logger.warning("step %d: %s", step, message, exc_info=True)
        self.log_event("explanation_failed", step=step, message=message)
