"""The build: modes, remedies, tags, and a package that works with its library and without it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastgate import env, ops
from fastgate.ops import backends

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PACKAGE = backends.PACKAGE
EMPTY_PATH = {**os.environ, "PATH": "/nonexistent"}
EMPTY_PATH.pop("CXX", None)


def setup_py(monkeypatch, environ):
    """setup.py's own names, with setup() not run."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    monkeypatch.setattr(os, "environ", environ)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def python(code, folder, **environ):
    """Standard output of `code` in a fresh interpreter that imports from `folder` first."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), **environ},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_auto_goes_on_and_says_why(monkeypatch, capsys):
    setup = setup_py(monkeypatch, EMPTY_PATH)
    assert set(setup["REASONS"].values()) == {"no C++ compiler found (looked for c++, g++, clang++)"}
    assert "the ops will run in torch: no C++ compiler found" in capsys.readouterr().err


def test_without_a_compiler_cpu_fails_with_the_remedy(monkeypatch):
    with pytest.raises(
        SystemExit, match=r"FASTGATE_BUILD: got .cpu., .* no C\+\+ compiler found .*apt-get install g"
    ):
        setup_py(monkeypatch, {**EMPTY_PATH, "FASTGATE_BUILD": "cpu"})


def test_none_never_compiles(monkeypatch):
    setup = setup_py(monkeypatch, {**os.environ, "FASTGATE_BUILD": "none"})
    assert set(setup["REASONS"].values()) == {"built with FASTGATE_BUILD=none"}


def test_other_modes_are_refused_with_the_choice(monkeypatch):
    with pytest.raises(SystemExit, match=r"FASTGATE_BUILD: got 'gpu', wanted .*auto, none"):
        setup_py(monkeypatch, {**os.environ, "FASTGATE_BUILD": "gpu"})


def test_without_nvcc_cuda_fails_with_the_remedy_and_auto_goes_on(monkeypatch, tmp_path):
    environ = {**os.environ, "CUDA_HOME": str(tmp_path), "FASTGATE_BUILD": "cuda"}
    with pytest.raises(SystemExit, match=r"got 'cuda', .* no nvcc found in .*install the CUDA toolkit"):
        setup_py(monkeypatch, environ)
    setup = setup_py(monkeypatch, {**environ, "FASTGATE_BUILD": "auto"})
    assert setup["REASONS"]["cpu"] == "" and "no nvcc found" in setup["REASONS"]["cuda"]


@pytest.mark.parametrize("torch_cuda", ["None", "'13.0'"])
def test_auto_compiles_cuda_where_it_is_meant(monkeypatch, tmp_path, torch_cuda):
    """Beside a CUDA build of torch, or where CUDA_HOME is set; never because nvcc happens to be on PATH."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    nvcc.chmod(0o755)
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {torch_cuda}\ncuda_old = '1'\n")
    names = ("FASTGATE_BUILD", "CUDA_HOME")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    environ["PATH"] = f"{nvcc.parent}:{environ['PATH']}"
    setup = setup_py(monkeypatch, environ)
    setup["plan"].__globals__["torch_folder"] = lambda: tmp_path
    meant = torch_cuda != "None"
    assert (setup["plan"](environ)["cuda"] == "") == meant
    assert setup["plan"]({**environ, "CUDA_HOME": str(tmp_path)})["cuda"] == ""
    assert setup["plan"]({**environ, "FASTGATE_BUILD": "cuda"})["cuda"] == ""
    assert "FASTGATE_BUILD=cpu" in setup["plan"]({**environ, "FASTGATE_BUILD": "cpu"})["cuda"]


@pytest.mark.parametrize("library", ["cpu", "cuda"])
def test_every_source_is_compiled(monkeypatch, library):
    """Also those in folders of csrc/cpu/ and csrc/cuda/."""
    sources = setup_py(monkeypatch, dict(os.environ))["extension"](library).sources
    paths = [path for path in (ROOT / "csrc" / library).rglob("*") if path.suffix in (".cpp", ".cu")]
    assert sorted(sources) == sorted(path.relative_to(ROOT).as_posix() for path in paths)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_two_sources_of_one_name_are_two_objects(monkeypatch, tmp_path):
    from setuptools import Distribution

    setup = setup_py(monkeypatch, {**os.environ, "FASTGATE_BUILD": "cpu"})
    sources = ["csrc/cpu/linear.cpp", "csrc/cpu/gemm/linear.cpp"]
    command = setup["BuildExt"](Distribution({"name": "fastgate"}))
    command.build_temp = str(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **keywords: None)
    command.compile(setup["Extension"]("fastgate.libfastgate_cpu", sources), "cpu", tmp_path / "library.so")
    rules = (tmp_path / "cpu" / "build.ninja").read_text().splitlines()
    objects = [rule.split()[1] for rule in rules if rule.startswith("build") and ": compile" in rule]
    assert len(set(objects)) == len(sources)


