#!/usr/bin/env python
"""Register a checkpoint as a version of a model, with its lineage, evaluation and latency.

  python jobs/register.py ~/deta-runs/my-run                      its best checkpoint, under the
  name deta python jobs/register.py ~/deta-runs/my-run --name rivets        under another name
  python jobs/register.py ~/deta-runs/my-run --export exported    with the result of jobs/export.py

A version holds weights (safetensors), configuration, classes and preprocessing, and runs no code
when it is read. It opens as models:/NAME/NUMBER in this project's jobs and in MLflow.

A version needs a complete lineage: the commit of the code, the configuration, the fingerprint of
the data, the installed packages, the run in MLflow, and an evaluation of exactly these weights. The
run's folder has them; --evaluation names another evaluation that jobs/evaluate.py --out wrote. If
something is missing, the error names it. Latency is measured now, with one image of 640 x 480.

A version becomes champion only by jobs/promote.py. MLFLOW_TRACKING_URI names MLflow; the
default is the one that the run is in. The exit code is 2 for refused input, 1 if
MLflow fails.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import described_parser, echo, run_tool

if TYPE_CHECKING:
    from deta.platform.registry.register import Registration

DEFAULT_NAME = "deta"


def main() -> NoReturn:
    parser = described_parser(__doc__)
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="a run or a checkpoint")
    parser.add_argument("--name", default=DEFAULT_NAME, help=f"default: {DEFAULT_NAME}")
    parser.add_argument("--evaluation", metavar="FOLDER", type=Path, help="default: the run's own")
    parser.add_argument(
        "--export", metavar="FOLDER", type=Path, help="output of jobs/export.py, for the gate"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="device for the latency; default: cuda if available",
    )  # fmt: skip
    arguments = parser.parse_args()
    run_tool(lambda: _prepare(arguments), lambda prepared: _register(prepared, arguments))


def _prepare(arguments: argparse.Namespace) -> Registration:
    from deta.platform.registry.register import prepare_registration

    return prepare_registration(
        arguments.weights.expanduser(), arguments.evaluation, arguments.export
    )


def _register(prepared: Registration, arguments: argparse.Namespace) -> int:
    import torch

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs every retry
    from deta.platform.registry.lineage import run_folder
    from deta.platform.registry.mlflow_registry import Registry
    from deta.platform.registry.model_address import registry_uri
    from deta.platform.registry.register import register
    from deta.platform.system.redaction import redact
    from deta.platform.tracking.upload_plan import uri_of

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
    where = "" if registry.uri == registry_uri() else f"MLFLOW_TRACKING_URI={redact(registry.uri)} "
    echo(f"next: {where}python jobs/promote.py {version.number} --name {version.name} --dry-run")
    return 0


if __name__ == "__main__":
    main()
