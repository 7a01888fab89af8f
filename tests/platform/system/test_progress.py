"""A bar is shown on a terminal within its width, and nothing anywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

CODE = """
from deta.platform.system.progress import progress_bar
with progress_bar("image headers", {total}, is_bytes={is_bytes}, show={show}) as advance:
    for _ in range(10):
        advance({total} / 10)
"""


@pytest.mark.parametrize(
    ("total", "is_bytes", "show", "amount"),
    [(5e9, True, True, "5.0 GB"), (100, False, True, "100/100"), (100, False, False, "")],
)
def test_a_bar_fits_a_terminal_and_is_gone_at_its_end(
    total: float, is_bytes: bool, show: bool, amount: str
) -> None:
    reader, terminal = pty.openpty()
    command = [sys.executable, "-c", CODE.format(total=total, is_bytes=is_bytes, show=show)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    subprocess.run(command, stdout=terminal, stderr=terminal, env=environment, check=True)
    os.write(terminal, b"end")
    shown = ""
    while not shown.endswith("end"):  # the terminal passes its bytes on in pieces
        shown += os.read(reader, 1 << 20).decode()

    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", shown)]
    assert max(len(line) for line in lines) <= 80
    assert any("image headers" in line and amount in line for line in lines) == show
    assert lines[-1] == "end"


def test_without_a_terminal_nothing_is_shown() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(total=9, is_bytes=False, show=True)],
        capture_output=True,
        check=True,
    )
    assert result.stdout + result.stderr == b""
