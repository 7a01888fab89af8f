"""What is left to do when a run's supervisor was killed: end its processes, and mark the run.

Started by the supervisor, which holds the other end of this process's input. As long as that is
open the supervisor lives, whatever it does; a line says that all is well and nothing is to be done.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import EXIT_GRACE_S, RUN_MARK, kill_marked

ALL_IS_WELL = b"done\n"


def start_guardian(mark: str, folder: Path) -> subprocess.Popen[bytes]:
    """Called by the supervisor; it writes `ALL_IS_WELL` to the process's input at its end."""
    unmarked = {name: value for name, value in child_environment().items() if name != RUN_MARK}
    return subprocess.Popen(
        [sys.executable, "-m", "deta.platform.launch.orphan_reaper", mark, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=unmarked,
        start_new_session=True,  # what ends the supervisor's group does not end this one
    )


def main(mark: str, folder: str) -> None:
    if sys.stdin.buffer.readline() == ALL_IS_WELL:
        return
    time.sleep(EXIT_GRACE_S)  # the Ray driver has seen it too, and gives back what it holds
    kill_marked(RUN_MARK, mark, within_s=30)
    command = [sys.executable, "-m", "deta.platform.tracking.sync_run", folder]
    subprocess.run(command, timeout=300, check=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
