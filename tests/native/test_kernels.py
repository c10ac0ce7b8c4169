"""The kernels as C++ programs (`*.cpp` here): every instruction set, also those that this processor lacks, against
scalar oracles; under the sanitizers; and without warnings on GCC and Clang. Each builds what it needs: minutes, so the
quick suite only asks whether a compiler accepts the programs."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "backends" / "cpu" / "native"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
FLAGS = {  # of each instruction set's file, as in CMakeLists.txt
    "avx512": [*AVX2, *AVX512],
    "avx512_bf16": [*AVX2, *AVX512, "-mavx512bf16"],
    "avx2": AVX2,
    "neon": ["-march=armv8.2-a+dotprod"],
    "portable": [],
}
EMULATED = [*AVX2, "-include", str(HERE / "emulate_avx512.h"), "-w", "-fno-tree-sra"]  # GCC 12 breaks down in that
X86 = platform.machine() in ("x86_64", "AMD64")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def here() -> list[str]:
    """The instruction sets that this processor runs without emulation (of those that differ)."""
    if not X86:
        return ["neon", "portable"]
    return ["avx2", "portable"] if "avx2" in Path("/proc/cpuinfo").read_text() else ["portable"]


def build(
    folder: Path, variants: list[str], compiler: str = "c++", flags: list[str] | None = None, **own: list[str]
) -> Path:
    """The checking program with these variants; `own`: flags of a variant's file, instead of the usual ones."""
    defines = [f"-DONDEVICE_{v.upper()}" for v in variants if v != "portable"]
    common = ["-std=c++17", "-O2", "-g", "-Wall", "-Wextra", f"-I{NATIVE}", *defines, *(flags or [])]
    sources = [(NATIVE / f"{name}.cpp", []) for name in ("pool", "stack", "dispatch", "pack", "common")]
    sources += [(source, []) for source in sorted(HERE.glob("*.cpp"))]
    sources += [(NATIVE / f"variant_{v}.cpp", own.get(v, FLAGS[v])) for v in variants]

    def compiled(source: tuple[Path, list[str]]) -> str:
        target = str(folder / f"{source[0].stem}.o")
        run([compiler, *common, *source[1], "-c", str(source[0]), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "check"
    run([compiler, *(flags or []), *objects, "-o", str(program), "-pthread"])
    return program


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert "warning:" not in done.stderr, done.stderr[-8000:]
    return done.stdout


def test_a_compiler_accepts_the_programs() -> None:
    needs("c++")
    programs = map(str, sorted(HERE.glob("*.cpp")))
    run(["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", f"-I{NATIVE}", *programs])


@pytest.mark.slow
def test_kernels_of_this_processor(tmp_path: Path) -> None:
    needs("c++")
    run([str(build(tmp_path, here()))])


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="emulated on x86-64")
@pytest.mark.parametrize("variant", ["avx512", "avx512_bf16"])
def test_avx512_emulated(tmp_path: Path, variant: str) -> None:
    needs("c++")
    if not Path("/usr/include/simde").is_dir():
        pytest.skip("libsimde-dev is not installed")
    flags = [*EMULATED, "-DONDEVICE_PAIRS"] if variant == "avx512_bf16" else EMULATED
    run([str(build(tmp_path, [variant, "portable"], **{variant: flags})), variant])


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="emulated on x86-64")
def test_neon_emulated(tmp_path: Path) -> None:
    needs(ARM_COMPILER, ARM_EMULATOR)
    run([ARM_EMULATOR, str(build(tmp_path, ["neon", "portable"], ARM_COMPILER, ["-static"])), "neon"])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path: Path, sanitizers: str) -> None:
    needs("c++")
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1"]
    run([str(build(tmp_path, here(), flags=flags)), here()[0]])


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("variant", ["avx512", "avx512_bf16", "avx2", "portable"] if X86 else ["neon", "portable"])
def test_no_compiler_warns(tmp_path: Path, compiler: str, variant: str) -> None:
    needs(compiler)
    flags = [*FLAGS[variant], *(["-Wno-uninitialized", "-Wno-maybe-uninitialized"] if compiler == "g++" else [])]
    run([compiler, "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", *flags, f"-I{NATIVE}", "-c",
         str(NATIVE / f"variant_{variant}.cpp"), "-o", str(tmp_path / "variant.o")])  # fmt: skip
