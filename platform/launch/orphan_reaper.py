"""Kills the processes of a run, and marks the run, after its supervisor was killed.

The supervisor starts this process and holds the other end of its stdin. While that is open, the
supervisor lives. At its end the supervisor writes a line; without it, this process cleans up.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import EXIT_GRACE_S, RUN_MARK, kill_marked

CLEAN_EXIT = b"done\n"


def start_orphan_reaper(mark: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the reaper; the caller writes `CLEAN_EXIT` to its stdin when the run has ended."""
    unmarked = {name: value for name, value in child_environment().items() if name != RUN_MARK}
    return subprocess.Popen(
        [sys.executable, "-m", "deta.platform.launch.orphan_reaper", mark, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=unmarked,
        start_new_session=True,  # a signal to the supervisor's process group must not end this one
    )


def main(mark: str, folder: str) -> None:
    if sys.stdin.buffer.readline() == CLEAN_EXIT:
        return
    time.sleep(EXIT_GRACE_S)  # the Ray driver sees it too, and releases its reservations
    kill_marked(RUN_MARK, mark, within_s=30)
    command = [sys.executable, "-m", "deta.platform.tracking.sync_run", folder]
    subprocess.run(command, timeout=300, check=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
