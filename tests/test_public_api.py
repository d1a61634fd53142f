"""Names, schemas and docstrings that other people's code relies on."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zebra
from zebra import ops
from zebra.ops import _register

SCHEMA = (Path(__file__).parent.parent / "csrc" / "schema.cpp").read_text()
DECLARED = re.findall(r'"([a-z]\w+)\(Tensor', SCHEMA)
INTERNAL = re.findall(r'"(_\w+)\(Tensor', SCHEMA)  # between the parts of a CUDA implementation

SET_BY_PYTHON = {"fused_kl_div": ["kept_tokens"]}  # arguments that the Python function computes


@pytest.mark.parametrize("op", _register.OPERATORS)
def test_every_operator_is_served_on_every_device(op):
    assert ops.support_matrix()[op] == {
        "cpu": "kernel",
        "cuda": ops.support_matrix()[op]["cuda"],
    }
    served = {"kernel", "composite", _register.MIXED, *_register._around.values()}
    assert ops.support_matrix()[op]["cuda"] in served


def test_the_support_matrix_says_where_the_dtype_decides():
    """With the CUDA library, ssd_scan has a 16-bit kernel; without it, the composite serves."""
    code = (
        "from zebra import _extension, ops; "
        "print('libzebra_cuda.so' in _extension._loaded, ops.support_matrix()['ssd_scan']['cuda'])"
    )
    for load in ("0", "1"):
        env = os.environ | {"ZEBRA_LOAD_CUDA": load}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        loaded, _, served = run.stdout.strip().partition(" ")
        assert served == (_register.MIXED if loaded == "True" else "composite"), run.stderr


@pytest.mark.parametrize("op", INTERNAL)
def test_every_internal_operator_has_its_composite(op):
    assert _register.has_kernel(op, "CUDA") and not _register.has_kernel(op, "CPU")
    served = op.removeprefix("_").removesuffix("_composite")  # or a kernel around a library
    assert any(served.startswith(name) for name in _register.OPERATORS)


@pytest.mark.parametrize("op", DECLARED)
def test_every_declared_operator_has_cpu_cuda_and_fake(op):
    for key in ("CPU", "CUDA"):
        assert _register.has_kernel(op, key), f"{op} has no {key} implementation"
    assert torch._library.simple_registry.singleton.find(f"zebra::{op}").fake_impl.kernel


@pytest.mark.parametrize("op", _register.OPERATORS)
def test_every_operator_is_documented(op):
    doc = inspect.getdoc(getattr(ops, op)) or ""
    for section in ("Equation:", "Args:", "Returns:", "Raises:", "Numerics:"):
        assert section in doc, f"zebra.ops.{op}: docstring lacks {section}"
    for argument in inspect.signature(getattr(ops, op)).parameters:
        assert f"{argument}:" in doc or f"{argument}," in doc, f"zebra.ops.{op}: {argument}"
    assert op in ops.__all__


@pytest.mark.parametrize("op", _register.OPERATORS)
def test_python_arguments_are_those_of_the_schema(op):
    arguments = getattr(torch.ops.zebra, op).default._schema.arguments
    python = list(inspect.signature(getattr(ops, op)).parameters)
    assert python == [a.name for a in arguments[: len(python)]]
    assert [a.name for a in arguments[len(python) :]] == SET_BY_PYTHON.get(op, [])


def test_import_touches_no_gpu():
    code = "import zebra, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_one_fact():
    from zebra import _extension

    bindings = _extension.bindings()
    assert bindings is not None and bindings.build_info()["version"] == zebra.__version__


def test_config_of_an_unknown_operator_is_refused():
    from zebra import _extension

    bindings = _extension.bindings()
    with pytest.raises(ValueError, match="no tile configuration for operator 'nothing'"):
        bindings.select_config("nothing")
