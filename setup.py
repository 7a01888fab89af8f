"""Compile the kernels of the operator; everything else is in pyproject.toml.

This needs no PyTorch: the kernels are plain C functions, so one wheel serves every version of
PyTorch and Python. The CPU kernels need a C++ compiler; the CUDA kernels need nvcc but no GPU.
Kernels that cannot be compiled are omitted with a warning, which names the fallback.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fopenmp-simd", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
# The base version is linked first: if all versions contain a library function, the linker takes the
# first one, which must run on every processor.
INSTRUCTION_SETS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    INSTRUCTION_SETS["avx512"] += ["-mprefer-vector-width=512"]

# A100, H100 and H200, and PTX that the driver compiles for later devices.
CUDA_FLAGS = ["-O3", "-std=c++17", "--threads", "2", "-shared", "-cudart", "static"]
CUDA_FLAGS += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
CUDA_FLAGS += ["-gencode=arch=compute_90,code=compute_90"]
CUDA_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """Return nvcc from CUDA_HOME, else from the default folder, else from the PATH."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


class BuildKernels(build_ext):
    """Builds `cpu.so`, with its source compiled once per instruction set, and `cuda.so`."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # independent of Python's version

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        if extension.name.endswith(".cuda"):
            nvcc = find_nvcc()
            if nvcc is None:
                self.announce(
                    "nvcc not found (set CUDA_HOME): CUDA kernels are not compiled", level=2
                )
                return
            self._try(
                lambda: self._run([nvcc, *CUDA_FLAGS, *extension.sources, "-o", str(library)]),
                "the CUDA kernels",
                "Triton's kernels",
            )
        else:
            self._try(
                lambda: self._build_cpu(extension.sources, library),
                "the CPU kernels",
                "plain PyTorch, many times slower; install g++ or set CXX",
            )

    def _build_cpu(self, sources: list[str], library: Path) -> None:
        compiler = os.environ.get("CXX", "g++")
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        commands, objects = [], []
        for source in sources:
            for name, flags in INSTRUCTION_SETS.items():
                target = str(folder / f"{Path(source).stem}-{name}.o")
                commands.append([compiler, *FLAGS, *flags, f"-DINSTRUCTION_SET={name}"])
                commands[-1] += ["-c", source, "-o", target]
                objects.append(target)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, commands))
        self._run([compiler, "-shared", "-pthread", *objects, "-o", str(library)])

    def _try(self, build, what: str, instead: str) -> None:
        try:
            build()
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"{what} of deta.ops were not compiled ({error}); the operator will run on "
                f"{instead}. `python -m deta.ops` shows which kernels are built."
            )

    def _run(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        subprocess.run(command, check=True)


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


CPU_SOURCES = ["ops/csrc/ms_deform_attn_cpu.cpp"]
CUDA_SOURCES = ["ops/csrc/ms_deform_attn_cuda.cu"]
HEADERS = [str(path) for path in Path("ops/csrc").glob("*.h")]
CUDA_HEADERS = [str(path) for path in Path("ops/csrc").glob("*.cuh")]

setup(
    packages=[*find_namespace_packages(include=["deta*"]), "_deta_ops"],
    package_dir={"_deta_ops": "ops/csrc/package"},
    ext_modules=[
        Extension("_deta_ops.cpu", CPU_SOURCES, depends=HEADERS),
        Extension("_deta_ops.cuda", CUDA_SOURCES, depends=CUDA_HEADERS),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
