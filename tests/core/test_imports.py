"""The arrows between the project's own modules point one way, imports inside functions included."""

import ast
import graphlib
import importlib.util

import pytest

from tests.support.runs import ROOT

ENTRY_POINTS = ("baselines", "study", "benchmarks", "scripts")
FOLDERS = ("sharpening", "mllm_template", "tiny_world", *ENTRY_POINTS, "tests")


def module_names(root):
    """Dotted name -> file of every module in the root and in the project's folders."""
    files = [*root.glob("*.py"), *(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))]
    parts = {file: file.relative_to(root).with_suffix("").parts for file in files}
    return {".".join(part for part in parts[file] if part != "__init__"): file for file in files}


class Imports(ast.NodeVisitor):
    """Which of the modules known a file imports when it runs, at its top or later."""

    def __init__(self, module, file, known):
        self.package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        self.known = known
        self.found = set()
        self.visit(ast.parse(file.read_text(encoding="utf-8")))

    def visit_If(self, node):
        skipped = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.orelse if skipped else [node.test, *node.body, *node.orelse]:
            self.visit(statement)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names} & self.known.keys()

    def visit_ImportFrom(self, node):
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), self.package)
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            self.found |= {submodule if submodule in self.known else base} & self.known.keys()


def import_graph(root):
    """Module -> the modules of the project that it imports."""
    known = module_names(root)
    return {module: Imports(module, file, known).found for module, file in known.items()}


def circle(graph):
    """The modules along a circle of imports, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT)


def training_scripts(graph):
    return {name for name in graph if name.startswith("train_")}


def in_folders(graph, *folders):
    return {name for name in graph if name.split(".")[0] in folders}


def test_graph_of_imports_has_no_circle(graph):
    assert circle(graph) is None


def test_graph_holds_what_the_scripts_import(graph):
    """An empty graph would pass everything else."""
    assert len(training_scripts(graph)) == 2
    for script in training_scripts(graph):
        assert {"sharpening.trajectory", "sharpening.run"} <= graph[script]
    assert "sharpening.rewards.calling" in graph["reward"]


def test_package_imports_neither_the_catalogue_nor_a_script(graph):
    outside = {"reward", *training_scripts(graph), *in_folders(graph, *ENTRY_POINTS)}
    found = {name: graph[name] & outside for name in in_folders(graph, "sharpening")}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_training_scripts_are_imported_by_benchmarks_study_and_tests_alone(graph):
    importing = {name for name in graph if graph[name] & training_scripts(graph)}
    assert importing <= in_folders(graph, "benchmarks", "study", "tests")


def test_shapes_are_a_leaf(graph):
    """The reward of that name and its prompt set read them from inside the package."""
    assert graph["tiny_world.shapes"] == set()


def test_tests_are_imported_by_tests_alone(graph):
    """An installed project has none."""
    importing = {name for name in graph if graph[name] & in_folders(graph, "tests")}
    assert importing <= in_folders(graph, "tests")


@pytest.mark.parametrize(
    ("first", "found"),
    [
        ("import sharpening.two", True),
        ("from sharpening import two", True),
        ("from .two import name", True),
        ("from . import two", True),
        ("def late():\n    if True:\n        from sharpening.two import name", True),
        ("if TYPE_CHECKING:\n    from sharpening.two import name", False),
        ("if typing.TYPE_CHECKING:\n    pass\nelse:\n    import sharpening.two", True),
        ("import two", False),
    ],
)
def test_circles_are_found(first, found, tmp_path):
    (tmp_path / "sharpening").mkdir()
    (tmp_path / "sharpening" / "__init__.py").touch()
    (tmp_path / "sharpening" / "one.py").write_text(first)
    (tmp_path / "sharpening" / "two.py").write_text("from reward import anything")
    (tmp_path / "reward.py").write_text("def late():\n    from sharpening import one")
    members = set(circle(import_graph(tmp_path)) or ())
    assert members == ({"sharpening.one", "sharpening.two", "reward"} if found else set())
