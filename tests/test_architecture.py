"""The architecture: who may import whom, and how little a user loads who only wants the light half.

Imports are read from the source (AST), so that a test fails at the line that was written; what really gets loaded is
asked of a fresh interpreter.
"""

from __future__ import annotations

import ast
import functools
import json
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

PACKAGE = Path(s2l_ray.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
# A module imports only from lines above its own. `report` shows any run, so it knows the artifacts and no stage.
LAYERS = (
    ("errors",),
    ("schedule",),
    ("config", "progress"),
    ("artifacts",),
    ("rows", "lock"),
    ("pieces", "fields"),
    ("corpus", "index"),
    ("session",),
    ("examples",),
    ("sorting",),
    ("trajectory_store",),
    ("trajectory_files",),
    ("features",),
    ("quality", "kmeans"),
    ("engines",),
    ("grouping",),
    ("clustering",),
    ("selection",),
    ("report.facts",),
    ("report.plots",),
    ("report",),
    ("recording",),
    ("training",),
    ("training.token_rows", "training.heads", "training.attention", "training.limits", "training.metrics"),
    ("training.losses",),
    ("training.tokens", "training.models", "training.fit"),
    ("training.callback", "training.units", "training.token_parts"),
    ("training.recorder",),
    ("training.fine_tuning",),
    ("training.proxy",),
    ("training.trajectories", "training.target"),
    ("training.evaluation",),
    ("pipeline",),
    ("memory",),
    ("plan",),
    ("cli",),
)
# The ground that every stage stands on.
GROUND = {"errors", "config", "progress", "artifacts"}
# What each may know of the stages, where that is less than all above it.
ALONE = {
    "sorting": {"errors"},
    "trajectory_store": {"errors", "sorting"},
    "trajectory_files": (GROUND - {"config"}) | {"sorting", "trajectory_store"},
    "recording": (GROUND - {"config"}) | {"sorting", "trajectory_store", "trajectory_files"},
    "features": {"errors"},
    "quality": {"features"},
    "kmeans": {"errors"},
    "engines": {"errors", "config", "kmeans"},
    "grouping": GROUND | {"sorting", "trajectory_store", "features", "quality", "kmeans", "engines"},
    "clustering": GROUND | {"sorting", "trajectory_store", "kmeans", "engines", "grouping"},
    "selection": GROUND | {"sorting", "trajectory_store", "quality", "grouping", "clustering"},
    "report.facts": GROUND,
    "report.plots": {"report.facts"},
    "report": GROUND | {"report.facts", "report.plots"},
}
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


def test_every_module_has_its_place_in_the_order():
    assert sorted(name for layer in LAYERS for name in layer) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_what_stands_above_it(module):
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    above = {name for layer in LAYERS[:level] for name in layer}
    assert imports_of(module) <= above


@pytest.mark.parametrize("module", ALONE)
def test_the_light_half_knows_no_other_stage(module):
    assert imports_of(module) <= ALONE[module]


def test_stages_are_joined_in_the_pipeline_alone():
    """Only pipeline, plan and cli may know both the light half and the training."""
    light = {"clustering", "selection"}
    for module in MODULES:
        known = imports_of(module)
        if known & light and any(name.startswith("training.") for name in known):
            assert module == "pipeline"


def test_the_pipeline_loads_no_stage_before_it_is_run():
    assert imports_of("pipeline", at_import_only=True) <= GROUND | {"session", "lock"}
    assert imports_of("cli", at_import_only=True) <= GROUND


def test_ray_and_the_trainers_are_imported_where_they_are_used():
    """No module but the Trainer's callbacks brings them along when it is itself imported."""
    callbacks = {"training.recorder", "training.callback"}
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


@pytest.mark.parametrize("module", ["trajectory_store", "clustering", "selection", "session", "cli", "pipeline", "plan"])
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


# The Hub's client raises whatever its HTTP library does; this says so in a warning and goes on with an unpinned model.
SWALLOWS = {("session", "_hub_commit"), ("training.trajectories", "_run")}


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
