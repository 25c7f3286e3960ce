"""The layers, read off the source: who may import whom, and what may be imported only where it is needed."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import runs, tiny

ROOT = Path(__file__).parent.parent / "platform"
PACKAGE = ROOT / "fleetune"
FILES = sorted(PACKAGE.rglob("*.py"))

# Heavy packages may be imported at the top of these modules only; elsewhere inside the functions that need them.
HEAVY = {"transformers", "peft", "datasets", "mlflow", "ray", "matplotlib", "sklearn", "bitsandbytes"}
MAY_IMPORT_RAY = {
    "cli/job_server.py",
    "engine/execution/calls.py",
    "engine/execution/ray_pool.py",
    "engine/execution/ray_worker.py",
    "engine/launch/backends.py",
    "engine/launch/cluster.py",
    "engine/launch/ray_coordinator.py",
    "sweep/resources.py",
    "sweep/trainable.py",
    "sweep/tune.py",
}
MAY_IMPORT_MLFLOW = {
    "tracking/tracker.py",
    "tracking/client.py",
    "tracking/logged_model.py",
    "tracking/store.py",
    "tracking/stored_run.py",
    "tracking/sweep.py",
    "tracking/system_metrics.py",
}

# The rooms, each with those that it may import beside itself. A file belongs to the longest name that it begins with; one that
# belongs to none fails, so a new room has to be put into its place here. Arrows go down only: the table itself is tested.
GROUND = {
    "__init__",
    "columns",
    "config",
    "digests",
    "errors",
    "files",
    "locks",
    "redaction",
    "scopes",
    "seeds",
    "tensors",
    "units",
    "yaml_text",
}
LOCAL = {"data", "fleet", "models"}
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    "data": set(),
    "fleet": set(),
    "models": set(),
    "cost": {"fleet"},
    "training": {"data", "models"},
    "methods": {*LOCAL, "training"},
    "tracking/access": set(),
    "tracking/config": {"tracking/access"},
    "spec": {*LOCAL, "methods", "tracking/config", "training"},
    "problem": {*LOCAL, "methods", "spec"},
    "pricing": {*LOCAL, "cost", "methods", "problem", "spec", "training"},
    "records": set(),
    "claims": {"records"},
    "reports": {"claims", "records"},
    "tracking": {"claims", "records", "reports", "tracking/access", "tracking/config"},
    "engine/checkpoint": {"methods"},
    "engine/round": {*LOCAL, "cost", "methods", "pricing", "problem", "spec"},
    "engine/execution": {
        *LOCAL,
        "engine/checkpoint",
        "engine/round",
        "methods",
        "problem",
        "records",
        "spec",
        "training",
    },
    "engine": {
        *LOCAL,
        "engine/checkpoint",
        "engine/execution",
        "engine/round",
        "methods",
        "problem",
        "records",
        "training",
    },
    "engine/launch": {
        *LOCAL,
        "engine",
        "engine/checkpoint",
        "engine/execution",
        "engine/round",
        "methods",
        "problem",
        "records",
        "spec",
        "tracking",
        "tracking/access",
        "training",
    },
    "plan": {
        *LOCAL,
        "cost",
        "engine",
        "engine/round",
        "methods",
        "pricing",
        "problem",
        "reports",
        "spec",
    },
    "check": {
        *LOCAL,
        "cost",
        "engine",
        "engine/checkpoint",
        "engine/execution",
        "engine/round",
        "methods",
        "models",
        "pricing",
        "problem",
        "records",
        "spec",
        "training",
    },
    "sweep": {
        *LOCAL,
        "claims",
        "engine",
        "engine/execution",
        "engine/launch",
        "methods",
        "problem",
        "records",
        "reports",
        "spec",
        "tracking",
        "tracking/access",
    },
    "cli": {
        *LOCAL,
        "claims",
        "check",
        "engine/launch",
        "methods",
        "plan",
        "records",
        "reports",
        "spec",
        "sweep",
        "tracking",
    },
    "__main__": {"cli"},
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


def room_of(name: str) -> str | None:
    """The room of a file or module, given below the package as ``engine/round/work``."""
    parts = name.split("/")
    return next((r for r in ("/".join(parts[:n]) for n in range(len(parts), 0, -1)) if r in MAY_IMPORT), None)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_room_imports_only_what_stands_below_it(path: Path):
    """Also inside functions; the ground is everybody's."""
    room = room_of(place(path).removesuffix(".py"))
    assert room is not None, "this file belongs to no room of the table"
    modules = {m.removeprefix("fleetune.").replace(".", "/") for m in imports(path) if m.startswith("fleetune.")}
    used = {found for m in modules if (found := room_of(m)) is not None}
    assert used - GROUND - MAY_IMPORT[room] - {room} == set()


