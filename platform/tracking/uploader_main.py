"""Command line of the uploader.

    python -m deta.platform.tracking.uploader_main FOLDER [--follow] [--sweep]

sends to MLflow what a run's folder contains. With --follow it continues until the run has ended;
with --sweep it sends all runs in the folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from deta.platform.system.redaction import redact
from deta.platform.tracking.follower import Follower, stop_on_signals
from deta.platform.tracking.mlflow_store import MlflowStore
from deta.platform.tracking.upload_plan import uri_of

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a run, or of runs")
    parser.add_argument("--follow", action="store_true", help="continue until the run has ended")
    parser.add_argument("--sweep", action="store_true", help="all runs in FOLDER, also later ones")
    parser.add_argument("--behind", type=int, default=0, metavar="BYTES", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, metavar="PROCESS", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    store = MlflowStore(uri_of(parsed.folder))
    follower = Follower(
        parsed.folder,
        store,
        sweep=parsed.sweep,
        behind_bytes=parsed.behind,
        parent=parsed.parent,
    )
    if not parsed.follow:
        error = follower.send_new()
        if error:
            logger.error("%s", redact(error))
        return 1 if error else 0
    os.nice(5)  # training has priority
    stop_on_signals(follower.stop, follower.write_stopped)
    is_complete = follower.follow()
    follower.write_stopped()
    return 0 if is_complete else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # do not wait for MLflow's threads
