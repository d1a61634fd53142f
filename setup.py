"""Thin driver: runs CMake (the only build definition) and puts what it made into the package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def torch_include() -> str | None:
    """torch/include of the surrounding Python, by path: pip's isolated build hides its imports."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    roots.append(Path(sysconfig.get_path("purelib")) / "torch")
    found = (root / "include" for root in roots)
    return next((str(p) for p in found if (p / "torch/csrc/stable/ops.h").exists()), None)


def missing_build_requirements() -> list[str]:
    """What this machine lacks: asked of pip only then, so that offline builds work."""
    need = [] if os.environ.get("ZEBRA_TORCH_INCLUDE") or torch_include() else ["torch>=2.10"]
    return need + [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]


class CMakeBuild(build_ext):
    """Configure and build with ninja in build/cmake, which later builds reuse."""

    def run(self) -> None:
        package = ROOT / "zebra" if self.inplace else Path(self.build_lib).resolve() / "zebra"
        pybind11 = importlib.util.find_spec("pybind11")
        pythons = os.environ.get("ZEBRA_PYTHON", sys.executable) if pybind11 else ""
        build = ROOT / "build" / "cmake"
        options = {
            "ZEBRA_OUTPUT_DIR": package,
            "ZEBRA_TORCH_INCLUDE": os.environ.get("ZEBRA_TORCH_INCLUDE") or torch_include() or "",
            "ZEBRA_CUDA": os.environ.get("ZEBRA_CUDA", "AUTO"),
            "ZEBRA_PYTHON": pythons,
        }
        if pybind11 and pybind11.origin:
            options["ZEBRA_PYBIND11_INCLUDE"] = Path(pybind11.origin).parent / "include"
        if os.environ.get("ZEBRA_CUDA_ARCHS"):
            options["ZEBRA_CUDA_ARCHS"] = os.environ["ZEBRA_CUDA_ARCHS"]
        # A pip-installed cmake is a Python script that an isolated build cannot import.
        path = os.environ.get("PATH", "")
        system = [d for d in path.split(os.pathsep) if d in ("/usr/local/bin", "/usr/bin")]
        cmake = shutil.which("cmake", path=os.pathsep.join(system)) or shutil.which("cmake")
        if cmake is None:
            raise SystemExit("zebra: cmake >= 3.24 is needed to build (pip install cmake ninja)")
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        for command in (
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions],
            [cmake, "--build", build],
        ):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"zebra: the build failed: {' '.join(map(str, command))}")

    def get_source_files(self) -> list[str]:
        """The sources of the extension come from MANIFEST.in, not from this list."""
        return []


class CleanBuildPy(build_py):
    """Forget modules that were deleted since the last build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "zebra", ignore_errors=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    """The operators use neither Python's nor torch's unstable ABI: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    setup_requires=missing_build_requirements(),
    ext_modules=[Extension("zebra._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy, "bdist_wheel": AnyPythonWheel},
)
