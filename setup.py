"""Builds the compiled kernels: C++ and CUDA through ninja, against the headers of libtorch's stable ABI.

FASTGATE_BUILD chooses: `auto` (the default) compiles where it can and elsewhere leaves the kernels out with a
notice, so that the ops run in torch; `none` never compiles; `cpu` must compile the CPU kernels, or fails with
the remedy; `cuda` must compile both. One library serves every Python and every torch from TORCH_TARGET on, so
the wheel is `py3-none`.

nvcc takes a minute, so `auto` compiles CUDA only where it is meant: nvcc is found, and CUDA_HOME is set or
the torch of the build environment is a CUDA build. Elsewhere Triton has the same ops for the GPU.
What was built, and why not more, is left in fastgate/build.json for `python -m fastgate.env`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "none", "cpu", "cuda")
TORCH_TARGET = "0x020b000000000000"  # torch 2.11
COMPILE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra")
# A100, H100 and H200, B200; the last one's PTX serves what comes after it.
CUDA_TARGETS = (("80", "sm_80"), ("90", "sm_90"), ("100", "sm_100"), ("100", "compute_100"))
CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "--threads=0",  # the targets side by side, on as many cores as there are
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    *(f"-gencode=arch=compute_{number},code={code}" for number, code in CUDA_TARGETS),
)
NINJA_RULES = """
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule compile_cuda
  command = $nvcc -ccbin $cxx $cuda_flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in $libraries -o $out
rule link_cuda
  command = $nvcc -ccbin $cxx -shared -cudart static $in $libraries -o $out
"""
Environ = "dict[str, str] | os._Environ[str]"


class CannotBuild(Exception):
    """Why the compiled kernels cannot be built here."""


def mode(environ: Environ) -> str:
    """The value of FASTGATE_BUILD, checked."""
    chosen = environ.get("FASTGATE_BUILD", "auto") or "auto"
    if chosen not in MODES:
        raise SystemExit(
            f"FASTGATE_BUILD: got {chosen!r}, wanted one of {', '.join(MODES)}; unset it to use auto"
        )
    return chosen


def compiler(environ: Environ) -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on PATH."""
    system = f"{platform.system()} {platform.machine()}"
    if system != "Linux x86_64":
        raise CannotBuild(f"compiled kernels are built on Linux x86_64 only, this is {system}")
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        path = shutil.which(name, path=environ.get("PATH"))
        if path:
            return path
    raise CannotBuild(f"no C++ compiler found (looked for {', '.join(names)})")


def nvcc(environ: Environ) -> str:
    """CUDA's compiler: $CUDA_HOME/bin/nvcc, or nvcc on PATH."""
    home = environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=str(Path(home) / "bin") if home else environ.get("PATH"))
    if path is None:
        raise CannotBuild(f"no nvcc found in {home + '/bin' if home else 'PATH'}")
    return path


def cuda_is_meant(environ: Environ) -> bool:
    """Whether `auto` compiles CUDA: CUDA_HOME is set, or the build environment's torch is a CUDA build."""
    version = torch_folder() / "version.py"
    text = version.read_text() if version.exists() else ""
    return bool(environ.get("CUDA_HOME") or re.search(r"^cuda\b[^=\n]*= *['\"]", text, re.MULTILINE))


def torch_folder() -> Path:
    """Where torch's include/ and lib/ are; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild("torch is not installed in the build environment")
    return Path(spec.submodule_search_locations[0])


def ninja() -> str:
    """The ninja executable, from the ninja package or from PATH."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja as package

        bundled = Path(package.BIN_DIR) / "ninja"
        if bundled.exists():
            return str(bundled)
    path = shutil.which("ninja")
    if path is None:
        raise CannotBuild("ninja is not installed in the build environment")
    return path


def plan(environ: Environ) -> dict[str, str]:
    """Library (cpu, cuda) -> why it is not compiled, empty if it is; SystemExit with the remedy if
    FASTGATE_BUILD asks for the impossible."""
    chosen = mode(environ)
    if chosen == "none":
        return dict.fromkeys(("cpu", "cuda"), "built with FASTGATE_BUILD=none")
    try:
        compiler(environ), torch_folder(), ninja()
    except CannotBuild as reason:
        if chosen != "auto":
            raise SystemExit(refusal("cpu", reason)) from None
        return dict.fromkeys(("cpu", "cuda"), str(reason))
    if chosen == "cpu":
        return {"cpu": "", "cuda": "built with FASTGATE_BUILD=cpu"}
    try:
        nvcc(environ)
    except CannotBuild as reason:
        if chosen == "cuda":
            raise SystemExit(refusal("cuda", reason)) from None
        return {"cpu": "", "cuda": str(reason)}
    meant = chosen == "cuda" or cuda_is_meant(environ)
    return {"cpu": "", "cuda": "" if meant else "built with a CPU torch: set FASTGATE_BUILD=cuda to have it"}


