"""What a job imports is declared by the extra that the README names for it.

The imports are followed from file to file, also those inside functions and those of modules that a
job starts as a process of their own (`python -m deta.…`, whose names are strings in the code).
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import metadata, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Parts of a declared package that carry another name, or come with it alone.
COMES_WITH = {"triton": "torch", "pynvml": "nvidia-ml-py"}
README_ROW = re.compile(r"^\| `(\w+)` \|([^|]*)\|", re.MULTILINE)


def named_jobs() -> list[tuple[str, str]]:
    """Return (extra, job) pairs of the README's table of extras."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [
        (extra, job)
        for extra, jobs in README_ROW.findall(readme)
        for job in re.findall(r"`(?:jobs/)?(\w+)\.py`", jobs)
    ]


def declared(extra: str) -> set[str]:
    """Return the distributions that the project itself asks for in an extra, in lower case."""
    names: set[str] = set()
    for requirement in [*PROJECT["dependencies"], *EXTRAS[extra]]:
        name, within = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        if name == PROJECT["name"]:
            for other in within.split(","):
                names |= declared(other)
        else:
            names.add(_normalized(name))
    return names


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


class Imports(ast.NodeVisitor):
    """Collect the modules that a file needs, and those that it can do without.

    An import within `try` whose `except ImportError` does not give up with the same error is
    optional: what it raises instead has to name an extra.
    """

    def __init__(self, path: Path, *, is_program: bool = False) -> None:
        self.is_program = is_program  # otherwise its block of `__main__` does not run
        self.required: set[str] = set()
        self.programs: set[str] = set()  # modules that it starts as processes
        self.optional: set[tuple[str, str]] = set()  # module, what its handlers say
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        if "TYPE_CHECKING" in test or ("__main__" in test and not self.is_program):
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Try(self, node: ast.Try) -> None:
        guards = [
            handler
            for handler in node.handlers
            if handler.type is not None
            and re.search(r"ImportError|ModuleNotFound|PackageNotFound", ast.unparse(handler.type))
        ]
        if not guards:
            self.generic_visit(node)
            return
        before, self.required = self.required, set()
        for child in node.body:
            self.visit(child)
        said = " ".join(ast.unparse(handler) for handler in guards)
        self.optional |= {(name, said) for name in self.required}
        self.required = before
        for child in [*node.handlers, *node.orelse, *node.finalbody]:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.required |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module:
            self.required |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(r"deta(\.\w+)+", node.value):
            self.programs.add(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        """A package that is found by its metadata is needed as if it were imported."""
        if ast.unparse(node.func) == "metadata.distribution" and isinstance(
            node.args[0], ast.Constant
        ):
            self.required.add(node.args[0].value)
        self.generic_visit(node)


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def needed_by(job: Path) -> tuple[dict[str, Path], dict[tuple[str, str], Path]]:
    """Follow the imports of a job through the project.

    Returns:
        The packages of others that are needed, by a file that needs each; and the optional ones
        with what is raised where they are missing.
    """
    required: dict[str, Path] = {}
    optional: dict[tuple[str, str], Path] = {}
    seen: set[Path] = set()
    waiting = [job]
    programs = {job}
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        imports = Imports(path, is_program=path in programs)
        programs |= {file for name in imports.programs if (file := file_of(name)) is not None}
        waiting += programs - seen
        for module in imports.required:
            top = module.partition(".")[0]
            if top == "deta":
                waiting += [file] if (file := file_of(module)) is not None else []
            elif top not in sys.stdlib_module_names:
                required[top] = path
        for module, said in imports.optional:
            optional[module, said] = path
    return required, optional


def test_the_readme_names_an_extra_for_every_job():
    runnable = {
        path.stem
        for path in (ROOT / "jobs").glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    assert {extra for extra, _ in named_jobs()} <= set(EXTRAS)
    assert not runnable - {job for _, job in named_jobs()} - {"recipe_pages"}


@pytest.mark.parametrize(("extra", "job"), named_jobs(), ids="-".join)
def test_a_job_imports_only_what_its_extra_declares(extra: str, job: str):
    distributions = packages_distributions()
    required, optional = needed_by(ROOT / "jobs" / f"{job}.py")
    here = declared(extra)
    for package, path in required.items():
        brings = {_normalized(name) for name in distributions.get(package, [package])}
        brings.add(COMES_WITH.get(package, package))
        assert brings & here, (
            f"jobs/{job}.py needs {package} ({path.relative_to(ROOT)}), which the extra {extra} "
            "does not declare"
        )
    for (module, said), path in optional.items():
        package = module.partition(".")[0]
        brings = {_normalized(name) for name in distributions.get(package, [package])}
        brings.add(COMES_WITH.get(package, package))
        named = [one for one in re.findall(r"deta-platform\[(\w+)\]", said) if one in EXTRAS]
        is_there = brings & here or any(brings & declared(one) for one in named)
        assert is_there or (package == "deta" and named), (
            f"{path.relative_to(ROOT)} can do without {module}, but does not name an extra of "
            f"pyproject.toml that brings it: {said}"
        )


@pytest.mark.parametrize("name", sorted(declared("all")))
def test_a_declared_package_has_no_copyleft_or_proprietary_licence(name: str):
    about = metadata(name)
    classifiers = [one for one in about.get_all("Classifier") or [] if one.startswith("License")]
    # The field License may hold the whole text; its first line names it.
    field = (about.get("License") or "").strip().partition("\n")[0]
    licence = " ".join([about.get("License-Expression") or "", field, *classifiers])
    assert licence.strip(), f"{name} names no licence"
    assert not re.search(r"\bL?A?GPL|Affero|SSPL|Proprietary", licence), f"{name}: {licence}"


def test_every_declared_package_is_judged():
    """docs/DEPENDENCIES.md has one row for each declared package, with the extras that name it."""
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\w, ]+) \| [^|]+ \| \d{4} \| \d+ \| \d{4}-\d\d-\d\d \| [^|]+ \|$",
        (ROOT / "docs" / "DEPENDENCIES.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    named: dict[str, set[str]] = {}
    for extra, group in {"base": PROJECT["dependencies"], **EXTRAS}.items():
        for requirement in group:
            name = re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower()
            if name != "deta-platform":
                named.setdefault(name, set()).add(extra)
    assert {name: set(extras.split(", ")) for name, extras in rows} == named
