"""Software bill of materials: every installed package, as CycloneDX JSON.

It records which versions a model was trained with, so that they can be looked up in a list of
vulnerabilities. Each package carries the SHA-256 of its list of files (its RECORD).
`altered_files` compares the installed files with that list.
"""

from __future__ import annotations

import base64
import hashlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from typing import Any

SPEC_VERSION = "1.6"  # https://cyclonedx.org/docs/1.6/json/
OURS = "deta-platform"
MAX_LICENCE_CHARACTERS = 100  # some packages put the whole text there


def bill_of_materials(packages: Iterable[Distribution] | None = None) -> dict[str, Any]:
    """Return a CycloneDX document: this project, with all installed packages as components.

    Args:
        packages: default: those of this Python.
    """
    found = {canonical(p.name): p for p in packages or distributions() if p.metadata["Name"]}
    parts = [_component(found[name]) for name in sorted(found) if name != OURS]
    subject = {"type": "application", "name": OURS, "bom-ref": OURS}
    if OURS in found:
        subject["version"] = found[OURS].version
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": subject,
        },
        "components": parts,
    }


def altered_files(packages: Iterable[Distribution] | None = None) -> Iterator[str]:
    """Yield a line for each installed file that differs from its package or is missing."""
    for package in packages or distributions():
        for file in package.files or ():
            if file.hash is None or file.suffix == ".pyc":
                continue
            path = file.locate()
            try:
                with open(path, "rb") as opened:
                    digest = hashlib.file_digest(opened, file.hash.mode).digest()
            except OSError:
                yield f"{package.name}: {path} is missing"
                continue
            if base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
                yield f"{package.name}: {path} has changed"


def hash_lines(report: Mapping[str, Any]) -> list[str]:
    """Return requirements with the SHA-256 of each file, for `pip install --require-hashes`.

    Args:
        report: output of `pip install --dry-run --ignore-installed --report`. The addresses in it
            are ignored.

    Raises:
        ValueError: the report has no hash for a package.
    """
    lines = []
    for item in report["install"]:
        name, version = canonical(item["metadata"]["name"]), item["metadata"]["version"]
        if name == OURS:
            continue
        sha256 = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not sha256:
            raise ValueError(f"{name} {version}: pip reports no SHA-256; install it from an index")
        lines.append(f"{name}=={version} --hash=sha256:{sha256}")
    return sorted(lines)


def canonical(name: str) -> str:
    """Return the normalized name of a package. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _component(package: Distribution) -> dict[str, Any]:
    name = canonical(package.name)
    address = f"pkg:pypi/{name}@{package.version}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": address,
        "name": name,
        "version": package.version,
        "purl": address,
    }
    if licence := _licence(package):
        component["licenses"] = [licence]
    if record := package.read_text("RECORD"):
        component["properties"] = [
            {"name": "deta:record_sha256", "value": hashlib.sha256(record.encode()).hexdigest()}
        ]
    return component


def _licence(package: Distribution) -> dict[str, Any] | None:
    for expression in package.metadata.get_all("License-Expression") or ():
        return {"expression": expression}
    text = "".join(package.metadata.get_all("License") or ()).strip()
    if text and len(text) <= MAX_LICENCE_CHARACTERS and "\n" not in text:
        return {"license": {"name": text}}
    for classifier in package.metadata.get_all("Classifier") or ():
        if classifier.startswith("License ::") and not classifier.endswith("OSI Approved"):
            return {"license": {"name": classifier.rpartition(" :: ")[2]}}
    return None