@pytest.mark.parametrize("system", [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64")])
def test_other_platforms_get_the_torch_kernels(monkeypatch, system):
    import platform

    monkeypatch.setattr(platform, "system", lambda: system[0])
    monkeypatch.setattr(platform, "machine", lambda: system[1])
    environ = {name: value for name, value in os.environ.items() if name != "FASTGATE_BUILD"}
    setup = setup_py(monkeypatch, environ)
    assert all(" ".join(system) in reason for reason in setup["REASONS"].values())


def test_wheel_without_library_serves_everything(tmp_path):
    """A real wheel, FASTGATE_BUILD=none: its tag, what is in it, and that its ops run."""
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")]
    source = tmp_path / "source"
    kept = (
        "fastgate",
        "kernels",
        "csrc",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
    )
    for name in kept:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run(
        command, cwd=source, check=True, env={**os.environ, "FASTGATE_BUILD": "none"}, capture_output=True
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "fastgate/build.json" in names and "fastgate/kernels/README.md" in names
    assert not [
        name for name in names if name.endswith(".so") or name.startswith(("tests/", "bench/", "kernels/"))
    ]
    code = (
        "import torch, json; from fastgate import env, ops\n"
        "from fastgate.ops.gated_add_norm import gated_add_norm\n"
        "y = gated_add_norm(torch.randn(2, 8), torch.randn(2, 8), torch.ones(8), torch.zeros(8), 1e-5)\n"
        "assert abs(float(y.mean())) < 1e-6\n"
        "assert not [i for i in ops.IMPLEMENTATIONS.values() if i.backend == 'cpp']\n"
        "print(json.dumps(env.collect()['ops']))"
    )
    candidates = json.loads(python(code, tmp_path / "installed"))
    compiled = [candidate for candidate in candidates if candidate["backend"] == "cpp"]
    assert {candidate["op"] for candidate in compiled} == {*backends.CPU_OPS, "linear"}
    for candidate in compiled:
        assert not candidate["chosen"]
        assert candidate["reason"] == "not built: built with FASTGATE_BUILD=none"


@pytest.mark.skipif(backends.load_cpu_library() != "", reason="the compiled library is not built")
def test_library_has_no_python_symbol_and_is_tagged_for_every_python(monkeypatch):
    from setuptools import Distribution

    library = backends.CPU_LIBRARY.read_bytes()
    assert b"PyInit" not in library and b"_Py_" not in library and b"libtorch_python" not in library
    assert b"libtorch_cpu.so" in library  # torch's own are loaded locally: what is needed must be named
    setup = setup_py(monkeypatch, dict(os.environ))
    extension = [setup["Extension"]("fastgate.libfastgate_cpu", ["csrc/cpu/library.cpp"])]
    command = setup["Wheel"](Distribution({"name": "fastgate", "ext_modules": extension}))
    command.finalize_options()
    assert command.get_tag()[:2] == ("py3", "none")


def test_what_was_built_is_what_runs():
    """A build that says it has the library must load it: no silent fall back to torch."""
    record = backends.build_record()
    if record is None or not record["cpu"]:
        assert backends.load_cpu_library()
        return
    assert backends.load_cpu_library() == ""
    assert all(ops.implementation(op, "cpu", torch.float32).backend == "cpp" for op in backends.CPU_OPS)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "CPU_LIBRARY", tmp_path / "libfastgate_cpu.so")
    monkeypatch.setattr(backends, "BUILD_RECORD", tmp_path / "build.json")
    reason = backends.load_cpu_library.__wrapped__
    assert "source folder that was not built" in reason()
    (tmp_path / "build.json").write_text('{"mode": "auto", "cpu": false, "reason": "no C++ compiler found"}')
    assert reason() == "not built: no C++ compiler found"
    (tmp_path / "libfastgate_cpu.so").write_bytes(b"not a library")
    assert "does not load under torch" in reason()


@pytest.mark.skipif(backends.load_cpu_library() != "", reason="the compiled library is not built")
def test_a_library_without_an_op_is_built_again():
    wanted = (*backends.CPU_OPS, "later")
    reason = backends._load(backends.CPU_LIBRARY, "reason", "fastgate_cpu", wanted)
    assert reason == "libfastgate_cpu.so was built before later was there: build again"


def test_info_says_what_runs_and_why():
    report = env.collect()
    json.dumps(report)
    assert {op["op"] for op in report["ops"]} == {"linear", *ops.OPS}
    for op in ("linear", *ops.OPS):
        assert any(candidate["chosen"] for candidate in report["ops"] if candidate["op"] == op)
    text = " ".join(env.render(report).split())  # long lines are wrapped
    assert torch.__version__.split("+")[0] in text
    for candidate in report["ops"]:
        assert f"{candidate['op']} on {candidate['device']}: {candidate['backend']}" in text
        assert candidate["reason"] in text
