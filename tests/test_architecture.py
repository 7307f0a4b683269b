"""The architecture: who may import whom, and how little a user loads who only wants the light half.

Imports are read from the source (AST), so that a test fails at the line that was written; what really gets loaded is
asked of a fresh interpreter.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import s2l_ray
from s2l_ray.storage.layout import STAGE_NAMES

PACKAGE = Path(s2l_ray.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
# Read from the page that a newcomer reads first: the rooms in the order in which they may know each other.
ROOMS = re.findall(r"^    (\w+)/? {2,}", s2l_ray.__doc__ or "", re.MULTILINE)
HEAVY = ["torch", "ray", "transformers", "deepspeed", "faiss", "datasets"]


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports_of(module: str, *, at_import_only: bool = False) -> set[str]:
    """The modules of this package that a module imports, those inside functions included unless told otherwise."""
    nodes = _nodes(tree_of(module), at_import_only=at_import_only)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            package = f"{node.module}.".removeprefix("s2l_ray.")
            if package != f"{node.module}.":
                inside = {f"{package}{alias.name}" for alias in node.names}  # a module of the package, or a name in it
                found |= {name if name in MODULES else package.removesuffix(".") for name in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("s2l_ray.") for alias in node.names if alias.name.startswith("s2l_ray.")}
    return found


def _nodes(node: ast.AST, *, at_import_only: bool = False) -> Iterator[ast.AST]:
    """The nodes that may run, without what only a type checker reads; those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if at_import_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child, at_import_only=at_import_only)


def loaded_after(code: str, *names: str) -> set[str]:
    """Which of the packages a fresh interpreter has loaded after some code."""
    names = names or tuple(HEAVY)
    check = f"\nimport sys\nsys.stdout.write('\\n' + ' '.join(name for name in {names!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


# --- who imports whom ----------------------------------------------------------------------------------------------


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_its_place_in_the_package_s_docstring():
    assert sorted(ROOMS) == sorted({room_of(module) for module in MODULES})


def test_the_rooms_are_in_the_order_of_the_flow():
    flow = [room for room in ROOMS if room in STAGE_NAMES]
    assert flow == list(STAGE_NAMES)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_knows_only_those_above_it(module):
    above = ROOMS[: ROOMS.index(room_of(module))]
    assert {room_of(name) for name in imports_of(module)} <= {*above, room_of(module)}


@pytest.mark.parametrize("room", ROOMS)
def test_no_two_files_of_a_room_import_each_other(room):
    known = {module: imports_of(module) & MODULES.keys() for module in MODULES if room_of(module) == room}
    known = {module: {name for name in names if room_of(name) == room} for module, names in known.items()}
    while free := [module for module, names in known.items() if not names & known.keys()]:
        for module in free:
            del known[module]
    assert not known


@pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir()])
def test_a_room_s_page_says_what_it_is_and_loads_nothing(room):
    """But for the ground floor's config, whose sections all of the package names, and nothing else."""
    tree = tree_of(room)
    assert len((ast.get_docstring(tree) or "").splitlines()) >= 3, "what lives there, in which order to read it"
    if room not in {"config"}:
        assert len(tree.body) == 1


def test_the_pipeline_loads_no_stage_before_it_is_run():
    light = set(ROOMS[: ROOMS.index("examples")])
    assert {room_of(name) for name in imports_of("pipeline", at_import_only=True)} <= light
    assert {room_of(name) for name in imports_of("cli", at_import_only=True)} <= light


def test_ray_and_the_trainers_are_imported_where_they_are_used():
    """No module but the Trainer's callbacks brings them along when it is itself imported."""
    callbacks = {"training.resume_points", "trajectories.callback"}
    for module in MODULES.keys() - callbacks:
        assert not callbacks & imports_of(module, at_import_only=True)
        for node in _nodes(tree_of(module), at_import_only=True):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"ray", "transformers", "deepspeed", "datasets"}, f"{module}:{node.lineno}"


# --- how little is loaded ------------------------------------------------------------------------------------------


def test_importing_the_package_is_light():
    assert loaded_after("import s2l_ray", *HEAVY, "pyarrow", "numpy", "pydantic", "yaml") == set()


