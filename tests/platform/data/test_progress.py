"""A bar is shown on a terminal within its width, and nothing anywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

CODE = """
from deta.platform.data.progress import progress_bar
with progress_bar("image headers", 5e9, is_bytes=True, show={show}) as advance:
    for _ in range(10):
        advance(5e8)
"""


@pytest.mark.parametrize("show", [True, False])
def test_a_bar_fits_a_terminal_and_is_gone_at_its_end(show: bool) -> None:
    reader, terminal = pty.openpty()
    command = [sys.executable, "-c", CODE.format(show=show)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    subprocess.run(command, stdout=terminal, stderr=terminal, env=environment, check=True)
    os.write(terminal, b"end")
    shown = os.read(reader, 1 << 20).decode()

    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", shown)]
    assert max(len(line) for line in lines) <= 80
    assert any("image headers" in line and "5.0 GB" in line for line in lines) == show
    assert lines[-1] == "end"


def test_without_a_terminal_nothing_is_shown() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(show=True)], capture_output=True, check=True
    )
    assert result.stdout + result.stderr == b""
