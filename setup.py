"""Compiles the kernels of the operator, and nothing else; pyproject.toml has the rest.

Needs a C++ compiler and no PyTorch. Without a compiler the package installs all the same, with a
warning, and the operator runs on its plain PyTorch kernel.
"""

import os
import platform
import subprocess
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fopenmp-simd", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-ffp-contract=fast", "-fvisibility-inlines-hidden"]
# The base version is linked first: of library functions that all versions contain the linker keeps
# the first, and that one must run on every processor.
INSTRUCTION_SETS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    INSTRUCTION_SETS["avx512"] += ["-mprefer-vector-width=512"]


class BuildKernels(build_ext):
    """One library, each source compiled once for each instruction set."""

    def build_extension(self, extension: Extension) -> None:
        compiler = os.environ.get("CXX", "g++")
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        try:
            for source in extension.sources:
                for name, flags in INSTRUCTION_SETS.items():
                    target = folder / f"{Path(source).stem}-{name}.o"
                    command = [compiler, *FLAGS, *flags, f"-DINSTRUCTION_SET={name}"]
                    self._run([*command, "-c", source, "-o", str(target)])
                    objects.append(str(target))
            self._run([compiler, "-shared", "-pthread", *objects, "-o", str(library)])
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"the kernels of deta.ops were not compiled ({error}); the operator will run on "
                "its plain PyTorch kernel, many times slower. Install g++ (or set CXX) and "
                "install this package again."
            )

    def _run(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        subprocess.run(command, check=True)


setup(
    packages=[*find_namespace_packages(include=["deta*"]), "_deta_ops"],
    package_dir={"_deta_ops": "ops/csrc/package"},
    ext_modules=[Extension("_deta_ops.cpu", ["ops/csrc/ms_deform_attn_cpu.cpp"])],
    cmdclass={"build_ext": BuildKernels},
)
