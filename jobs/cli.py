"""The `deta` command, which submits recipes as jobs to a Ray cluster."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from deta.jobs.command_line import flags_of, read_options

DESCRIPTION = """\
Train and compare detection transformers on a Ray cluster.

A recipe is a script: `python jobs/deta_r50.py …` trains on this machine or on the cluster that
RAY_ADDRESS names. `deta submit jobs/deta_r50.py …` submits it to a cluster as a job:
`deta submit --help`."""

SUBMIT = """\
Run a script as a job on a Ray cluster, show its output, and exit with its exit code.

  deta submit jobs/deta_r50.py --train-images /data/train2017 … optim.lr=1e-4
  deta submit --no-wait jobs/deta_r50.py …        prints the job's id and exits

Options of `deta submit` come before the script. Arguments after the script go to the script.

  where      --address, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if it is http, else
             http://127.0.0.1:8265. A cluster with token authentication needs RAY_AUTH_MODE=token
             and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN), as for every command of Ray.
  what       The project is uploaded: the nearest folder above the script with pyproject.toml or
             .git. The job runs in a copy of it, so it runs your edited code, committed or not.
             Not uploaded is what git or .rayignore ignores, .git, environments, runs/, MLflow's
             files, keys and .env.
  paths      The job runs in another folder, so relative paths are made absolute, as seen from the
             current folder, and shown: folders and files of data, init_… and storage always; of
             the other arguments those that name an existing file, or an existing folder if they
             are written with a slash. Python files stay relative: they are uploaded. On other
             machines the paths must exist too, so give shared storage. --keep-paths changes none.
  variables  DETA_COMMIT (the commit of the project), MLFLOW_TRACKING_* and MLFLOW_REGISTRY_URI,
             and the variables of --env. Their values are not printed here, but Ray writes them
             into a log on the cluster's nodes (runtime_env_agent.log): a password is better set
             where Ray is started.
  Ctrl-C     stops following; the job continues, and the commands to follow and to stop it are
             shown. A stopped job has 30 s to save its state.
  exit code  the script's own; 143 for a job that was stopped, 130 after Ctrl-C, 2 if the input
             was refused, 1 if the cluster was not reached or the job did not start."""

# Configuration keys and recipe options whose values are paths, whether they exist or not.
PATH_KEYS = (
    "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations",
    "init_checkpoint", "init_backbone", "storage",
)  # fmt: skip
PATH_OPTIONS = (
    "--train-images", "--train-annotations", "--val-images", "--val-annotations", "--init",
    *(f"--{key}" for key in PATH_KEYS),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DetaOptions:
    command: Positional[str]  # submit: run a script as a job on a Ray cluster


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    script: Positional[Path]  # a Python file of the project
    address: str | None = None  # of the cluster's dashboard
    working_dir: Path | None = None  # upload this folder instead of the project
    no_wait: bool = False  # print the job's id and exit
    stop_on_interrupt: bool = False  # Ctrl-C stops the job as well
    keep_paths: bool = False  # keep relative paths
    # NAME or NAME=VALUE: a variable for the job; without a value, as it is set here.
    env: UseAppendAction[tuple[str, ...]] = ()
    # The interpreter on the cluster. Without it, this one if the cluster runs on this machine,
    # otherwise `python`.
    python: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] != ["submit"]:
        command = read_options(DetaOptions, DESCRIPTION, program="deta", arguments=words).command
        _note(f"error: there is no command {command!r}; did you mean submit?")
        return 2
    words = words[1:]
    # What follows the script is the script's own.
    flags, place = flags_of(SubmitOptions), 0
    while place < len(words) and words[place].startswith("-"):
        place += 1 if words[place] in flags or "=" in words[place] else 2
    own, rest = words[: place + 1], words[place + 1 :]
    options = read_options(SubmitOptions, SUBMIT, program="deta submit", arguments=own)
    return _submit(options, rest)


def _submit(options: SubmitOptions, arguments: list[str]) -> int:
    # Ray is slow to import, and --help needs none of it.
    from deta.platform.cluster.submit_job import ClusterError, submit_job

    logging.getLogger("ray").setLevel(logging.ERROR)  # its client logs the upload
    given = arguments[1:] if arguments[:1] == ["--"] else arguments  # as `ray job submit` requires
    arguments = given if options.keep_paths else with_absolute_paths(given, Path.cwd())
    for before, after in zip(given, arguments, strict=True):
        if before != after:
            _note(f"path:    {before} -> {after}")
    try:
        return submit_job(
            options.script,
            arguments,
            address=options.address,
            working_dir=options.working_dir,
            follow=not options.no_wait,
            stop_on_interrupt=options.stop_on_interrupt,
            python=options.python,
            env=dict(_variable(text) for text in options.env),
            echo=_note,
        )
    except (ValueError, ClusterError) as error:
        _note(f"error: {error}")
        return 1 if isinstance(error, ClusterError) else 2
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
