"""A configuration to a run: checked first, then trained on the cluster, shown and tracked."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

# Ray reads these when it is imported. Whether its local clusters ask for a token depends, by
# default, on what ran in this home before; here they always do. A cluster that was started by
# others has its own rules.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from deta.model.architectures import make_criterion, make_detector, without_download
from deta.platform.checkpoint import best_checkpoint, newest_checkpoint
from deta.platform.coco import CocoDataset
from deta.platform.config import RunConfig, flatten, from_json, to_json
from deta.platform.console import Console
from deta.platform.download import fetch, is_url
from deta.platform.initial import check_initial_weights
from deta.platform.journal import FILE_NAME, read_events
from deta.platform.optim import freeze
from deta.platform.predict import find_checkpoint
from deta.platform.tracking import Status, Tracker, tracking_uri
from deta.platform.training import Run
from deta.platform.worker import train_worker

logger = logging.getLogger(__name__)

CONFIG_FILE = "run.json"
# Where a run goes on although these differ from when it began: they do not change what is learnt.
FREE_TO_CHANGE = (
    "name", "storage", "experiment", "cluster.", "data.loader_workers", "log_every_steps",
    "num_pictures", "data.train_images", "data.train_annotations", "data.val_images",
    "data.val_annotations", "micro_batch_size",
    "schedule.patience", "schedule.min_delta",
)  # fmt: skip


class RunExistsError(ValueError):
    """The name is taken, or cannot be resumed like this."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    metrics: dict[str, float]  # of the last evaluation, in 0..100
    best_checkpoint: Path | None
    mlflow_uri: str
    mlflow_run_id: str


def prepare(config: RunConfig) -> Run:
    """Check everything that can be checked without a cluster: data, classes, sizes.

    Raises:
        ValueError: names the file and record, or the configuration key.
    """
    make_criterion(config.criterion, config.model)  # refuses what does not fit the model
    data = config.data
    for key in ("train_images", "train_annotations", "val_images", "val_annotations"):
        if not getattr(data, key):
            raise ValueError(
                f"data.{key} is not set; give --train-images, --train-annotations, --val-images "
                "and --val-annotations"
            )
    data = replace(
        data,
        train_images=_absolute(data.train_images),
        train_annotations=_absolute(data.train_annotations),
        val_images=_absolute(data.val_images),
        val_annotations=_absolute(data.val_annotations),
    )
    train_set = CocoDataset.open(
        Path(data.train_images),
        Path(data.train_annotations),
        lenient=data.lenient,
        max_pixels=data.max_pixels,
        progress=True,
    )
    val_set = CocoDataset.open(
        Path(data.val_images),
        Path(data.val_annotations),
        lenient=data.lenient,
        max_pixels=data.max_pixels,
        progress=True,
    )
    if train_set.categories != val_set.categories:
        raise ValueError(
            f"{data.train_annotations} and {data.val_annotations} have different categories: "
            f"{_difference(train_set, val_set)}; both files must list the same ids and names"
        )
    if data.train_first is not None:
        train_set = train_set.first(min(data.train_first, len(train_set)))
    if data.val_first is not None:
        val_set = val_set.first(min(data.val_first, len(val_set)))
    if config.optim.freeze:
        with torch.device("meta"):
            freeze(make_detector(without_download(config.model)), config.optim.freeze)
    storage = Path(_absolute(config.storage))
    config = replace(
        config,
        data=data,
        storage=str(storage),
        init_checkpoint=_local("init_checkpoint", config.init_checkpoint, storage),
        init_backbone=_local("init_backbone", config.init_backbone, storage),
        model=replace(config.model, num_classes=len(train_set.categories)),
    )
    notes = check_initial_weights(config, train_set.categories)
    return Run(
        config, storage / config.name, train_set, val_set, _code_commit(), notes=tuple(notes)
    )


def launch(
    config: RunConfig, *, resume: bool = False, echo: Callable[[str], None] = print
) -> Result:
    """Train on the Ray cluster named by RAY_ADDRESS, or on one started here.

    Args:
        resume: go on with the run of this name; otherwise the name must be new.
        echo: where lines for people go.

    Raises:
        ValueError: the input or the name; before the cluster is touched.
        RuntimeError: the run failed on the cluster; says why.
    """
    return launch_prepared(prepare(config), resume=resume, echo=echo)