def refusal(library: str, reason: object) -> str:
    remedy = {
        "cpu": "install a C++ compiler (Debian, Ubuntu: apt-get install g++), or set FASTGATE_BUILD=none to "
        "run the ops in torch",
        "cuda": "install the CUDA toolkit, 12.8 or newer, and set CUDA_HOME to its folder, or unset "
        "FASTGATE_BUILD to run Triton's kernels on the GPU",
    }[library]
    return f"FASTGATE_BUILD: got {mode(os.environ)!r}, wanted a machine that can compile: {reason}; {remedy}"


def notice(library: str, reason: object) -> None:
    kernels, instead = {"cpu": ("compiled", ", the ops will run in torch"), "cuda": ("CUDA", "")}[library]
    print(f"fastgate: the {kernels} kernels are left out{instead}: {reason}", file=sys.stderr)


def write_record(folder: Path, reasons: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "mode": mode(os.environ),
        "cpu": not reasons["cpu"],
        "reason": reasons["cpu"],
        "cuda": not reasons["cuda"],
        "cuda_reason": reasons["cuda"],
    }
    (folder / "build.json").write_text(json.dumps(record) + "\n")


class BuildPy(build_py):
    """Leaves the build record where nothing is compiled."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            editable = getattr(self, "editable_mode", False)
            write_record(ROOT / "fastgate" if editable else Path(self.build_lib) / "fastgate", REASONS)


class BuildExt(build_ext):
    """Compiles csrc/ with ninja into libraries without Python symbols."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        self.reasons = dict(REASONS)
        super().run()
        editable = self.inplace or getattr(self, "editable_mode", False)
        write_record(ROOT / "fastgate" if editable else Path(self.build_lib) / "fastgate", self.reasons)

    def build_extension(self, ext: Extension) -> None:
        library = ext.name.rpartition("_")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.compile(ext, library, target)
        except (CannotBuild, subprocess.CalledProcessError) as reason:
            if mode(os.environ) != "auto":
                raise SystemExit(refusal(library, reason)) from None
            notice(library, reason)
            target.unlink(missing_ok=True)
            ext.optional = True  # nothing to copy
            self.reasons[library] = str(reason)

    def compile(self, ext: Extension, library: str, target: Path) -> None:
        folder = Path(self.build_temp).resolve() / library
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch = torch_folder()
        flags = (*COMPILE_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem {torch / 'include'}")
        lines = [
            f"cxx = {compiler(os.environ)}",
            f"flags = {' '.join(flags)} -I {ROOT / 'csrc'} {os.environ.get('CXXFLAGS', '')}",
            f"libraries = -L {torch / 'lib'} -ltorch_cpu {os.environ.get('LDFLAGS', '')}",
        ]
        if library == "cuda":
            lines += [f"nvcc = {nvcc(os.environ)}", f"cuda_flags = {' '.join(CUDA_FLAGS)} -I {ROOT / 'csrc'}"]
        lines.append(NINJA_RULES)
        objects = []
        for source in ext.sources:
            rule = "compile_cuda" if source.endswith(".cu") else "compile"
            objects.append(f"{source}.o")  # with its folders: two files of one name are two objects
            lines.append(f"build {objects[-1]}: {rule} {ROOT / source}")
        link = "link_cuda" if library == "cuda" else "link"
        lines.append(f"build {target}: {link} {' '.join(objects)}\ndefault {target}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([ninja(), "-C", str(folder)], check=True)


class Wheel(bdist_wheel):
    """Tags the wheel for every Python 3: the libraries have no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag


def extension(library: str) -> Extension:
    """The library of every source in csrc/<library>/ and the folders in it."""
    folder = ROOT / "csrc" / library
    paths = [path for suffix in ("*.cpp", "*.cu") for path in folder.rglob(suffix)]
    sources = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return Extension(f"fastgate.libfastgate_{library}", sources=sources)


REASONS = plan(os.environ)
if REASONS["cpu"]:
    notice("cpu", REASONS["cpu"])

setup(
    ext_modules=[extension(library) for library, reason in REASONS.items() if not reason],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": Wheel},
)
