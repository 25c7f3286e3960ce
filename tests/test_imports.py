"""The layers, read off the source: who may import whom, and what may be imported only where it is needed."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
import tiny

ROOT = Path(__file__).parent.parent / "platform"
PACKAGE = ROOT / "fleetune"
FILES = sorted(PACKAGE.rglob("*.py"))

# Heavy packages may be imported at the top of these modules only; elsewhere inside the functions that need them.
HEAVY = {"transformers", "peft", "datasets", "mlflow", "ray", "matplotlib", "sklearn", "bitsandbytes"}
MAY_IMPORT_RAY = {
    "engine/actors.py",
    "engine/cluster.py",
    "engine/launch.py",
    "submit.py",
    "sweep/trainable.py",
    "sweep/tuning.py",
}
MAY_IMPORT_MLFLOW = {
    "records/tracking.py",
    "records/tracking_client.py",
    "records/tracking_models.py",
    "records/tracking_store.py",
    "records/tracking_sweep.py",
    "records/tracking_system.py",
}

# A program, as the command line is one: it asks the engine for traces, and nothing imports it but its own command.
ABOVE_ALL = {"cost/validation.py", "cost/__main__.py"}

FORBIDDEN: dict[str, set[str]] = {
    "methods": {"engine", "records", "spec", "cli"},
    "models": {"methods", "engine", "records", "spec", "cli", "training"},
    "training": {"methods", "engine", "records", "spec", "cli"},
    "data": {"methods", "engine", "records", "spec", "cli", "models", "training"},
    "fleet": {"methods", "engine", "records", "spec", "cli", "models", "training", "data"},
    "cost": {"methods", "engine", "records", "spec", "cli", "training", "data"},
    "records": {"methods", "engine", "models", "training", "cli"},
}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Modules that a file imports when it runs; what is for type checkers alone does not count."""
    yield from _imports(ast.parse(path.read_text()).body, path, top_only)


def _imports(body: list[ast.stmt], path: Path, top_only: bool) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["fleetune", *path.relative_to(PACKAGE).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse, path, top_only)
        elif not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            for _, value in ast.iter_fields(node):
                if isinstance(value, list):
                    inner = [v for v in value if isinstance(v, (ast.stmt, ast.ExceptHandler, ast.match_case))]
                    yield from _imports(inner, path, top_only)  # type: ignore[arg-type]


def packages(modules: Iterator[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path):
    """Top, function, branch, handler, class; not TYPE_CHECKING; functions only when asked for."""
    path = PACKAGE / "engine" / "sample.py"
    source = """
import a
from b.c import d
from .x import y
if TYPE_CHECKING:
    import hidden
else:
    import shown
try:
    import e
except ImportError:
    import f
class K:
    import g
    def m(self):
        with open(0):
            import h
"""
    body = ast.parse(source).body
    everything = ["a", "b.c", "b.c.d", "fleetune.engine.x", "fleetune.engine.x.y", "shown", "e", "f", "g", "h"]
    assert list(_imports(body, path, False)) == everything
    assert list(_imports(body, path, True)) == everything[:-1]


def test_ray_is_imported_in_few_modules():
    assert {place(f) for f in FILES if "ray" in packages(imports(f))} == MAY_IMPORT_RAY


def test_mlflow_is_imported_in_few_modules():
    assert {place(f) for f in FILES if "mlflow" in packages(imports(f))} == MAY_IMPORT_MLFLOW


@pytest.mark.parametrize("path", FILES, ids=place)
def test_heavy_packages_are_imported_where_they_are_needed(path: Path):
    """At the top of no module but those of Ray and MLflow, so that the command line starts fast."""
    allowed = {"ray"} if place(path) in MAY_IMPORT_RAY else {"mlflow"} if place(path) in MAY_IMPORT_MLFLOW else set()
    assert not (packages(imports(path, top_only=True)) & HEAVY) - allowed


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_knows_nothing_of_those_above_it(layer: str):
    for path in (PACKAGE / layer).rglob("*.py"):
        if place(path) in ABOVE_ALL:
            continue
        used = {m.split(".")[1] for m in imports(path) if m.startswith("fleetune.")}
        assert not used & FORBIDDEN[layer], place(path)


def test_only_the_command_line_knows_of_plans():
    """A plan asks the engine's own questions; nothing that runs depends on it."""
    users = {place(f) for f in FILES if any(m.startswith("fleetune.plan") for m in imports(f))}
    assert {user for user in users if not user.startswith("plan/")} == {"cli.py"}


def test_platform_is_no_package_and_holds_no_module():
    """Otherwise it would stand before Python's own platform, and nothing would start."""
    assert list(ROOT.glob("*.py")) == []
    assert (PACKAGE / "__init__.py").is_file()


def test_importing_the_spec_loads_nothing_heavy():
    """In a fresh interpreter: reading a job file needs neither Ray nor transformers nor MLflow."""
    code = f"import sys, fleetune.spec; print([m for m in sys.modules if m in {sorted(HEAVY)!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ray_is_begun_before_pytorch_is_there():
    """The command line joins it first, and both take seconds."""
    code = "import sys, fleetune.cli, fleetune.engine.cluster; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_worker_needs_no_transformers(tmp_path: Path):
    """It trains and evaluates with generation on a pickled problem: the library's import would cost each host seconds."""
    spec = tiny.spec()
    inputs = runs.inputs(spec)
    file = tmp_path / "inputs.pickle"
    file.write_bytes(pickle.dumps((spec, inputs)))
    code = f"""
import pickle, sys
import numpy as np
import fleetune.engine.actors
from fleetune.engine.executor import SerialExecutor
from fleetune.engine.problem import build_problem
problem = build_problem(*pickle.load(open({str(file)!r}, "rb")))
executor, method = SerialExecutor(problem, debug=True), problem.method
model = method.evaluated(method.start(), lambda: iter([]))
assert executor.evaluate(model, [np.arange(4)]).sums()[0].num_correct is not None
print([m for m in sys.modules if m in {sorted(HEAVY - {"ray"})!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
