"""Runs a job in the process of the tests, as from a command line."""

from __future__ import annotations

import signal
import sys

import pytest


def run_job(job, *arguments: object) -> int:
    """Return the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(sys, "argv", [job.__file__, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            job.main()
    return int(caught.value.code or 0)
