"""Builds the compiled kernels: C++ through ninja, against the headers of libtorch's stable ABI.

FASTGATE_BUILD chooses: `auto` (the default) compiles where it can and elsewhere leaves the kernels out with a
notice, so that the ops run in torch; `none` never compiles; `cpu` must compile, or fails with the remedy;
`cuda` is refused, this version having no CUDA sources. One library serves every Python and every torch from
TORCH_TARGET on, so the wheel is `py3-none`.
What was built, and why not more, is left in fastgate/build.json for `python -m fastgate.info`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
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
NINJA_RULES = """
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in $libraries -o $out
"""


class CannotBuild(Exception):
    """Why the compiled kernels cannot be built here."""


def mode(environ: dict[str, str] | os._Environ[str]) -> str:
    """The value of FASTGATE_BUILD, checked."""
    chosen = environ.get("FASTGATE_BUILD", "auto") or "auto"
    if chosen not in MODES:
        raise SystemExit(
            f"FASTGATE_BUILD: got {chosen!r}, wanted one of {', '.join(MODES)}; unset it to use auto"
        )
    if chosen == "cuda":
        raise SystemExit(
            "FASTGATE_BUILD: got 'cuda', wanted auto, none or cpu; this version has no CUDA sources, "
            "on a GPU the ops run in torch: unset FASTGATE_BUILD"
        )
    return chosen


def compiler(environ: dict[str, str] | os._Environ[str]) -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on PATH."""
    system = f"{platform.system()} {platform.machine()}"
    if system != "Linux x86_64":
        raise CannotBuild(f"compiled kernels are built on Linux x86_64 only, this is {system}")
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name, path=environ.get("PATH"))
        if found:
            return found
    raise CannotBuild(f"no C++ compiler found (looked for {', '.join(names)})")


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
    found = shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja is not installed in the build environment")
    return found


def plan(environ: dict[str, str] | os._Environ[str]) -> tuple[bool, str]:
    """(whether to compile, why not); SystemExit with the remedy if FASTGATE_BUILD asks for the impossible."""
    chosen = mode(environ)
    if chosen == "none":
        return False, "built with FASTGATE_BUILD=none"
    try:
        compiler(environ), torch_folder(), ninja()
    except CannotBuild as reason:
        if chosen == "cpu":
            raise SystemExit(refusal(reason)) from None
        return False, str(reason)
    return True, ""


def refusal(reason: object) -> str:
    return (
        f"FASTGATE_BUILD: got 'cpu', wanted a machine that can compile: {reason}; install a C++ compiler "
        "(Debian, Ubuntu: apt-get install g++), or set FASTGATE_BUILD=none to run the ops in torch"
    )


def notice(reason: object) -> None:
    print(
        f"fastgate: the compiled kernels are left out, the ops will run in torch: {reason}", file=sys.stderr
    )


def write_record(folder: Path, built: bool, reason: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"mode": mode(os.environ), "cpu": built, "reason": reason}
    (folder / "build.json").write_text(json.dumps(record) + "\n")


class BuildPy(build_py):
    """Leaves the build record where nothing is compiled."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            editable = getattr(self, "editable_mode", False)
            write_record(ROOT / "fastgate" if editable else Path(self.build_lib) / "fastgate", False, REASON)


class BuildExt(build_ext):
    """Compiles csrc/ with ninja into a library without Python symbols."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        super().run()
        editable = self.inplace or getattr(self, "editable_mode", False)
        write_record(ROOT / "fastgate" if editable else Path(self.build_lib) / "fastgate", *self.outcome)

    outcome = (True, "")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.compile(ext, target)
        except (CannotBuild, subprocess.CalledProcessError) as reason:
            if mode(os.environ) == "cpu":
                raise SystemExit(refusal(reason)) from None
            notice(reason)
            target.unlink(missing_ok=True)
            ext.optional = True  # nothing to copy
            self.outcome = (False, str(reason))

    def compile(self, ext: Extension, target: Path) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch = torch_folder()
        flags = (*COMPILE_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem {torch / 'include'}")
        lines = [
            f"cxx = {compiler(os.environ)}",
            f"flags = {' '.join(flags)} -I {ROOT / 'csrc'} {os.environ.get('CXXFLAGS', '')}",
            f"libraries = -L {torch / 'lib'} -ltorch_cpu",
            NINJA_RULES,
        ]
        objects = []
        for source in ext.sources:
            objects.append(str(Path(source).with_suffix(".o")))
            lines.append(f"build {objects[-1]}: compile {ROOT / source}")
        lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([ninja(), "-C", str(folder)], check=True)


class Wheel(bdist_wheel):
    """Tags the wheel for every Python 3: the library has no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag


COMPILE, REASON = plan(os.environ)
if not COMPILE:
    notice(REASON)

setup(
    ext_modules=[
        Extension(
            "fastgate.libfastgate_cpu",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
        )
    ]
    if COMPILE
    else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": Wheel},
)