@pytest.mark.parametrize(
    "module", ["trajectories.store", "clustering.stage", "selection.alone", "runtime.session", "cli", "pipeline", "plan.plan"]
)
def test_a_light_module_loads_neither_torch_nor_ray(module):
    assert loaded_after(f"import s2l_ray.{module}") <= {"faiss"}


def test_selecting_in_python_loads_neither_torch_nor_ray():
    code = "import numpy, s2l_ray; s2l_ray.select(numpy.random.default_rng(0).random((50, 3)), budget=5, num_clusters=4)"
    assert loaded_after(code) == {"faiss"}


def run_cli(*arguments: str) -> str:
    """Code that runs the command line as `s2l` does and expects exit code 0."""
    return (
        f"import sys; sys.argv = {['s2l', *arguments]!r}\n"
        "from s2l_ray.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )


def test_s2l_select_loads_neither_torch_nor_ray(tmp_path):
    losses = np.random.default_rng(0).random((60, 3))
    pq.write_table(pa.table({"example_id": range(60), "losses": losses.tolist()}), tmp_path / "losses.parquet")
    arguments = ["--budget", "6", "--num-clusters", "3", "--output", str(tmp_path / "out")]
    assert loaded_after(run_cli("select", str(tmp_path / "losses.parquet"), *arguments)) == {"faiss"}
    assert (tmp_path / "out" / "selection" / "manifest.json").is_file()


def test_help_loads_nothing_heavy():
    assert loaded_after(run_cli("select", "--help"), *HEAVY, "pyarrow.dataset") == set()


def test_s2l_plan_starts_no_ray_and_loads_no_torch_for_sizes_that_the_config_names(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    config = {
        "name": "planned",
        "examples": {"dataset": str(tmp_path / "corpus.jsonl")},
        "proxy": {"model": str(tmp_path)},
        "selection": {"budget": 1},
        "target": {"model": str(tmp_path)},
        "plan": {"proxy_parameters": 1e6, "target_parameters": 1e8},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert loaded_after(run_cli("plan", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"))) == set()


def test_s2l_plan_starts_no_ray_where_it_must_look_at_the_shape_of_a_model(tmp_path):
    quickstart = PACKAGE.parent / "configs" / "quickstart.yaml"
    assert "ray" not in loaded_after(run_cli("plan", str(quickstart), "--run-dir", str(tmp_path / "run")))


# --- the public names ----------------------------------------------------------------------------------------------


def test_all_equals_the_public_names_and_every_one_resolves():
    assert s2l_ray.__all__ == sorted(set(s2l_ray.__all__))
    assert {"ArtifactError", "ConfigError", "DataError", "S2LError", "run", "select", "water_fill"} <= set(s2l_ray.__all__)
    for name in s2l_ray.__all__:
        value = getattr(s2l_ray, name)
        assert value.__name__ == name
        assert value.__module__.startswith("s2l_ray.")
    assert set(s2l_ray.__all__) <= set(dir(s2l_ray))
    assert not hasattr(s2l_ray, "nothing_of_this_name")


def test_what_a_type_checker_sees_is_what_is_there():
    """The names under TYPE_CHECKING and the table of lazy names are one list in two places."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: getattr(s2l_ray, name).__module__ for name in s2l_ray.__all__}


# --- habits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module):
    calls = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
    lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not lines or module == "cli"


SWALLOWS = {("trajectories.overlapped", "_run")}


def test_no_error_is_swallowed_by_a_broad_except():
    found = set()
    for module in MODULES:
        for function in (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef)):
            for node in (node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)):
                kinds = (
                    {"BaseException"} if node.type is None else {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                )
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if kinds & {"Exception", "BaseException"} and not raises:
                    found.add((module, function.name))
    assert found == SWALLOWS


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(tree_of(module))


def functions_of(module: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_one_room_and_a_function_fits_on_a_screen(module):
    assert len(MODULES[module].read_text().splitlines()) <= 400
    assert [f.name for f in functions_of(module) if (f.end_lineno or 0) - f.lineno >= 60] == []


def test_the_pipeline_fits_on_one_page():
    assert len(MODULES["pipeline"].read_text().splitlines()) <= 200


def test_a_class_s_name_names_one_thing():
    """Private classes included: a reader who meets `Rows` twice asks which."""
    places: dict[str, set[str]] = {}
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), set()).add(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
