"""Check names that become paths: in the folder of a run, in MLflow, on the disk of its server.

Crafted artifact names have made MLflow servers read and write outside their folder more than once.
So every artifact that leaves a run has a name of plain characters, whatever the server accepts.
"""

from __future__ import annotations

import re

PART = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
MAX_PARTS = 8


def artifact_fault(path: object) -> str | None:
    """Return why a value is not a valid relative artifact path; None if it is valid."""
    if not isinstance(path, str):
        return f"{path!r:.80} is not text"
    parts = path.split("/")
    if len(parts) > MAX_PARTS:
        return f"{path[:80]!r} has over {MAX_PARTS} folders"
    for part in parts:
        if part in (".", "..") or not PART.fullmatch(part):
            return (
                f"{path[:80]!r} is not a path of letters, digits, '.', '_' and '-', with at most "
                "128 in each of its parts"
            )
    return None
