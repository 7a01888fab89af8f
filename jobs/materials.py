#!/usr/bin/env python
"""List what is installed as a bill of materials (CycloneDX JSON), or check it for changes.

  python jobs/materials.py --output sbom.json
  python jobs/materials.py --verify
  python jobs/materials.py --hashes report.json --output hashes.txt     see `make hashes`

--verify compares every installed file with the hash that its package came with, and names those
that differ; the exit code is 1 then. It sees a file that was changed, by accident or not, but not
a package that came altered: `make verified` does, by `hashes.txt`.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

from deta.jobs.command_line import described_parser
from deta.platform.system.atomic_write import write_json
from deta.platform.system.sbom import altered_files, bill_of_materials, hash_lines


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of printing it")
    parser.add_argument("--verify", action="store_true", help="look for altered files")
    parser.add_argument(
        "--hashes", type=Path, metavar="REPORT", help="of pip: write its packages with their hashes"
    )
    arguments = parser.parse_args()
    if arguments.hashes:
        write_hashes(arguments.hashes, arguments.output or Path("hashes.txt"))
        return
    if arguments.verify:
        altered = list(altered_files())
        print("\n".join(altered) or "all installed files are as their packages came")
        sys.exit(1 if altered else 0)
    bill = bill_of_materials()
    if arguments.output is None:
        print(json.dumps(bill, indent=1))
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, bill)
        print(f"{arguments.output}: {len(bill['components'])} packages")


def write_hashes(report: Path, output: Path) -> None:
    lines = hash_lines(json.loads(report.read_text(encoding="utf-8")))
    where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()[:4]}"
    head = f"# {where}: what was tested together, by content, for `make verified`."
    output.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    print(f"{output}: {len(lines)} packages")


if __name__ == "__main__":
    main()
