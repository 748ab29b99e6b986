"""The build: a wheel that works elsewhere, and what happens where tools are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from rlkern import _native

ROOT = Path(__file__).resolve().parents[2]
PURELIB = sysconfig.get_paths()["purelib"]

USE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rlkern
import torch
leaf = torch.randn(4, 5000, requires_grad=True)
ids = torch.randint(5000, (4,))
out = rlkern.token_logprobs(leaf * 1, ids, return_entropy=True, inplace_backward=True)
(out.logprobs + out.entropy).sum().backward()
exact = leaf.detach().double().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
print(json.dumps({
    "error": (out.logprobs - exact).abs().max().item(),
    "gradient": leaf.grad.abs().sum().item(),
    "warnings": [str(w.message) for w in caught if "rlkern" in str(w.message)],
    "file": rlkern.__file__,
}))
"""


def command(*args, env=None, cwd=None, fails=False):
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, env=env, cwd=cwd)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr if fails else done.stdout


def environment(**changes):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RLKERN_", "CUDA_", "PYTHON"))}
    # The build's tools lie beside this Python.
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env.update(changes)
    return env


def test_a_library_that_was_built_and_is_gone_is_not_called_built(tmp_path, monkeypatch):
    (tmp_path / "_build_info.json").write_text('{"cpu": "built", "cuda": "built"}')
    monkeypatch.setattr(_native, "FOLDER", tmp_path)
    monkeypatch.setattr(_native, "problems", {})
    monkeypatch.delenv("RLKERN_STRICT", raising=False)
    with pytest.warns(
        RuntimeWarning, match=r"no compiled CPU kernels \(built, but the file is gone"
    ):
        _native.load()


