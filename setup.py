"""Builds rlkern: CMake and Ninja compile the libraries, setuptools packs them.

Environment: MAX_JOBS, NVCC_THREADS, TORCH_CUDA_ARCH_LIST, CMAKE_ARGS, CXX as users know them;
RLKERN_BUILD_CUDA=auto|0|1, RLKERN_SKIP_EXT=1 (no libraries at all), RLKERN_STRICT=1 (what cannot
be built is an error), RLKERN_SANITIZE=1 (the CPU library under the sanitizers).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0f;8.0+PTX"


def load_environment():
    """rlkern/_env.py by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("_rlkern_env", ROOT / "rlkern" / "_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


flag = load_environment().flag


def torch_root() -> Path | None:
    """The torch package to build against; its headers are read, it is not imported.

    Inside pip's build isolation torch is not importable, but it lies in the environment that the
    package is being installed into, and the stable ABI needs no more than its files.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("purelib", "platlib")]
    for place in places:
        if (place / "include/torch/csrc/stable/ops.h").exists():
            return place
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin/nvcc").exists():
        return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc")


def find_compiler() -> str | None:
    named = os.environ.get("CXX")
    if named:
        return shutil.which(shlex.split(named)[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), "unknown")


class BuildLibraries(build_ext):
    """Runs CMake once; what cannot be built leaves a package that computes in eager PyTorch."""

    def run(self) -> None:
        self.info: dict[str, object] = {"cpu": "not built", "cuda": "not built"}
        mode = os.environ.get("RLKERN_BUILD_CUDA", "auto").lower()
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"RLKERN_BUILD_CUDA: expected auto, 0 or 1, got {mode!r}")
        if mode == "1" and flag("RLKERN_SKIP_EXT"):
            raise SystemExit(
                "RLKERN_BUILD_CUDA=1 asks for the CUDA library and RLKERN_SKIP_EXT for none: "
                "expected one of them, got both"
            )
        nvcc = find_nvcc()
        if mode == "1" and nvcc is None:
            raise SystemExit("RLKERN_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME nor on PATH")
        missing = []
        if flag("RLKERN_SKIP_EXT"):
            self.info["cpu"] = self.info["cuda"] = "not built: RLKERN_SKIP_EXT was set"
        elif reason := self.cannot_build():
            self.info["cpu"] = self.info["cuda"] = f"not built: {reason}"
            missing.append(reason)
            if mode == "1":
                raise SystemExit(f"RLKERN_BUILD_CUDA=1, but {reason}")
        else:
            missing += self.build("cpu", "_C", [])
            if mode == "0":
                self.info["cuda"] = "not built: RLKERN_BUILD_CUDA=0"
            elif nvcc is None:
                self.info["cuda"] = "not built: nvcc was not found"
                missing.append(
                    "no nvcc: neither CUDA_HOME nor PATH has one, so there are no CUDA kernels; "
                    "Triton or eager PyTorch serve GPUs"
                )
            else:
                missing += self.build_cuda(nvcc, required=mode == "1")
        self.write_info()
        if missing:
            self.complain("; ".join(missing))

    def cannot_build(self) -> str | None:
        if torch_root() is None:
            return "torch 2.10 or newer was not found"
        if find_compiler() is None:
            return "no C++ compiler was found (set CXX)"
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                return f"{tool} was not found"
        return None

    def build_cuda(self, nvcc: str, required: bool) -> list[str]:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        archs = ";".join(re.split(r"[;,\s]+", archs.strip()))
        problems = self.build(
            "cuda",
            "_C_cuda",
            ["-DRLKERN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DRLKERN_CUDA_ARCHS={archs}"],
        )
        if problems and required:
            raise SystemExit(f"RLKERN_BUILD_CUDA=1, but {problems[0]}")
        self.info["cuda_architectures"] = archs.split(";")
        self.info["nvcc"] = first_line(nvcc, "--version") + ", " + release(nvcc)
        return problems

    def build(self, device: str, target: str, options: list[str]) -> list[str]:
        """Compiles one library into the package; returns what went wrong, if anything."""
        folder = Path(self.build_temp).resolve() / device
        folder.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        options += [f"-DTORCH_ROOT={torch_root()}", "-DCMAKE_BUILD_TYPE=Release"]
        options += [f"-DCMAKE_CXX_COMPILER={find_compiler()}"]
        if flag("RLKERN_SANITIZE"):
            options += ["-DRLKERN_SANITIZE=ON"]
        if threads := os.environ.get("NVCC_THREADS"):
            options += [f"-DCMAKE_CUDA_FLAGS=--threads={threads}"]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options], check=True)
            subprocess.run(
                ["cmake", "--build", folder, "--target", target, "--parallel", jobs], check=True
            )
        except subprocess.CalledProcessError as error:
            problem = f"{target} failed to build ({shlex.join(map(str, error.cmd))})"
            self.info[device] = f"not built: {problem}"
            return [problem]
        self.package_folder().mkdir(parents=True, exist_ok=True)
        library = f"{target}.abi3.so"
        # Replaced, not written over: a process that has the old one loaded would crash.
        staged = self.package_folder() / f".{library}.new"
        shutil.copy2(folder / library, staged)
        os.replace(staged, self.package_folder() / library)
        self.info[device] = "built"
        return []

    def package_folder(self) -> Path:
        return ROOT / "rlkern" if self.inplace else Path(self.build_lib).resolve() / "rlkern"

    def write_info(self) -> None:
        compiler = find_compiler()
        self.info["compiler"] = first_line(compiler, "--version") if compiler else "none"
        root = torch_root()
        if root is not None:
            text = (root / "version.py").read_text()
            found = re.search(r"__version__ = '([^']+)'", text)
            self.info["torch_headers"] = found.group(1) if found else "unknown"
        self.info["python"] = sys.version.split()[0]
        self.package_folder().mkdir(parents=True, exist_ok=True)
        path = self.package_folder() / "_build_info.json"
        path.write_text(json.dumps(self.info, indent=1) + "\n")

    def complain(self, what: str) -> None:
        if flag("RLKERN_STRICT"):
            raise SystemExit(f"RLKERN_STRICT=1: {what}")
        warnings.warn(
            f"rlkern is installed without compiled kernels for some devices: {what}. "
            "It computes the same in Triton or eager PyTorch, slower.",
            stacklevel=2,
        )

    # setuptools asks for the outputs of an Extension, which CMake has already put in place.
    def get_outputs(self) -> list[str]:
        return [str(p) for p in self.package_folder().glob("_C*.abi3.so")] + [
            str(self.package_folder() / "_build_info.json")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        kinds = ("*.h", "*.cpp", "*.cu", "*.cuh")
        return ["CMakeLists.txt"] + [
            str(p.relative_to(ROOT)) for kind in kinds for p in sorted(ROOT.glob(f"csrc/**/{kind}"))
        ]


def release(nvcc: str) -> str:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    found = re.search(r"release ([\d.]+)", text)
    return f"release {found.group(1)}" if found else "unknown"


setup(
    ext_modules=[Extension("rlkern._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    # Headers alone are needed, and of any torch from 2.10 on: the stable ABI makes the library
    # the same. So an environment that has torch is not asked to fetch a second one.
    setup_requires=[] if torch_root() else ["torch==2.13.0"],
)
