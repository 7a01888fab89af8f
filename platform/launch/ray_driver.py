"""The process of a Ray driver, as its parent has it. See `cluster/driver.py`.

It may be started long before the run may begin. A cluster of its own starts in the meantime.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from deta.platform.run.config import ClusterConfig
from deta.platform.run.run import ATTEMPT_LOG
from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import ATTEMPT_MARK, RUN_MARK, new_mark, terminate


class RayDriver:
    """A driver from its start to its end; it ends with this process, however that ends."""

    def __init__(self, run_mark: str) -> None:
        """
        Args:
            run_mark: the mark of all processes of the run; see `process_tree.py`.
        """
        self.run_mark, self.mark = run_mark, new_mark()
        self.cluster: ClusterConfig | None = None
        self.folder: Path | None = None
        # What it prints before there is a folder; afterwards it prints to the log there.
        self._early_log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deta.platform.cluster.driver"],
            env=child_environment({RUN_MARK: run_mark, ATTEMPT_MARK: self.mark}),
            stdin=subprocess.PIPE,
            stdout=self._early_log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the supervisor, which stops the run
            cwd="/",  # it is always there
        )

    def plan(self, cluster: ClusterConfig) -> None:
        """Say which resources the run needs. A cluster of the driver's own starts the workers."""
        self.cluster = cluster
        self._write({"cluster": asdict(cluster)})

    def begin(self, folder: Path) -> None:
        """Train the run in this folder. `plan` comes before."""
        self.folder = folder
        self._write({"folder": str(folder)})

    def terminate(self) -> None:
        """End it and all that it has started."""
        terminate(self.process, self.mark)
        if self.folder is not None:
            self._early_log.seek(0)
            with contextlib.suppress(OSError), (self.folder / ATTEMPT_LOG).open("ab") as log:
                log.write(self._early_log.read())  # what it had not moved there
        self._early_log.close()

    def _write(self, order: dict[str, object]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; the supervisor will notice
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
