"""Public interfaces only: what other libraries do not promise is used in `runtime/private.py` and nowhere else.

Names are read from the source (AST), so that a test fails at the line that was written.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from s2l_ray.config import Scratch
from s2l_ray.runtime.private import NAMES, attention_of, with_children, without_mixed_precision
from s2l_ray.training.models import scratch_config

from .test_architecture import MODULES, tree_of

FOREIGN = ("accelerate", "datasets", "deepspeed", "faiss", "peft", "ray", "tokenizers", "torch", "transformers")
HOME = "runtime.private"
NO_ATTRIBUTES = {"_id", "_S2L_COMPLETE"}
"""Words that are no attribute of anything: the id of MongoDB's exports, the variable by which a shell asks for completions."""
ENDS = {"endswith", "removesuffix", "removeprefix", "startswith"}


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore and is not one of Python's own, such as `__name__`."""
    return name == "__dict__" or (name.startswith("_") and not (name.startswith("__") and name.endswith("__")))


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private names of other objects than `self` and `cls`, and of other packages' modules, with their lines."""
    pieces = set(_pieces_of_words(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            is_name = is_private(node.value) and node.value.strip("_") and node.value not in NO_ATTRIBUTES
            if is_name and node not in pieces:  # what getattr may be given
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in [*modules, *(alias.name for alias in node.names)]:
                if name != "__future__" and any(is_private(part) for part in name.split(".")):
                    yield node.lineno, name


def _pieces_of_words(tree: ast.Module) -> Iterator[ast.AST]:
    """Constants that are put to a word or taken from it: parts of f-strings, and arguments such as of `removesuffix`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield from node.values
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ENDS:
            yield from node.args


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {HOME}))
def test_private_names_of_other_libraries_stand_in_one_file(module):
    found = [f"{module}:{line}: {name}" for line, name in private_names(tree_of(module))]
    assert not found, f"use a public name, or give the reason in {HOME}"


def test_no_private_method_of_another_library_is_overridden():
    """An underscore of ours on a class of theirs is fine only where theirs has no such name."""
    found = set()
    for module in MODULES:
        for name, made in inspect.getmembers(importlib.import_module(f"s2l_ray.{module}"), inspect.isclass):
            if made.__module__.startswith("s2l_ray."):
                foreign = [base for base in made.__mro__ if base.__module__.partition(".")[0] in FOREIGN]
                ours = {own for own in vars(made) if is_private(own) and own != "__dict__"}
                found |= {f"{module}.{name}.{own}" for own in ours for base in foreign if own in vars(base)}
    assert not found


def test_the_names_of_the_one_file_are_used_there_and_have_a_reason():
    used = {name.rpartition(".")[2] for _, name in private_names(tree_of(HOME))}
    assert used == {name.rpartition(".")[2] for name in NAMES}
    assert all(NAMES.values()), "since which version"


def test_the_installed_torch_keeps_a_modules_children_where_we_look():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    other = torch.nn.Identity()
    copied = with_children(model, {"1": other})
    assert list(copied.children()) == [model[0], other]
    assert copied[0].weight is model[0].weight
    assert len(list(model.children())) == 2
    assert model[1] is not other


def test_the_installed_transformers_names_a_models_attention_where_we_look():
    model = AutoModelForCausalLM.from_config(scratch_config(Scratch(layers=1, hidden=16), 64, 0))
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert attention_of(model) == name


def a_prepared_model_and_its_own_forward() -> None:
    own = torch.nn.Linear(2, 3)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(torch.nn.Linear(2, 3))
    mixed, ones = prepared.forward, torch.ones(1, 2) * 1.001
    with without_mixed_precision(prepared), without_mixed_precision(own):
        assert prepared.forward != mixed
        assert torch.equal(prepared(ones), torch.nn.functional.linear(ones, prepared.weight, prepared.bias))
    assert prepared.forward == mixed
    assert "forward" not in vars(own)


def test_the_installed_accelerate_keeps_a_models_own_forward_where_we_look():
    """In a process of its own: Accelerate keeps one precision for all of a process, and other tests train in this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(a_prepared_model_and_its_own_forward).result()


def test_versions_that_nobody_has_tried_are_not_installed():
    """The libraries whose insides move have an upper bound, above the version that is installed here."""
    import tomllib
    from importlib.metadata import version
    from pathlib import Path

    from packaging.requirements import Requirement

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    needed = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    for name in ("ray", "transformers", "accelerate", "deepspeed"):
        assert any(bound.operator == "<" for bound in needed[name]), name
        assert version(name) in needed[name]
