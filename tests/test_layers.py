"""The layout of the package: imports point down only, nothing is unpickled, imports are light, files are short."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import anatomaly
from anatomaly.methods.table import METHODS

PACKAGE = Path(anatomaly.__file__).parent
ROWS = (  # a module may import modules of lower rows, and its own folder's
    "cli",
    "commands",
    "service archive",
    "benchmark audit explain",
    "training results",
    "detector",
    "presets",
    "config",
    "methods timm_models",
    "backbones evaluation",
    "data synthetic scoring",
    "files tables",
    "types errors _version",
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names.split()}
READ_CONFIG = set(" ".join(ROWS[: ROWS.index("config")]).split())  # below, plain arguments

FILES = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in sorted(PACKAGE.rglob("*.py"))}
TREES = {name.removesuffix(".__init__"): ast.parse(file.read_text("utf-8")) for name, file in FILES.items()}
TREES["anatomaly"] = TREES.pop("__init__")


class Imports(ast.NodeVisitor):
    """Modules of the package that one module needs when it runs; imports under `if TYPE_CHECKING` do not count."""

    def __init__(self, name):
        self.name, self.found = name, set()
        self.visit(TREES[name])

    def visit_If(self, node):
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found |= {a.name.removeprefix("anatomaly.") for a in node.names if a.name.split(".")[0] == "anatomaly"}

    def visit_ImportFrom(self, node):
        base = (node.module or "").split(".")
        if node.level:
            here = ["anatomaly", *self.name.split("."), *(["__init__"] if f"{self.name}.__init__" in FILES else [])]
            base = here[: len(here) - node.level] + [part for part in base if part]
        if base[0] == "anatomaly":
            inside = ".".join(base[1:])
            for alias in node.names:
                module = f"{inside}.{alias.name}".removeprefix(".")
                self.found.add(module if module in TREES else inside or f"anatomaly.{alias.name}")


NEEDS = {name: Imports(name).found for name in TREES}


def top(module):
    return module.split(".")[0]


def test_every_module_has_a_row():
    assert {top(name) for name in TREES} - {"anatomaly"} == set(ROW)


@pytest.mark.parametrize("name", NEEDS)
def test_imports_point_down(name):
    for needed in NEEDS[name]:
        assert top(needed) in ROW, f"{name} imports {needed}, which no row lists"
        if name != "anatomaly" and top(needed) != top(name):
            assert ROW[top(needed)] > ROW[top(name)], f"{name} imports {needed}, which is not below it"


def test_the_files_of_a_folder_do_not_import_in_circles_or_from_its_init():
    list(TopologicalSorter(NEEDS).static_order())  # raises CycleError
    inits = {name.removesuffix(".__init__") for name in FILES if name.endswith(".__init__")}
    assert not [name for name, needs in NEEDS.items() if top(name) in needs & inits]


def test_config_is_read_at_the_top_only():
    assert {top(name) for name, needs in NEEDS.items() if "config" in needs} <= READ_CONFIG


def test_nobody_asks_for_a_methods_name():
    """Whoever wants to know something of a method asks its record."""
    found = {}
    for module, tree in TREES.items():
        if top(module) in ("methods", "presets"):
            continue
        words = (each for each in ast.walk(tree) if isinstance(each, ast.Constant))
        found |= {f"{module}:{each.lineno}": each.value for each in words if each.value in METHODS.built_in}
    assert not found


def test_few_files_lie_in_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


@pytest.mark.parametrize("name", TREES)
def test_nothing_is_unpickled(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in {"pickle", "dill", "cloudpickle", "joblib", "torch.serialization"}
            assert node.module not in {"torch", "numpy"} or "load" not in {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError"
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) in {"torch.load", "trainer.fit"}:  # Lightning's fit loads a checkpoint
                assert given.get("weights_only") == "True", f"line {node.lineno}"
            assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    assert len(FILES[name].read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", ["anatomaly", "anatomaly.cli", "anatomaly.data.manifest"])
def test_importing_it_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'lightning', 'timm'}} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
