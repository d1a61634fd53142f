"""Building and installing, as users do it: offline, without nvcc, into another place."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A clean copy of the sources that git tracks."""
    copy = tmp_path_factory.mktemp("tree")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    return copy


def build_wheel(tree, out, **environment):
    """pip wheel without network and without build isolation."""
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*command, "-w", str(out), str(tree)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_wheel_builds_offline_and_without_nvcc(tree, tmp_path):
    tools = tmp_path / "bin"  # what a machine without CUDA has on its PATH
    tools.mkdir()
    for tool in [
        "cmake",
        "ninja",
        "gcc",
        "g++",
        "cc",
        "c++",
        "ld",
        "ar",
        "as",
        "ranlib",
        "nm",
        "sh",
    ]:
        found = shutil.which(tool, path="/usr/local/bin:/usr/bin:/bin") or shutil.which(tool)
        assert found, f"{tool} is needed to build"
        (tools / tool).symlink_to(found)
    (tools / "python3").symlink_to(sys.executable)
    build = build_wheel(tree, tmp_path / "dist", PATH=str(tools), ZEBRA_CUDA="AUTO")
    assert build.returncode == 0, build.stdout[-3000:]
    assert build.stdout.count("zebra: CPU kernels only (no nvcc found") == 1
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "zebra/_lib/libzebra_cpu.so" in names and "zebra/py.typed" in names
    assert not [n for n in names if n.startswith(("csrc/", "tests/", "benchmarks/"))]

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import torch, zebra; from zebra import ops; "
        "print(zebra.__file__); ops.rms_norm(torch.ones(2, 8), torch.ones(8)); "
        "assert ops.support_matrix()['rms_norm'] == {'cpu': 'kernel', 'cuda': 'composite'}"
    )
    env = os.environ | {"PYTHONPATH": str(site)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert str(site) in run.stdout


@pytest.mark.slow
def test_build_without_torch_headers_says_what_to_do(tree, tmp_path):
    nowhere = tmp_path / "empty"
    build = build_wheel(tree, tmp_path / "dist", ZEBRA_TORCH_INCLUDE=str(nowhere))
    assert build.returncode != 0
    assert "needs the headers of torch >= 2.10" in build.stdout


def test_source_tree_without_libraries_says_what_to_do(tmp_path):
    shutil.copytree(ROOT / "zebra", tmp_path / "zebra", ignore=shutil.ignore_patterns("*.so"))
    run = subprocess.run(
        [sys.executable, "-c", "import zebra"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "pip install -e ." in run.stderr and "ImportError" in run.stderr


def test_cutlass_headers_are_found_or_refused(tmp_path):
    finder = ["cmake", "-DZEBRA_CUTLASS_FETCH=OFF", "-P", ROOT / "third_party/CutlassHeaders.cmake"]
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "cutlass.h").touch()
    for folder, ok in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        env = os.environ | {"ZEBRA_CUTLASS_INCLUDE": str(folder)}
        run = subprocess.run(finder, env=env, capture_output=True, text=True)
        assert (run.returncode == 0) == ok
        assert (f"{folder} (ZEBRA_CUTLASS_INCLUDE)" in run.stdout) == ok
        assert ("must hold cutlass/cutlass.h" in run.stderr) == (not ok)
