"""Names that become paths somewhere: in a run's folder, in MLflow, on the disk of its server.

MLflow's servers have been made to read and write elsewhere by such names, time and again. So what
leaves a run has a name of plain characters, whatever the store behind it would make of others.
"""

from __future__ import annotations

import re

PART = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
MAX_PARTS = 8


def artifact_fault(path: object) -> str | None:
    """Why a value cannot be the path of an artifact, relative and with `/`; None if it can."""
    if not isinstance(path, str):
        return f"{path!r:.80} is no text"
    parts = path.split("/")
    if len(parts) > MAX_PARTS:
        return f"{path[:80]!r} has over {MAX_PARTS} folders"
    for part in parts:
        if part in (".", "..") or not PART.fullmatch(part):
            return (
                f"{path[:80]!r} is no path of letters, digits, '.', '_' and '-', with at most 128 "
                "in each of its parts"
            )
    return None
