#!/usr/bin/env python
"""Make a checkpoint a version of a registered model, complete and with all that is known of it.

  python jobs/register.py ~/deta-runs/my-run                      its best checkpoint, as deta
  python jobs/register.py ~/deta-runs/my-run --name rivets        under another name
  python jobs/register.py ~/deta-runs/my-run --export exported    with what jobs/export.py found

A version holds weights (safetensors), configuration, classes and preprocessing, and runs nothing
when it is read. It opens as models:/NAME/NUMBER in this project's tools and in MLflow.

Registered is only what is known: the commit of the code, the configuration, the fingerprint of the
data, the installed packages, the run in MLflow, and an evaluation of these very weights. The run's
folder has them; --evaluation names another evaluation, which jobs/evaluate.py --out wrote. What is
missing is named. Latency is measured now, with one picture of 640 x 480.

A version is nothing but a version until jobs/promote.py lets it be champion. MLflow is the one of
MLFLOW_TRACKING_URI, else the one that the run is in. The exit code is 2 for what is refused, 1 if
MLflow fails.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import described_parser, echo, run_tool

if TYPE_CHECKING:
    from deta.platform.registry.register import Prepared

DEFAULT_NAME = "deta"


def main() -> NoReturn:
    parser = described_parser(__doc__)
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="a run or a checkpoint")
    parser.add_argument("--name", default=DEFAULT_NAME, help=f"default: {DEFAULT_NAME}")
    parser.add_argument(
        "--evaluation", metavar="FOLDER", type=Path, help="default: the one that the run kept"
    )
    parser.add_argument(
        "--export", metavar="FOLDER", type=Path, help="of jobs/export.py, for the gate"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="to measure latency on; default: cuda if any",
    )  # fmt: skip
    arguments = parser.parse_args()
    run_tool(lambda: _prepare(arguments), lambda prepared: _register(prepared, arguments))


def _prepare(arguments: argparse.Namespace) -> Prepared:
    from deta.platform.registry.register import prepare

    return prepare(arguments.weights.expanduser(), arguments.evaluation, arguments.export)


def _register(prepared: Prepared, arguments: argparse.Namespace) -> int:
    import torch

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it tells of what is tried again
    from deta.platform.registry.lineage import run_folder
    from deta.platform.registry.mlflow_registry import Registry, registry_uri
    from deta.platform.registry.register import register
    from deta.platform.system.redaction import mask_text
    from deta.platform.tracking.upload_process import uri_of

    lineage, checkpoint = prepared.lineage, prepared.checkpoint
    ap = prepared.evaluation.metrics.AP
    echo(f"checkpoint: {checkpoint.path}, AP {100 * ap:.1f}, SHA-256 {prepared.sha256[:12]}…")
    echo(
        f"from: run {lineage.run_name}, commit {lineage.code_commit[:12]}"
        + " with uncommitted changes" * lineage.code_is_dirty
        + f", data {lineage.data_fingerprint[:12]}, {len(lineage.packages)} packages"
    )
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    registry = Registry(uri_of(run_folder(checkpoint.path)))
    version = register(registry, arguments.name, prepared, device=device, echo=echo)
    echo(f"registered: models:/{version.name}/{version.number}")
    where = (
        "" if registry.uri == registry_uri() else f"MLFLOW_TRACKING_URI={mask_text(registry.uri)} "
    )
    echo(f"next: {where}jobs/promote.py {version.number} --name {version.name} --dry-run")
    return 0


if __name__ == "__main__":
    main()
