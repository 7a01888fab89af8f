"""Prints a run for its user, and logs in its journal what the supervisor does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress

from deta.ops.ms_deform_attn import path as operator_path
from deta.platform.evaluation.evaluation_folder import best_evaluation, read_evaluation
from deta.platform.evaluation.paired_bootstrap import ap_interval
from deta.platform.launch.attempt_monitor import resume_point
from deta.platform.learning.numerics import describe_numerics
from deta.platform.pages.number_format import duration
from deta.platform.run.config import RunConfig
from deta.platform.run.journal import Journal
from deta.platform.run.run import Run, RunResult
from deta.platform.system.short_list import short_list
from deta.platform.tracking.upload_process import UploadState

MUCH_WAITING = 0.1  # share of the time


class Console:
    """Prints lines about one run; on a terminal, progress is a bar below them."""

    def __init__(self, run: Run, echo: Callable[[str], None], *, is_live: bool = False) -> None:
        """
        Args:
            is_live: show progress as a bar on stdout, a terminal. Otherwise each report is a line.
        """
        self.run, self.echo, self.is_live = run, echo, is_live
        self._bar: Progress | None = None
        self._ap = ""
        self._has_advised = False
        self._num_windows = 0
        self._num_loader_workers: int | None = None  # of a training worker, once it has begun

    def close(self) -> None:
        """Leave the bar as it is, and print below it from now on."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def print_start(self) -> None:
        """Print data sets, schedule, batch and folder of the run."""
        run, config = self.run, self.run.config
        for split, dataset in (("training", run.train_set), ("validation", run.val_set)):
            self.echo(
                f"{split}: {len(dataset)} images, {len(dataset.categories)} classes, "
                f"data {dataset.fingerprint[:12]}"
            )
            for note in dataset.notes:
                self.echo(f"  {note}")
        for note in run.notes:
            self.echo(note)
        self.echo(
            f"{config.name}: {run.num_steps} steps, {config.schedule.epochs} epochs, on "
            f"{'GPUs' if config.cluster.gpu else 'CPUs'}"
        )
        self.echo(batch_line(config))
        numerics = describe_numerics(
            config.precision, deterministic=config.deterministic, on_gpu=config.cluster.gpu
        )
        self.echo(f"precision: {numerics}")
        if not config.cluster.gpu:
            self.echo(f"deformable attention: {operator_path('cpu')} kernel")
        self.echo(f"folder: {run.folder}")

    def print_event(self, event: dict[str, Any]) -> None:
        """Print an event of the journal, if it concerns the user."""
        kind = event["kind"]
        if kind == "begin":
            workers = f"{event['world_size']} worker{'s' * (event['world_size'] > 1)}"
            if event["step"]:
                wasted = event.get("wasted_steps")
                self.echo(
                    f"continuing from step {event['step']} of {event['num_steps']} with {workers}"
                    + (f"; {wasted} steps are repeated" if wasted else "")
                )
            else:
                self.echo(f"training has started with {workers}")
            self._print_loader_workers(event)
        elif kind == "progress":
            self._print_progress(event)
        elif kind == "evaluation":
            self.echo(f"validation after step {event['step']}, in percent:")
            self.echo("  " + event["table"].replace("\n", "\n  "))
            self._ap = f"AP {event['metrics'].get('val/AP', math.nan):.1f}  "
            self._echo_explanation(event["metrics"])
        elif kind == "skipped":
            self.echo(
                f"step {event['step']}: skipped, {', '.join(event['not_finite'])} not finite "
                f"({event['in_a_row']} in a row, {event['total']} in all; images "
                f"{short_list(event['images'], 5)})"
            )
        elif kind == "replaced":
            for image in event["images"][:5]:
                self.echo(f"broken image, replaced by image {image['by_image_id']}: "
                          f"{image['reason']}")  # fmt: skip
        elif kind in ("checkpoint_failed", "damaged", "explanation_failed"):
            self.echo(f"! {event['message']}")
        elif kind == "drift":
            self.echo(f"! step {event['step']}: {event['parameter']} differs among the workers")
        elif kind == "end" and event.get("reason"):
            self.echo(event["reason"])

    def _print_progress(self, event: dict[str, Any]) -> None:
        metrics = event["metrics"]
        waited = metrics.get("train/data_wait_share", 0.0)
        self._num_windows += 1  # the loader starts in the first one
        if waited > MUCH_WAITING and self._num_windows > 1 and not self._has_advised:
            self._has_advised = True
            self.echo(self._advice(waited, metrics["train/images_per_s"]))
        loss = metrics.get("train/loss", math.nan)
        speed = f"{metrics['train/images_per_s']:7.1f} images/s"
        left = f"{duration(event['remaining_s'])} left"
        if not self.is_live:
            self.echo(
                f"step {event['step']:>6}/{event['num_steps']}  "
                f"epoch {metrics['train/epoch']:6.2f}  loss {loss:8.3f}  "
                f"lr {metrics['train/lr']:.1e}  {speed}  {left}"
            )
            return
        if self._bar is None:
            self._bar = Progress(MofNCompleteColumn(), BarColumn(10), "{task.description}")
            self._bar.add_task("")
        self._bar.update(
            self._bar.task_ids[0],
            description=f"loss {loss:.3f}  {self._ap}{speed.strip()}  {left}",
            completed=event["step"],
            total=event["num_steps"],
        )
        self._bar.start()  # from now on, what is printed appears above it

    def _print_loader_workers(self, event: dict[str, Any]) -> None:
        self._num_loader_workers = event.get("loader_workers")
        if self._num_loader_workers is None or self.run.config.data.loader_workers != "auto":
            return
        num_cpus = event.get("cpus")
        cpus = f"; it has {num_cpus:g} CPU{'s' * (num_cpus != 1)}" if num_cpus else ""
        self.echo(
            f"data.loader_workers: {self._num_loader_workers} for each training worker (auto{cpus})"
        )

    def _advice(self, waited: float, images_per_s: float) -> str:
        """Return what to do about a share of the time spent waiting for data."""
        now = self._num_loader_workers
        text = f"training waited for data {100 * waited:.0f} % of the time"
        if now is not None:
            needed_per_s = images_per_s / max(1 - waited, 0.05)
            # As fast as now each; a training worker that loads itself is one of them.
            needed = max(now + 1, math.ceil(max(now, waited) * needed_per_s / images_per_s))
            text += (
                f": it got {images_per_s:.1f} images/s and could take {needed_per_s:.1f}. Set "
                f"data.loader_workers={needed} (now {now}) if there are idle cores"
            )
        else:
            text += ": raise data.loader_workers if there are idle cores"
        return text + ", or pack the data (jobs/pack.py) if the storage is slow"

    def _echo_explanation(self, metrics: dict[str, float]) -> None:
        begins = "val/error_"
        costs = {n[len(begins) :]: v for n, v in metrics.items() if n.startswith(begins)}
        if "val/explain_seconds" not in metrics or not costs:
            return
        largest = sorted(costs, key=lambda kind: -costs[kind])
        listed = ", ".join(f"{kind} {costs[kind]:.1f}" for kind in largest)
        self.echo(f"  points of AP50 lost to errors: {listed}")
        self.echo(
            f"  analysed in {metrics['val/explain_seconds']:.1f} s, "
            f"{100 * metrics['val/explain_share']:.1f} % of the evaluation"
        )

    def log_restart(self, reason: str, backoff_s: float = 0.0) -> None:
        """Log that workers or an attempt are replaced."""
        first_line = reason.strip().partition("\n")[0]
        self.echo(
            f"{first_line}; continuing from {resume_point(self.run)}"
            + (f" in {backoff_s:.0f} s" if backoff_s else "")
        )
        self._write("restart", reason=reason, backoff_s=backoff_s)

    def log_end(self, status: str, reason: str, goodput: float) -> None:
        """Log how the run ended."""
        self._write("ended", status=status, reason=reason, goodput=goodput)

    def log_interval(self) -> None:
        """Log the confidence interval of the best AP. No worker waits for it here."""
        folder = best_evaluation(self.run.folder)
        if folder is None:
            return
        try:
            read = read_evaluation(folder)
            found = ap_interval(read.ground_truth, read.results)
        except Exception as error:  # the training is done even without the interval
            self.echo(f"the interval of the best AP could not be computed: {error}")
            return
        if math.isnan(found.ap):
            return
        self.echo(f"best AP {100 * read.metrics.AP:.1f}, {found.text()}")
        if math.isnan(found.low):
            return
        values = {"low": found.low, "high": found.high, "corrected": found.corrected}
        points = {name: 100 * value for name, value in values.items()}
        self._write("interval", step=read.origin.step or 0, **points)

    def print_upload(self, uploaded: UploadState) -> None:
        """Print what MLflow does not have, and how to send it."""
        if not uploaded.is_complete:
            self.echo(
                f"MLflow at {uploaded.uri} does not have everything yet ({uploaded.left_rows} rows "
                f"are left{': ' + uploaded.error if uploaded.error else ''}). Nothing is lost; "
                f"send the rest with: python jobs/sync.py {self.run.folder}"
            )

    def _write(self, kind: str, **values: object) -> None:
        journal = Journal(self.run.folder)
        journal.write(kind, **values)
        journal.close()

    def print_result(self, result: RunResult) -> None:
        """Print metrics, paths and goodput of a run that has ended."""
        self.echo("")
        self.echo(f"AP {result.metrics.get('AP', math.nan):.1f} (last evaluation)")
        if result.best_checkpoint is not None:
            self.echo(f"best checkpoint: {result.best_checkpoint}")
        if reports := sorted(self.run.folder.glob("evaluations/*/report.html")):
            self.echo(f"error analysis:  {reports[-1]}")
        images = self.run.folder / "pictures"
        if images.is_dir():
            self.echo(f"images:          {sorted(images.iterdir())[-1]}")
        self.echo(
            f"goodput {100 * result.goodput:.0f} %: the share of the time spent in steps and "
            "evaluations; repeated ones count once"
        )
        if not result.mlflow_run_id:
            return
        if result.mlflow_uri.startswith("sqlite:"):
            self.echo(
                f"to browse it in MLflow: mlflow server --host 127.0.0.1 --port 5000 "
                f"--backend-store-uri {result.mlflow_uri}\n"
                f"  then open http://127.0.0.1:5000 (run {result.mlflow_run_id})"
            )
        else:
            self.echo(f"in MLflow: {result.mlflow_uri} (run {result.mlflow_run_id})")


def batch_line(config: RunConfig) -> str:
    """Return a line on how the total batch is distributed."""
    total, workers = config.total_batch_size, config.cluster.num_workers
    # The same split as in `TrainingOrder.micro_batch_positions`.
    num_parts = max(-(-total // config.micro_batch_size), workers)
    images = _span(total, num_parts)
    steps = _span(num_parts, workers)
    team = f"{workers} worker{'s' * (workers > 1)}"
    if total % num_parts or num_parts % workers:
        return (
            f"total batch {total} = {num_parts} micro-batches of {images} images, {steps} for each "
            f"of {team}"
        )
    accumulation = f" x {steps} accumulation steps" if num_parts > workers else ""
    return f"total batch {total} = {team} x {images} image{'s' * (images != '1')}{accumulation}"


def _span(whole: int, parts: int) -> str:
    """Return the size of each part if `whole` is split as evenly as possible."""
    least, most = whole // parts, -(-whole // parts)
    return str(most) if least == most else f"{least} or {most}"
