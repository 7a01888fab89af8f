"""Properties of the kernels' machine code, as the CUDA compiler made it. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "ops/csrc"
ACCESS = r"\bLDG\.E\.128"  # a read of 16 bytes
VECTOR_ADDITION = r"\bREDG\.E\.ADD\.F32x4"  # an atomic addition to four neighbouring floats
SCALAR_ADDITION = r"\bRED(G)?\.E\.ADD\.(F32\.|64)|\bATOM"


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (nvcc := Path(home, "bin/nvcc")).is_file():
            return str(nvcc)
    return shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """Find cuobjdump in the toolkit or in Triton's package."""
    package = importlib.util.find_spec("triton")
    bundled = package and package.submodule_search_locations
    for folder in (
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"),
        Path(bundled[0], "backends/nvidia/bin") if bundled else None,
    ):
        if folder and (folder / "cuobjdump").is_file():
            return str(folder / "cuobjdump")
    return shutil.which("cuobjdump")


def installed_library() -> Path | None:
    """Return the library built with the package, unless its source has changed since."""
    package = importlib.util.find_spec("_deta_ops")
    places = package.submodule_search_locations if package else None
    changed = max(path.stat().st_mtime for path in SOURCES.glob("*cuda*"))
    for place in places or ():
        for library in sorted(Path(place).glob("cuda*.so")):
            if library.stat().st_mtime > changed:
                return library
    return None


class Code:
    """The kernels of a library for sm_90: resources, and instructions in code order."""

    def __init__(self, cuobjdump: str, library: Path) -> None:
        def dump(*options: str) -> str:
            command = [cuobjdump, *options, str(library)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = dump("--dump-resource-usage")
        usage = usage[usage.rindex("sm_90") if "sm_90" in usage else 0 :]
        self.resources = {
            name: {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}
            for name, line in re.findall(r"Function (\S+):\n\s*(.*)", usage)
        }
        parts = re.split(r"Function : (\S+)\n", dump("-sass", "-arch", "sm_90"))
        self.instructions = dict(zip(parts[1::2], parts[2::2], strict=True))

    def kernel(self, kind: str, dtype: str, vector: int, lanes: int, fixed: str = "") -> str:
        """Return the mangled name of a kernel with these template arguments."""
        number = {"half": "6__half", "bfloat16": "13__nv_bfloat16", "float": "f"}[dtype]
        pattern = f"{kind}_kernelI{number}Li{vector}ELi{lanes}E{fixed}E"
        (name,) = (name for name in self.instructions if pattern in name)
        return name

    def count(self, name: str, instruction: str) -> int:
        return len(re.findall(instruction, self.instructions[name]))


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Code:
    cuobjdump, nvcc = find_cuobjdump(), find_nvcc()
    if cuobjdump is None:
        pytest.skip("no cuobjdump, neither from the toolkit nor from Triton")
    library = installed_library()
    if library is None:
        if nvcc is None:
            pytest.skip("no CUDA library was built, and no nvcc is installed")
        library = tmp_path_factory.mktemp("code") / "cuda.cubin"
        command = [nvcc, "-O3", "-std=c++17", "-gencode=arch=compute_90,code=sm_90", "-cubin"]
        command += [str(SOURCES / "ms_deform_attn_cuda.cu"), "-o", str(library)]
        subprocess.run(command, check=True)
    return Code(cuobjdump, library)


HOT = [("half", 8, 4), ("bfloat16", 8, 4), ("float", 4, 8)]  # heads of 32 channels


def test_no_kernel_spills_registers(code: Code):
    assert len(code.resources) >= 20
    for name, used in code.resources.items():
        assert used["STACK"] == 0, f"{name} has a stack frame of {used['STACK']} bytes"
        assert used["LOCAL"] == 0, f"{name} has {used['LOCAL']} bytes of local memory"
    for name in code.instructions:
        assert code.count(name, r"\b(LDL|STL)\b") == 0, f"{name} uses local memory"


@pytest.mark.parametrize(("dtype", "vector", "lanes"), HOT)
def test_values_are_read_16_bytes_at_a_time(code: Code, dtype, vector, lanes):
    for kind, fixed in (("forward", ""), ("backward", "Lb0E")):
        name = code.kernel(kind, dtype, vector, lanes, fixed)
        # Four pixels for each of the samples that are processed together.
        assert code.count(name, ACCESS) >= 4 * lanes


@pytest.mark.parametrize(("dtype", "vector", "lanes"), HOT)
def test_the_value_gradient_is_added_four_numbers_at_a_time(code: Code, dtype, vector, lanes):
    name = code.kernel("backward", dtype, vector, lanes, "Lb0E")
    assert code.count(name, VECTOR_ADDITION) == 4 * lanes * vector // 4
    assert code.count(name, SCALAR_ADDITION) == 0


@pytest.mark.parametrize(("dtype", "vector", "lanes"), HOT)
def test_enough_warps_fit_to_hide_the_memory_latency(code: Code, dtype, vector, lanes):
    """A multiprocessor has 65536 registers, and a block 256 threads."""
    forward = code.resources[code.kernel("forward", dtype, vector, lanes)]
    backward = code.resources[code.kernel("backward", dtype, vector, lanes, "Lb0E")]
    assert forward["REG"] <= 64  # 32 warps
    assert backward["REG"] <= 128  # 16 warps