def launch_prepared(
    run: Run,
    *,
    resume: bool = False,
    echo: Callable[[str], None] = print,
    first_look: Callable[[Run], None] | None = None,
) -> Result:
    """`launch` for a run from `prepare`.

    Args:
        first_look: called in between, when a new run has its folder and nothing is taken of the
            cluster; may write pictures and journal. If it fails, the folder is taken back.
    """
    console = Console(run, echo)
    console.introduce()
    claim_folder(run, resume=resume)
    # From here on the run has a folder; what it was started with stays in it.
    if first_look is not None and not resume:
        try:
            first_look(run)
        except BaseException:  # also where somebody stops it: the name is free again
            shutil.rmtree(run.folder)
            raise
    if resume and (ended := _how_it_ended(run)):
        raise RunExistsError(
            f"{run.folder}: is finished ({ended}); choose another name, or more "
            "schedule.epochs for a new run with init_checkpoint"
        )
    (run.folder / CONFIG_FILE).write_text(
        json.dumps(
            {
                "config": json.loads(to_json(run.config)),
                "train_fingerprint": run.train_set.fingerprint,
                "val_fingerprint": run.val_set.fingerprint,
            },
            indent=2,
        ),
        encoding="utf-8",
    )
    tracker = Tracker(run, tracking_uri(run.folder.parent))
    follower = _Follower(run, tracker, console)
    status: Status = "FAILED"
    reason = ""
    try:
        connect(echo)
        follower.start()
        _fit(run, echo)
        status, reason = "FINISHED", _reason_to_stop(run)
    except (KeyboardInterrupt, SystemExit):
        status, reason = "KILLED", "stopped from outside"
        raise
    except BaseException as error:
        reason = str(error)
        raise
    finally:
        follower.stop()
        try:
            tracker.finish(status, reason)
        except Exception as error:
            echo(f"MLflow at {tracker.uri} did not take the end of the run: {error}")
    metrics = _last_metrics(run)
    result = Result(
        run.folder, metrics, best_checkpoint(run.checkpoints), tracker.uri, tracker.run_id
    )
    console.conclude(result)
    return result


def claim_folder(run: Run, *, resume: bool) -> None:
    """Make the run's folder; or make sure that it is there and belongs to the same run.

    Raises:
        RunExistsError: says what differs, and what to do.
    """
    folder = run.folder
    if not resume:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise RunExistsError(
                f"{folder}: a run of this name is there already; add --resume to go on with it, or "
                "choose another name with name=…"
            ) from None
        return
    if not (folder / CONFIG_FILE).exists():
        raise RunExistsError(f"{folder}: there is no run to resume; leave --resume out")
    before = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    old = flatten(from_json(RunConfig, json.dumps(before["config"])))
    new = flatten(run.config)
    changes = [
        f"{key}: {old[key]} -> {new[key]}"
        for key in new
        if new[key] != old[key] and not key.startswith(FREE_TO_CHANGE)
    ]
    for split, dataset in (("train", run.train_set), ("val", run.val_set)):
        if before[f"{split}_fingerprint"] != dataset.fingerprint:
            changes.append(f"the {split} data set has other images, boxes or classes")
    if changes:
        raise RunExistsError(
            f"{folder}: the run began otherwise, so it cannot go on as the same run:\n  "
            + "\n  ".join(changes)
            + "\nUndo these changes, or start a new run with init_checkpoint set to its last one."
        )


def connect(echo: Callable[[str], None] = print) -> None:
    """Join the cluster, or start one on this machine that ends with this process."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is None and os.environ["RAY_AUTH_MODE"] == "token":
        _private_token()
    # Workers write to the journal; what they print besides is in Ray's logs.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own there, which aborts
    resources = ray.cluster_resources()
    echo(
        f"Ray cluster {'at ' + address if address else 'on this machine'}: "
        f"{len(ray.nodes())} node(s), {resources.get('CPU', 0):.0f} CPUs, "
        f"{resources.get('GPU', 0):.0f} GPUs"
    )


def _private_token() -> None:
    """Ray writes its token readable for everybody; make it first, readable for its owner."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(os.urandom(32).hex())


def check_resources(config: RunConfig) -> None:
    """Refuse what the cluster can never give, instead of waiting for it for ever."""
    available = ray.cluster_resources()
    cluster = config.cluster
    wanted = {"CPU": cluster.num_workers * cluster.cpus_per_worker}
    if cluster.gpu:
        wanted["GPU"] = cluster.num_workers
    lacking = [
        f"{number:g} {kind}s (it has {available.get(kind, 0):g})"
        for kind, number in wanted.items()
        if number > available.get(kind, 0)
    ]
    if lacking:
        raise RuntimeError(
            f"the run wants {cluster.num_workers} workers and so {' and '.join(lacking)} of the "
            "cluster. Lower cluster.num_workers or cluster.cpus_per_worker (the total batch stays: "
            "workers accumulate), or set cluster.gpu=false to train on CPUs."
        )


