"""The state of a sweep, with trials that are trained in this process instead of on a cluster."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from deta.jobs.deta_r50 import demo
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.learning.distributed import Worker
from deta.platform.run.config import RunConfig, from_json, override
from deta.platform.run.run import Run
from deta.platform.run.run_lock import RunLock
from deta.platform.sweep.live_table import LiveTable
from deta.platform.sweep.results import report_only
from deta.platform.sweep.scheduler import SweepScheduler
from deta.platform.sweep.search_space import Asha, Optuna, Random, Sweep
from deta.platform.sweep.speed_probe import TrialSpeed, whole_estimate
from deta.platform.sweep.sweep_folder import describe_sweep, write_sweep
from deta.platform.training.loop import train

TINY = {
    "model.backbone.width": 0.25, "model.dim": 32, "model.num_heads": 4, "model.ffn_dim": 32,
    "model.encoder_layers": 1, "model.decoder_layers": 1, "model.num_queries": 20,
    "data.augmentation.short_edges": (48, 64), "data.augmentation.max_long_edge": 96,
    "data.evaluation_size.short_edge": 64, "data.evaluation_size.max_long_edge": 96,
    "log_every_steps": 2, "num_pictures": 0, "cluster.num_workers": 1, "total_batch_size": 4,
    "schedule.epochs": 1, "schedule.warmup_epochs": 0, "evaluate_every_epochs": 1,
    "name": "tiny", "model.num_classes": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    drawn = write_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=4, size_px=64)
    config = override(demo(), TINY)
    train_set = CocoDataset.open(drawn.train_images, drawn.train_annotations)
    val_set = CocoDataset.open(drawn.val_images, drawn.val_annotations)
    return Run(config, Path("nowhere"), train_set, val_set)


def placed(base: Run, storage: Path) -> Run:
    config = replace(base.config, storage=str(storage))
    return replace(base, config=config, folder=storage / config.name)


def open_state(sweep: Sweep, run: Run, lock: RunLock, screen: io.StringIO) -> SweepScheduler:
    trials = sweep.trials()
    content = describe_sweep(sweep, run, trials, None)
    write_sweep(run.folder, content)
    state = SweepScheduler(sweep, run, trials, 1, LiveTable(stream=screen), content, lock, False)
    state.begin()
    return state


def train_next(state: SweepScheduler) -> str | None:
    given = state.next_trial()
    if given is None:
        return None
    config = from_json(RunConfig, given["config"])
    train(replace(state.run, config=config, folder=Path(given["folder"])), Worker())
    state.on_trial_ended(given["trial"])
    return str(given["trial"])


def test_a_search_by_optuna_goes_on_where_it_was(base: Run, tmp_path: Path):
    run = placed(base, tmp_path)
    space = {
        "optim.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "total_batch_size": CategoricalDistribution((2, 4)),
    }
    sweep = Sweep(base=run.config, space=space, search=Optuna(3, ("AP", "cpu_hours")))
    screen = io.StringIO()
    with RunLock.acquire(run.folder) as lock:
        state = open_state(sweep, run, lock, screen)
        first = train_next(state)
        assert first is not None
        begun = state.next_trial()  # and then its process is gone
        assert begun is not None
        state.locks.pop(begun["trial"]).release()
    with RunLock.acquire(run.folder) as lock:
        state = open_state(sweep, run, lock, screen)
        assert state.num_done_before == 1
        assert train_next(state) == begun["trial"]
        assert train_next(state) not in (None, first, begun["trial"])
        assert train_next(state) is None
        report = state.report(is_over=True)
        state.write_end("FINISHED", "", report)
    assert [record.status for record in report.trials] == ["finished"] * 3
    assert "1 trials have ended already" in screen.getvalue()
    assert "finished, 8 samples" in screen.getvalue()
    for trial in state.trials:
        described = json.loads((trial.folder / "run.json").read_text())
        assert described["parent"] == json.loads((run.folder / "run.json").read_text())["key"]
        assert described["config"]["optim"]["lr"] == trial.trial.changes["optim.lr"]
    again = report_only(replace(sweep, base=replace(run.config, storage=str(tmp_path))))
    assert [record.name for record in again.trials] == [record.name for record in report.trials]
    assert (run.folder / "report.html").exists()


def test_what_asha_ends_is_stopped_and_what_a_worker_refuses_is_failed(base: Run, tmp_path: Path):
    run = placed(base, tmp_path)
    run = replace(run, config=override(run.config, {"schedule.epochs": 2}))
    space = {"optim.lr": FloatDistribution(1e-4, 1e-2, log=True)}
    sweep = Sweep(base=run.config, space=space, search=Random(3), stopping=Asha(grace_samples=8))
    with RunLock.acquire(run.folder) as lock:
        state = open_state(sweep, run, lock, io.StringIO())
        given = state.next_trial()
        assert given is not None
        config = from_json(RunConfig, given["config"])
        # One epoch of two, as if Ray had ended it there.
        folder = Path(given["folder"])
        (folder / "journal.jsonl").touch()
        whole = replace(run, config=config, folder=folder)
        with pytest.raises(InterruptedError):
            train(whole, Worker(), on_evaluation=interrupt)
        assert state.by_id[given["trial"]].verify()
        state.on_trial_ended(given["trial"])
        failed = state.next_trial()
        assert failed is not None
        (Path(failed["folder"]) / "failures").mkdir()
        (Path(failed["folder"]) / "failures" / "rank-0.json").write_text(
            json.dumps({"type": "ValueError", "message": "image 7 is no image"})
        )
        state.on_trial_failed(failed["trial"], "lost")
        train_next(state)
        report = state.report(is_over=True)
    statuses = [(record.status, record.reason) for record in report.trials]
    assert statuses[0][0] == "stopped"
    assert "after 8 samples was not in the upper 1/3" in statuses[0][1]
    assert statuses[1] == ("failed", "ValueError: image 7 is no image (lost 3 times)")
    assert statuses[2] == ("finished", "")


def interrupt(_metrics: dict[str, float]) -> None:
    raise InterruptedError


def test_the_estimate_counts_evaluations_and_rounds(base: Run, tmp_path: Path):
    run = placed(base, tmp_path)
    speed = TrialSpeed(images_per_s=4.0, val_images_per_s=2.0, start_s=10.0, seconds=1.0)
    # 8 images at 4/s, 4 validation images at 2/s, and the start.
    each, whole = whole_estimate(speed, run, [run.config] * 3, 2)
    assert each.hours * 3600 == pytest.approx(14)
    assert whole.hours * 3600 == pytest.approx(28)  # two rounds
    assert whole.gpu_hours == pytest.approx(3 * each.hours)
