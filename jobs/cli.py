"""The `deta` command, which submits recipes as jobs to a Ray cluster."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Train and compare detection transformers on a Ray cluster.

A recipe is a script: `python jobs/deta_r50.py …` trains on this machine or on the cluster that
RAY_ADDRESS names. `deta submit jobs/deta_r50.py …` submits it to a cluster as a job."""

SUBMIT = """\
Run a script as a job on a Ray cluster, show its output, and exit with its exit code.

  deta submit jobs/deta_r50.py --train-images /data/train2017 … optim.lr=1e-4
  deta submit --no-wait jobs/deta_r50.py …        prints the job's id and exits

Options of `deta submit` come before the script. Arguments after the script go to the script."""

SUBMIT_DETAILS = """\
where      --address, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if it is http, else
           http://127.0.0.1:8265. A cluster with token authentication needs RAY_AUTH_MODE=token and
           RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN), as for every command of Ray.
what       The project is uploaded: the nearest folder above the script with pyproject.toml or .git.
The
           job runs in a copy of it, so it runs your edited code, committed or not. Not uploaded is
           what git or .rayignore ignores, .git, environments, runs/, MLflow's files, keys and .env.
paths      The job runs in another folder, so relative paths are made absolute, as seen from the
current
           folder, and shown: folders and files of data, init_… and storage always; of the other
           arguments those that name an existing file, or an existing folder if they are written
           with a slash. Python files stay relative: they are uploaded. On other machines the paths
           must exist too, so give shared storage. --keep-paths changes none.
variables  DETA_COMMIT (the commit of the project), MLFLOW_TRACKING_* and MLFLOW_REGISTRY_URI, and
           the variables of --env. Their values are not printed here, but Ray writes them into a log
           on the cluster's nodes (runtime_env_agent.log): a password is better set where Ray is
           started.
Ctrl-C     stops following; the job continues, and the commands to follow and to stop it are shown.
A
           stopped job has 30 s to save its state.
exit code  the script's own; 143 for a job that was stopped, 130 after Ctrl-C, 2 if the input was
           refused, 1 if the cluster was not reached or the job did not start."""

# Configuration keys and recipe options whose values are paths, whether they exist or not.
PATH_KEYS = (
    "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations",
    "init_checkpoint", "init_backbone", "storage",
)  # fmt: skip
PATH_OPTIONS = (
    "--train-images", "--train-annotations", "--val-images", "--val-annotations", "--init",
    *(f"--{key}" for key in PATH_KEYS),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="deta",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_submit(commands)
    parsed = parser.parse_args(arguments)
    return int(parsed.run(parsed))


def _add_submit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "submit",
        help="run a script as a job on a Ray cluster",
        usage="deta submit [options] SCRIPT [arguments of the script]",
        description=SUBMIT,
        epilog=SUBMIT_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", metavar="URL", help="of the cluster's dashboard")
    parser.add_argument(
        "--working-dir", type=Path, metavar="FOLDER", help="upload this instead of the project"
    )
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and exit")
    parser.add_argument(
        "--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job as well"
    )
    parser.add_argument("--keep-paths", action="store_true", help="keep relative paths")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the job; without a value, as it is set here",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="the interpreter on the cluster (default: this one if the cluster runs on this "
        "machine, otherwise `python`)",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a Python file of the project")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="…", help="passed to the script unchanged"
    )
    parser.set_defaults(run=_submit)


def _submit(parsed: argparse.Namespace) -> int:
    # Ray is slow to import, and --help needs none of it.
    from deta.platform.cluster.submit_job import ClusterError, submit_job

    logging.getLogger("ray").setLevel(logging.ERROR)  # its client logs the upload
    arguments = list(parsed.arguments)
    if arguments[:1] == ["--"]:  # as `ray job submit` requires
        del arguments[0]
    if not parsed.keep_paths:
        arguments = with_absolute_paths(arguments, Path.cwd())
        for before, after in zip(parsed.arguments[-len(arguments) :], arguments, strict=False):
            if before != after:
                _note(f"path:    {before} -> {after}")
    try:
        return submit_job(
            parsed.script,
            arguments,
            address=parsed.address,
            working_dir=parsed.working_dir,
            follow=not parsed.no_wait,
            stop_on_interrupt=parsed.stop_on_interrupt,
            python=parsed.python,
            env=dict(_variable(text) for text in parsed.env),
            echo=_note,
        )
    except ValueError as error:
        _note(f"error: {error}")
        return 2
    except ClusterError as error:
        _note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _note("\nstopped before the job was submitted")
        return 130


def with_absolute_paths(arguments: Sequence[str], folder: Path) -> list[str]:
    """Make the paths in a script's arguments absolute, for a process in another folder.

    This covers the values of `PATH_OPTIONS` and `PATH_KEYS`, and any other argument that, as a
    whole or after its first `=`, names an existing file or, with a slash, an existing folder. A
    bare word that happens to be a folder stays as it is (`--variant small`), as do URLs, `~` and
    .py files.
    """
    result: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or "/" in key:
            key, equals, value = "", "", argument
        certain = key in PATH_OPTIONS or key in PATH_KEYS
        certain |= not equals and bool(result) and result[-1] in PATH_OPTIONS
        if _is_relative_path(value, folder, certain=certain):
            value = os.path.normpath(folder / value)
        result.append(f"{key}{equals}{value}")
    return result


def _is_relative_path(value: str, folder: Path, *, certain: bool) -> bool:
    if value in ("", "none", "null") or value.startswith(("/", "~", "-")) or "://" in value:
        return False
    if certain:
        return True
    path = folder / value
    try:
        return path.suffix != ".py" and (path.is_file() or ("/" in value and path.is_dir()))
    except (OSError, ValueError):  # too long, or a character that no path can have
        return False


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise ValueError(f"--env {name}: {name} is not set here; give --env {name}=VALUE")
    return name, value if equals else os.environ[name]


def _note(line: str) -> None:
    # Standard output is the job's.
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