@pytest.mark.parametrize("path", FILES, ids=place)
def test_what_a_file_imports_of_ours_is_there(path: Path):
    """Also inside functions, where a wrong name would show only when they are called."""
    for module in imports(path):
        parts = module.split(".")[1:]
        if module.startswith("fleetune.") and room_of("/".join(parts)) is None:
            pytest.fail(f"there is no {module}")
        if module.startswith("fleetune.") and not (PACKAGE.joinpath(*parts)).is_dir():
            holder = PACKAGE.joinpath(*parts[:-1])
            is_module = PACKAGE.joinpath(*parts).with_suffix(".py").is_file()
            is_name = holder.is_dir() or holder.with_suffix(".py").is_file()
            assert is_module or is_name, module


def test_the_rooms_stand_above_each_other():
    """No circle among them: each round takes away those whose imports are all gone already."""
    left = {room: {r for r in below if r != room} for room, below in MAY_IMPORT.items()}
    while ready := [room for room, below in left.items() if not below & left.keys()]:
        for room in ready:
            del left[room]
    assert left == {}


def test_no_files_import_each_other_in_a_circle():
    """Neither directly nor over others, functions included."""
    names = {f"fleetune.{place(f)[:-3].replace('/', '.')}": f for f in FILES if f.name != "__init__.py"}
    edges = {name: {m for m in imports(f) if m in names and m != name} for name, f in names.items()}
    while leaves := {name for name, used in edges.items() if not used & edges.keys()}:
        edges = {name: used for name, used in edges.items() if name not in leaves}
    in_circles = set(edges)
    while outer := {n for n in in_circles if not any(n in edges[m] for m in in_circles)}:
        in_circles -= outer
    assert in_circles == set()


def test_only_the_command_line_knows_of_plans():
    """A plan asks the engine's own questions; nothing that runs depends on it."""
    users = {place(f) for f in FILES if any(m.startswith("fleetune.plan") for m in imports(f))}
    assert {user for user in users if not user.startswith("plan/")} == {"cli/jobs.py"}


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
    code = "import sys, fleetune.cli, fleetune.engine.launch.cluster; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_worker_needs_no_transformers(tmp_path: Path):
    """It trains and evaluates with generation on a pickled problem: the library's import would cost each worker seconds."""
    spec = tiny.spec()
    inputs = runs.inputs(spec)
    file = tmp_path / "inputs.pickle"
    file.write_bytes(pickle.dumps((spec, inputs)))
    code = f"""
import pickle, sys
import numpy as np
import fleetune.engine.execution.ray_pool
from fleetune.engine.execution.executor import SerialExecutor
from fleetune.problem import build_problem
problem = build_problem(*pickle.load(open({str(file)!r}, "rb")))
executor, method = SerialExecutor(problem, debug=True), problem.method
model = method.evaluated(method.start(), lambda: iter([]))
assert executor.evaluate(model, [np.arange(4)]).sums()[0].num_correct is not None
print([m for m in sys.modules if m in {sorted(HEAVY - {"ray"})!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
