#!/usr/bin/env python
"""Register a checkpoint as a version of a model, with its lineage, evaluation and latency.

  python jobs/register.py ~/deta-runs/my-run                      its best checkpoint
  python jobs/register.py ~/deta-runs/my-run --name rivets        under another name than deta
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

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from tyro.conf import Positional

from deta.jobs.command_line import echo, read_options, refuse, run_tool
from deta.platform.run.run_paths import require_paths

if TYPE_CHECKING:
    from deta.platform.registry.register import Registration

DEFAULT_NAME = "deta"


@dataclass(frozen=True, kw_only=True)
class RegisterOptions:
    weights: Positional[Path]  # a run or a checkpoint
    name: str = DEFAULT_NAME  # of the model
    evaluation: Path | None = None  # a folder; without it, the run's own
    export: Path | None = None  # output of jobs/export.py, for the gate
    # Device for the latency; auto: cuda if there is any.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Register in spite of detections of images and categories that the ground truth does not have.
    lenient: bool = False


def main() -> NoReturn:
    options = read_options(RegisterOptions, __doc__)
    try:
        require_paths({"": options.weights, "--evaluation": options.evaluation})
    except ValueError as error:
        refuse(error)
    from deta.platform.registry.register import prepare_registration

    weights = options.weights.expanduser()
    run_tool(
        lambda: prepare_registration(
            weights, options.evaluation, options.export, echo if options.lenient else None
        ),
        lambda prepared: _register(prepared, options),
    )


def _register(prepared: Registration, options: RegisterOptions) -> int:
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs every retry
    from deta.jobs.model_options import pick_device
    from deta.platform.registry.lineage import run_folder
    from deta.platform.registry.mlflow_registry import Registry
    from deta.platform.registry.model_address import registry_uri
    from deta.platform.registry.register import register
    from deta.platform.registry.version_folder import export_parity
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
    device = pick_device(options.device)
    registry = Registry(uri_of(run_folder(checkpoint.path)))
    version = register(registry, options.name, prepared, device=device, echo=echo)
    echo(f"registered: models:/{version.name}/{version.number}")
    _, fault = export_parity(prepared.export, prepared.sha256)
    if fault:
        echo(
            f"promotion will refuse it: {fault}. Export and check it with: python jobs/export.py "
            f"{options.weights} --check-images FOLDER --out exported; or promote with parity=false"
        )
    where = "" if registry.uri == registry_uri() else f"MLFLOW_TRACKING_URI={redact(registry.uri)} "
    echo(f"next: {where}python jobs/promote.py {version.number} --name {version.name} --dry-run")
    return 0


if __name__ == "__main__":
    main()
