"""A job as the documentation suggests it: Ray Train, torch.save, MLflow, and a tiny network.

    python -m tests.chaos.stock_job FOLDER STEPS

Each step appends a line to FOLDER/steps-RANK.jsonl, for the scenarios; no documentation shows
that part. FOLDER/fault.json may contain {"nan_rank": 1, "nan_step": 20} or {"raise_step": 7}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EVERY_STEPS = 10
MAX_FAILURES = 3


def train_loop(config: dict[str, Any]) -> None:
    import mlflow
    import ray.train
    import ray.train.torch
    import torch
    from torch import nn

    folder = Path(config["folder"])
    fault = json.loads((folder / "fault.json").read_text())
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(64, 64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, 4)
    )
    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as place:
            state = torch.load(Path(place) / "checkpoint.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    if rank == 0 and config["mlflow"]:
        mlflow.set_tracking_uri(config["mlflow"])
        mlflow.start_run()
    log_event(folder, kind="begin", rank=rank, step=step)
    data = torch.Generator().manual_seed(rank)
    while step < config["steps"]:
        inputs = torch.randn(16, 64, generator=data)
        loss = nn.functional.cross_entropy(model(inputs), (inputs.abs().sum(1) % 4).long())
        if fault.get("nan_rank") == rank and fault.get("nan_step") == step + 1:
            loss = loss * float("nan")
        if fault.get("raise_step") == step + 1:
            raise RuntimeError("a bug")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.1)
        step += 1
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        log_event(
            folder, kind="step", rank=rank, step=step, loss=float(loss.item()).hex(),
            poisoned=int((~weights.isfinite()).sum()),
        )  # fmt: skip
        if rank == 0 and config["mlflow"]:
            mlflow.log_metric("loss", loss.item(), step=step)
        if step % EVERY_STEPS == 0:
            with tempfile.TemporaryDirectory() as place:
                reported = None
                if rank == 0:
                    state = {
                        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "step": step,
                    }  # fmt: skip
                    torch.save(state, Path(place) / "checkpoint.pt")
                    reported = ray.train.Checkpoint.from_directory(place)
                ray.train.report({"loss": loss.item()}, checkpoint=reported)
    if rank == 0 and config["mlflow"]:
        mlflow.end_run()


def log_event(folder: Path, **row: Any) -> None:
    row["time_s"] = time.time()
    with (folder / f"steps-{row['rank']}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def main(folder: Path, steps: int) -> None:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.init(log_to_driver=False, num_cpus=2)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "folder": str(folder), "steps": steps, "mlflow": os.environ.get("STOCK_MLFLOW", "")
        },
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="stock", storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )  # fmt: skip
    trainer.fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