def _fit(run: Run, echo: Callable[[str], None]) -> None:
    """Train to the end, starting the workers again where one was lost."""
    config = run.config
    check_resources(config)
    resources = {"CPU": config.cluster.cpus_per_worker}
    if config.cluster.gpu:
        resources["GPU"] = 1
    settings = {
        "config": to_json(config),
        "folder": str(run.folder),
        "code_commit": run.code_commit,
        "data": ray.put({"train_set": run.train_set, "val_set": run.val_set}),
    }
    for attempt in range(config.cluster.max_failures + 1):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="nccl" if config.cluster.gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.cluster.num_workers,
                use_gpu=config.cluster.gpu,
                resources_per_worker=resources,
            ),
            # A name of its own for each attempt: Ray would take an equal one for a resumption
            # from its own records. The run's records are its checkpoints.
            run_config=ray.train.RunConfig(
                name=f"{config.name}-{time.time_ns()}", storage_path=str(run.folder / "ray")
            ),
        )
        try:
            trainer.fit()
            return
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            cause = _own_error(error)
            if cause is not None:
                raise RuntimeError(str(cause)) from error
            if attempt == config.cluster.max_failures:
                raise RuntimeError(
                    f"the workers were lost {attempt + 1} times, cluster.max_failures is "
                    f"{config.cluster.max_failures}; the last time: {error}"
                ) from error
            newest = newest_checkpoint(run.checkpoints)
            echo(
                f"a worker was lost ({type(error).__name__}); going on from "
                f"{newest.path.name if newest else 'the beginning'}"
            )


def _own_error(error: BaseException) -> BaseException | None:
    """The exception that our code raised on a worker, if it is one that would only come again."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            inner = getattr(cause, "cause", None)  # Ray wraps the worker's own exception
            for candidate in (inner, cause):
                if isinstance(candidate, (ValueError, FloatingPointError, TypeError, KeyError)):
                    return candidate
            cause = cause.__cause__
    return None


class _Follower(threading.Thread):
    """Shows and uploads the journal while the run goes on."""

    def __init__(self, run: Run, tracker: Tracker, console: Console) -> None:
        super().__init__(name="journal follower", daemon=True)
        self.run_to_follow, self.tracker, self.console = run, tracker, console
        self._stopped = threading.Event()
        self._warned = False
        journal = run.folder / FILE_NAME
        # A resumed run shows what is new.
        self._offset = journal.stat().st_size if journal.exists() else 0

    def run(self) -> None:
        while not self._stopped.wait(1.0):
            self._turn()

    def stop(self) -> None:
        self._stopped.set()
        if self.ident is not None:
            self.join()
        self._show()

    def _turn(self) -> None:
        self._show()
        try:
            self.tracker.upload()
            self._warned = False
        except Exception as error:
            if not self._warned:
                logger.warning("MLflow does not answer, trying again later: %s", error)
            self._warned = True

    def _show(self) -> None:
        for event, offset in read_events(self.run_to_follow.folder, self._offset):
            self.console.show(event)
            self._offset = offset


def _how_it_ended(run: Run) -> str:
    """Nothing where steps are left."""
    newest = newest_checkpoint(run.checkpoints)
    if newest is not None and newest.state.step >= run.num_steps:
        return f"{run.num_steps} steps"
    return _reason_to_stop(run)


def _reason_to_stop(run: Run) -> str:
    newest = newest_checkpoint(run.checkpoints)
    return run.reason_to_stop(newest.state) if newest is not None else ""


def _last_metrics(run: Run) -> dict[str, float]:
    newest = newest_checkpoint(run.checkpoints)
    return dict(newest.state.metrics) if newest else {}


def _local(key: str, given: str | None, storage: Path) -> str | None:
    """The file or checkpoint that init_checkpoint or init_backbone mean, seen from all nodes."""
    if given is None:
        return None
    if is_url(given):  # into the storage, which all nodes share
        return str(fetch(given, storage / "downloads"))
    path = Path(_absolute(given))
    if key == "init_checkpoint" and not path.is_file():
        path = find_checkpoint(path)
    if not path.exists():
        raise ValueError(f"{key}={path}: there is no such file or folder")
    return str(path)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _difference(first: CocoDataset, second: CocoDataset) -> str:
    one = {(category.id, category.name) for category in first.categories}
    other = {(category.id, category.name) for category in second.categories}
    return (
        f"only in the first {sorted(one - other)[:5]}, only in the second {sorted(other - one)[:5]}"
    )


def _code_commit() -> str:
    """Of the code that runs; a job that travels without its history is told by `deta submit`."""
    if commit := os.environ.get("DETA_COMMIT"):
        return commit
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
