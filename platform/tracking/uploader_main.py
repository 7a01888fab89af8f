"""The uploader process: sends a run, or all runs in a folder, to MLflow until the run has ended.

`start_uploader` starts it as `python -m deta.platform.tracking.uploader_main FOLDER`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from deta.platform.tracking.follower import Follower, stop_on_signals
from deta.platform.tracking.mlflow_store import MlflowStore
from deta.platform.tracking.upload_plan import uri_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sweep", action="store_true", help="all runs in FOLDER, also later ones")
    parser.add_argument("--behind", type=int, default=0, help="see Follower")
    parser.add_argument("--parent", type=int, help="see Follower")
    given = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    follower = Follower(
        given.folder,
        MlflowStore(uri_of(given.folder)),
        sweep=given.sweep,
        behind_bytes=given.behind,
        parent=given.parent,
    )
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
