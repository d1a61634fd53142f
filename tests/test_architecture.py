"""The dependency rules of the house, read off includes and imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
PYTHON = list((ROOT / "zebra").rglob("*.py"))
NATIVE = [p for d in ("tests/csrc", "benchmarks/native") for p in (ROOT / d).glob("*.[chm]*")]
ALL = [*CSRC, *PYTHON, *NATIVE]

# A layer may import from itself and from those before it.
LAYERS = (
    ("_version", "_extension", "testing"),
    ("ops",),
    ("layers", "cache"),
    ("models",),
    ("init", "data", "distill", "engine", "evaluate", "report", "demo"),
    ("cli", "__main__"),
)
# transformers is heavy and moves fast: only these may import it at module level.
TRANSFORMERS = ("zebra/models/", "zebra/init/convert.py", "zebra/demo", "zebra/cache.py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: Path) -> list[str]:
    return re.findall(r'#include [<"](.*?)[>"]', path.read_text())


def is_registration(path: Path) -> bool:
    return "_torch" in path.stem or path.parent == ROOT / "csrc" or path.name.startswith("torch_")


@pytest.mark.parametrize("path", CSRC, ids=name)
def test_only_registrations_include_torch(path):
    torch = [i for i in includes(path) if i.startswith(("torch/", "ATen/", "c10/"))]
    assert is_registration(path) or not torch, torch
    assert all(i.startswith(("torch/csrc/stable/", "torch/headeronly/")) for i in torch), torch


@pytest.mark.parametrize("path", CSRC, ids=name)
def test_operators_do_not_include_each_other(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    allowed = {folder, "common"}
    if folder != "module.cpp":
        # A registration may call another operator's kernel through its contract, <op>/<op>.h.
        contracts = {f"{o.name}/{o.name}.h" for o in (ROOT / "csrc").iterdir() if o.is_dir()}
        read = set(includes(path)) - (contracts if is_registration(path) else set())
        others = {i.split("/")[0] for i in read if "/" in i} - allowed
        assert not {o for o in others if (ROOT / "csrc" / o).is_dir()}, others


@pytest.mark.parametrize("path", CSRC, ids=name)
def test_only_the_bindings_know_python(path):
    python = [i for i in includes(path) if i.startswith(("pybind11/", "Python.h"))]
    assert path.name == "module.cpp" or not python


@pytest.mark.parametrize("path", [p for p in CSRC if p.name.endswith("_config.h")], ids=name)
def test_configurations_are_pure(path):
    assert not [i for i in includes(path) if "cuda" in i or i.endswith(".cuh")]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at module level) of every import; TYPE_CHECKING blocks do not count."""
    tree = ast.parse(path.read_text())
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                visit(child, top and not isinstance(child, ast.FunctionDef))

    visit(tree, True)
    return found


def layer(module: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if module in names), None)


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_python_layers_import_only_downwards(path):
    part = path.relative_to(ROOT / "zebra").parts[0].removesuffix(".py")
    if part == "__init__":
        return
    mine = layer(part)
    assert mine is not None, f"{part} belongs to no layer: add it to LAYERS"
    for module, _ in imports(path):
        if module.startswith("zebra."):
            theirs = layer(module.split(".")[1])
            assert theirs is None or theirs <= mine, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_transformers_is_imported_where_models_are(path):
    top = [m for m, at_top in imports(path) if m.startswith("transformers") and at_top]
    assert not top or name(path).startswith(TRANSFORMERS), top


def test_command_imports_nothing_heavy_at_its_top():
    top = [module for module, at_top in imports(ROOT / "zebra/cli.py") if at_top]
    assert not [m for m in top if m.startswith(("torch", "transformers"))]
    assert [m for m in top if m.startswith("zebra.")] == ["zebra._version.__version__"]


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_only_ops_spells_torch_ops_zebra(path):
    assert "torch.ops.zebra" not in path.read_text() or "zebra/ops/" in str(path)


@pytest.mark.parametrize("path", ALL, ids=name)
def test_files_are_ascii_and_short(path):
    text = path.read_text()
    assert text.isascii(), [c for c in text if not c.isascii()][:5]
    limit = 900 if path.suffix == ".cuh" else 500
    assert len(text.splitlines()) <= limit, f"{len(text.splitlines())} lines, at most {limit}"