@pytest.fixture
def cuda_torch(monkeypatch):
    """This torch as one with CUDA: load() again, with a CUDA library of another path."""
    if not (_native.FOLDER / _native.FILES["cpu"]).exists():
        pytest.skip("the CPU library is not built here")
    monkeypatch.delenv("RLKERN_STRICT", raising=False)
    monkeypatch.setattr(_native, "problems", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def prepare(library, gpus):
        monkeypatch.setitem(_native.FILES, "cuda", str(library))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return prepare


def loaded():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _native.load()
    return [str(w.message) for w in caught]


def test_a_missing_cuda_library_is_said_once_where_there_is_a_gpu(cuda_torch, monkeypatch):
    cuda_torch("_C_absent.so", gpus=1)
    monkeypatch.setitem(sys.modules, "triton", None)
    (warning,) = loaded()
    assert "no compiled CUDA kernels" in warning and "triton is not installed" in warning
    cuda_torch("_C_absent.so", gpus=0)
    assert loaded() == []


def test_a_cuda_library_that_does_not_load_is_said(cuda_torch, tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    cuda_torch(tmp_path / "broken.so", gpus=0)
    (warning,) = loaded()
    assert "no compiled CUDA kernels (failed to load" in warning


@pytest.mark.parametrize("gpus", [0, 1])
def test_strict_wants_the_cuda_library_of_a_torch_with_cuda(cuda_torch, monkeypatch, gpus):
    cuda_torch("_C_absent.so", gpus)
    monkeypatch.setenv("RLKERN_STRICT", "1")
    with pytest.raises(ImportError, match="no compiled CUDA kernels.*RLKERN_STRICT=1"):
        _native.load()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert loaded() == []


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tracked files alone, as a clone has them."""
    folder = tmp_path_factory.mktemp("source") / "rlkern"
    tracked = command("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(source, out, fails=False, **changes):
    return command(
        sys.executable, "setup.py", "-q", "build", "--build-base", out / "temp", "--build-lib",
        out / "lib", cwd=source, env=environment(**changes), fails=fails,
    )  # fmt: skip


def use(lib, cwd, code=USE, fails=False, **changes):
    env = environment(PYTHONPATH=str(lib), **changes)
    return command(sys.executable, "-c", code, env=env, cwd=cwd, fails=fails)


def without_compilers(tmp_path):
    """A PATH with nothing but this Python's tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cmake", "ninja", "python"):
        os.symlink(shutil.which(tool, path=f"{Path(sys.executable).parent}"), folder / tool)
    return str(folder)


def test_a_wheel_serves_a_fresh_environment(source, tmp_path):
    command(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w",
        tmp_path, cwd=source, env=environment(RLKERN_BUILD_CUDA="0", RLKERN_STRICT="1"),
    )  # fmt: skip
    (wheel,) = tmp_path.glob("rlkern-*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("_C.abi3.so", "_build_info.json", "py.typed", "ops/token_logprobs.py"):
        assert f"rlkern/{expected}" in names
    assert "rlkern_loops/grpo.py" in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "csrc"))]

    fresh = tmp_path / "fresh"
    command(sys.executable, "-m", "venv", "--without-pip", fresh)
    python = fresh / "bin" / "python"
    command(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    # torch and what it needs come from this environment by path; its rlkern does not, since the
    # finder of an editable install is not started by a path line.
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(PURELIB + "\n")
    result = json.loads(command(python, "-c", USE, env=environment(), cwd=tmp_path))
    assert result["file"].startswith(str(fresh))
    assert result["error"] < 1e-5 and result["gradient"] > 0 and result["warnings"] == []
    info = json.loads(
        command(python, "-m", "rlkern.info", "--json", env=environment(), cwd=tmp_path)
    )
    assert info["libraries"]["_C.abi3.so"] == "loaded"
    assert info["operators"]["token_logprobs"]["cpu"]["serves"] == "native"
    assert "RLKERN_BUILD_CUDA=0" in info["build"]["cuda"]


def test_a_source_distribution_holds_what_the_build_reads(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "clone")
    command(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=copy, env=environment())
    (archive,) = tmp_path.glob("rlkern-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[-1] for name in packed.getnames()}
    needed = {str(p.relative_to(source)) for p in source.glob("csrc/**/*") if p.is_file()}
    assert needed and not needed - names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_library_keeps_to_the_stable_abi():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    library = _native.FOLDER / _native.FILES["cpu"]
    if not library.exists():
        pytest.skip("the CPU library is not built here")
    symbols = command("nm", "-D", "--undefined-only", "-C", library)
    assert "aoti_torch" in symbols or "torch_" in symbols
    assert not [s for s in symbols.splitlines() if "at::" in s or "c10::" in s or " Py" in s]
    exported = command("nm", "-D", "--defined-only", "-C", library)
    mine = [s.split()[-1] for s in exported.splitlines() if "rlkern" in s and " T " in s]
    assert sorted(mine) == ["rlkern_cpu_isa", "rlkern_cpu_supports"]


def test_leaf_files_export_no_weak_symbols(source, tmp_path):
    """A weak symbol would be merged across instruction sets, and the wrong copy might run."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    for leaf in sorted((source / "csrc/cpu/kernels").glob("*.cpp")):
        for optimisation in ("-O0", "-O3"):
            command(
                compiler, "-std=c++17", optimisation, "-w", "-fno-exceptions",
                "-DRLKERN_ISA=portable", "-DRLKERN_VECTOR_BYTES=16", "-c", leaf,
                "-o", tmp_path / "leaf.o",
            )  # fmt: skip
            symbols = command("nm", "-C", tmp_path / "leaf.o").splitlines()
            assert not [s for s in symbols if s.split()[-2:-1] and s.split()[1:2] in (["W"], ["V"])]


def test_without_a_compiler_everything_computes_in_eager(source, tmp_path):
    bare = without_compilers(tmp_path)
    said = command(
        sys.executable, "setup.py", "build", "--build-base", tmp_path / "temp", "--build-lib",
        tmp_path / "lib", cwd=source, env=environment() | {"PATH": bare},
    )  # fmt: skip
    assert said is not None
    result = json.loads(use(tmp_path / "lib", tmp_path))
    assert result["error"] < 1e-5 and result["gradient"] > 0
    (warning,) = result["warnings"]
    assert "no C++ compiler was found" in warning and "eager" in warning
    info = json.loads(use(tmp_path / "lib", tmp_path, INFO))
    served = info["operators"]["token_logprobs"]["cpu"]
    assert served["serves"] == "eager" and "no C++ compiler" in served["not"]["native"]
    error = use(tmp_path / "lib", tmp_path, fails=True, RLKERN_STRICT="1")
    assert "ImportError" in error and "no C++ compiler" in error


INFO = "import sys, rlkern.info; sys.argv = ['info', '--json']; rlkern.info.main()"


def test_strict_builds_raise_what_else_is_a_warning(source, tmp_path):
    env = environment(RLKERN_STRICT="1") | {"PATH": without_compilers(tmp_path)}
    error = command(
        sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "temp",
        "--build-lib", tmp_path / "lib", cwd=source, env=env, fails=True,
    )  # fmt: skip
    assert "RLKERN_STRICT=1: no C++ compiler was found" in error


def test_a_compiler_that_fails_leaves_a_package_that_computes(source, tmp_path):
    build(source, tmp_path, CXX="false", RLKERN_BUILD_CUDA="0")
    result = json.loads(use(tmp_path / "lib", tmp_path))
    assert result["error"] < 1e-5 and "_C failed to build" in result["warnings"][0]


def test_asking_for_cuda_without_nvcc_fails_loudly(source, tmp_path):
    env = environment(RLKERN_BUILD_CUDA="1") | {"PATH": without_compilers(tmp_path)}
    error = command(sys.executable, "setup.py", "-q", "build", cwd=source, env=env, fails=True)
    assert "RLKERN_BUILD_CUDA=1, but nvcc" in error
    error = build(source, tmp_path, fails=True, RLKERN_BUILD_CUDA="yes")
    assert "RLKERN_BUILD_CUDA: expected auto, 0 or 1, got 'yes'" in error


@pytest.mark.parametrize("mode", ["auto", "0"])
def test_a_missing_nvcc_is_said_where_cuda_was_not_turned_off(source, tmp_path, mode):
    """`false` for a compiler: the CPU library has failed by the time that nvcc is looked for."""
    changes = {"CXX": shutil.which("false"), "RLKERN_BUILD_CUDA": mode}
    env = environment(**changes) | {"PATH": without_compilers(tmp_path)}
    arguments = (
        sys.executable, "-W", "always", "setup.py", "-q", "build", "--build-base",
        tmp_path / "temp", "--build-lib", tmp_path / "lib",
    )  # fmt: skip
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, cwd=source,
                          env=env)  # fmt: skip
    said = " ".join(done.stderr.split())
    wanted = 1 if mode == "auto" else 0
    assert done.returncode == 0
    assert said.count("no nvcc: ") == said.count("Triton or eager PyTorch serve GPUs") == wanted
    error = command(*arguments, cwd=source, env=env | {"RLKERN_STRICT": "1"}, fails=True)
    assert "RLKERN_STRICT=1: _C failed to build" in error
    assert error.count("no nvcc: ") == wanted


def test_no_libraries_and_a_cuda_library_is_a_contradiction(source, tmp_path):
    error = build(source, tmp_path, fails=True, RLKERN_SKIP_EXT="1", RLKERN_BUILD_CUDA="1")
    assert "RLKERN_BUILD_CUDA=1" in error and "RLKERN_SKIP_EXT" in error and "got both" in error


def test_skipping_the_extensions(source, tmp_path):
    build(source, tmp_path, RLKERN_SKIP_EXT="1")
    assert not list((tmp_path / "lib").glob("rlkern/*.so"))
    assert "RLKERN_SKIP_EXT" in json.loads(use(tmp_path / "lib", tmp_path))["warnings"][0]


def test_without_triton_everything_works(source, tmp_path):
    build(source, tmp_path, RLKERN_SKIP_EXT="1")
    hidden = "import sys; sys.modules['triton'] = None\n"
    assert json.loads(use(tmp_path / "lib", tmp_path, hidden + USE))["error"] < 1e-5
    info = json.loads(use(tmp_path / "lib", tmp_path, hidden + INFO))
    assert info["operators"]["token_logprobs"]["cpu"]["not"]["triton"] == "triton is not installed"


def test_info_prints_for_people_and_for_machines():
    text = command(sys.executable, "-m", "rlkern.info", env=environment())
    assert "token_logprobs on cpu: " in text and "cpu_instruction_set: " in text
    info = json.loads(command(sys.executable, "-m", "rlkern.info", "--json", env=environment()))
    assert info["versions"]["torch"] == torch.__version__
    assert info["cpu_instruction_set"] in (*info["cpu_instruction_sets_here"], "none")
    assert "rlkern" in info["versions"] and info["build"]["compiler"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["."], ["--no-build-isolation", "-e", "."]])
def test_pip_install_of_a_clone(source, tmp_path, options):
    fresh = tmp_path / "fresh"
    command(sys.executable, "-m", "venv", fresh)
    python = fresh / "bin" / "python"
    torch_version = f"torch=={torch.__version__.split('+')[0]}"
    tools = [torch_version, "setuptools>=77", "wheel", "cmake", "ninja"]
    command(python, "-m", "pip", "install", "-q", *(tools if "-e" in options else [torch_version]))
    env = environment(RLKERN_STRICT="1", RLKERN_BUILD_CUDA="0")
    env["PATH"] = f"{fresh / 'bin'}:{os.environ['PATH']}"
    copy = shutil.copytree(source, tmp_path / "clone")
    command(python, "-m", "pip", "install", "-q", *options, cwd=copy, env=env)
    result = json.loads(command(python, "-c", USE, env=environment(), cwd=tmp_path))
    assert result["error"] < 1e-5 and result["warnings"] == []
    assert result["file"].startswith(str(copy if "-e" in options else fresh))
