"""Check names that become paths: in the folder of a run, in MLflow, on the disk of its server.

Crafted artifact names have made MLflow servers read and write outside their folder more than once.
So every artifact that leaves a run has a name of plain characters, whatever the server accepts.
"""

from __future__ import annotations

import hashlib
import re

PART = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]{1,128}"
PATH = re.compile(f"{PART}(?:/{PART}){{0,7}}", re.ASCII)


def artifact_fault(path: object) -> str | None:
    """Return why a value is not a valid relative artifact path; None if it is valid."""
    if isinstance(path, str) and PATH.fullmatch(path):
        return None
    return (
        f"{path!r:.80} is not a path of at most 8 parts, each with 1 to 128 letters, digits, '.', "
        "'_' and '-'"
    )


def folder_name(text: str) -> str:
    """Return a name for a folder that stands for any text: the text itself where it is plain.

    Otherwise its plain characters and a hash, so that no name leaves the folder above or meets
    another's.
    """
    if artifact_fault(text) is None and "/" not in text:
        return text
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text, flags=re.ASCII).strip("-")[:60]
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")
