"""Load the operator libraries, once, and say what was loaded.

Environment variables read here and nowhere else: ``ZEBRA_LOAD_CUDA=1`` loads the CUDA library into
a torch without CUDA, so that its registrations can be inspected.  (The C++ libraries read three
more: ``ZEBRA_CPU_ISA`` lowers the CPU instruction set, and those of ``_LAUNCH``, read at every
launch.)
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from zebra._version import __version__

_LIBRARIES = Path(__file__).parent / "_lib"
_loaded: list[str] = []

# csrc/common/cuda/launch.h
_LAUNCH = {
    "ZEBRA_PORTABLE": "the portable CUDA kernels on every GPU",
    "ZEBRA_BATCH_INVARIANT": "results on CUDA that do not depend on the rest of the batch",
}


def _load(name: str) -> bool:
    path = _LIBRARIES / name
    if not path.exists():
        return False
    torch.ops.load_library(path)
    _loaded.append(name)
    return True


def load() -> None:
    """Load libzebra_cpu.so and, where torch has CUDA, libzebra_cuda.so.

    Raises:
        ImportError: if the CPU library was not built.
    """
    if _loaded:
        return
    if not _load("libzebra_cpu.so"):
        raise ImportError(
            f"zebra {__version__}: {_LIBRARIES / 'libzebra_cpu.so'} is missing. This is a source "
            "tree that was not built: run `pip install -e .` here."
        )
    if torch.version.cuda is not None or os.environ.get("ZEBRA_LOAD_CUDA") == "1":
        _load("libzebra_cuda.so")


def bindings() -> ModuleType | None:
    """The pybind11 module ``zebra._C``, or None where it was not built for this Python."""
    try:
        return importlib.import_module("zebra._C")
    except ModuleNotFoundError:
        return None


def build_info() -> dict[str, Any]:
    """Facts of this build: versions, loaded libraries and what they were compiled for."""
    module = bindings()
    info: dict[str, Any] = {"version": __version__, "torch": torch.__version__}
    info["libraries"] = list(_loaded)
    info["cuda_library_built"] = (_LIBRARIES / "libzebra_cuda.so").exists()
    info.update({k: f"1: {what}" for k, what in _LAUNCH.items() if os.environ.get(k) == "1"})
    info["bindings"] = module is not None
    if module is not None:
        info.update(module.build_info())
    return info
