"""The rules of the code that can be read off it: imports go down only, nothing is hidden, nothing grows too big."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ppojax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A line imports from the lines above it here only, never from its own.
LINES = (
    ("types", "errors", "component", "lazy", "statistics"),
    ("masking", "actions", "settings", "transfer"),
    ("mesh", "compilation_cache", "host_devices", "processes"),
    ("kernels",),
    ("models", "envs", "advantages", "losses"),
    ("rollout", "experience"),
    ("update", "runtime"),
    ("config",),
    ("trainer", "cli", "viewer"),
    ("reporting", "planning"),
    ("sweeping",),
    ("train", "critic_fit", "evaluate", "export", "report", "view", "sweep", "plan"),
)
LEVEL = {name: level for level, names in enumerate(LINES) for name in names}

NUMERICAL = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"}  # what takes seconds to import
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}

# (file, module): an optional extra, or the numerical half of a command, which a mistyped key should not wait for.
LATE_IMPORTS = {
    ("models/source.py", "huggingface_hub"),
    ("models/gguf.py", "gguf"),
    ("envs/rewards/rules.py", "math_verify"),
    ("envs/reasoning_gym.py", "reasoning_gym.factory"),
    ("envs/aviary.py", "aviary.core"),
    ("envs/verifiers.py", "verifiers.v1"),
    ("envs/verifiers.py", "verifiers.v1.utils"),
    ("models/__init__.py", "ppojax.models.api"),
    ("train.py", "ppojax.trainer.session"),
    ("critic_fit.py", "ppojax.trainer.fitting"),
    ("train.py", "rich.console"),
    ("evaluate.py", "ppojax.trainer.held_out"),
    ("export.py", "ppojax.trainer.exporting"),
    ("view.py", "ppojax.viewer.app"),
    ("plan.py", "ppojax.planning.advice"),
    ("plan.py", "ppojax.planning.planner"),
    ("plan.py", "ppojax.planning.table"),
}
# Environments and their tools are the user's code.
BROAD_EXCEPTS = {"rollout/collect.py", "rollout/episode.py", "rollout/workers.py", "envs/user_code.py"}
PROBES = {"lazy.py"}  # a proxy of a module

MAX_FILE, MAX_FUNCTION = 400, 60


class Import(NamedTuple):
    module: str
    line: int
    typing_only: bool
    late: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="ascii"), str(path))


MODULES = {name_of(path): path for path in FILES}


@cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(tree_of(path), path, typing_only=False, late=False))


def _imports(node: ast.AST, path: Path, *, typing_only: bool, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, typing_only, late)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, f"{path}:{child.lineno}: relative import"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(whole if whole in MODULES else child.module, child.lineno, typing_only, late)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for part in child.body:
                yield from _imports(ast.Module([part], []), path, typing_only=True, late=late)
            for part in child.orelse:
                yield from _imports(ast.Module([part], []), path, typing_only=typing_only, late=late)
        else:
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, path, typing_only=typing_only, late=inside)


def part_of(module: str) -> str:
    """`ppojax.models.pretrained` -> `models`."""
    return module.split(".")[1]


def inner(path: Path) -> Iterator[Import]:
    """Imports of ppojax's own modules."""
    return (i for i in imports(path) if i.module.startswith("ppojax."))


def reached(start: str) -> dict[str, str]:
    """Modules that importing `start` runs, each with the module that asked for it first."""
    found: dict[str, str] = {}
    todo = [(start, start)]
    while todo:
        module, asked_by = todo.pop()
        for package in _with_packages(module):
            if package in MODULES and package not in found:
                found[package] = asked_by
                todo += [(i.module, package) for i in inner(MODULES[package]) if not (i.typing_only or i.late)]
    return found


def _with_packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def numerical_imports(start: str) -> list[str]:
    return [
        f"{module} (asked for by {asked_by}) imports {i.module} at line {i.line}"
        for module, asked_by in reached(start).items()
        for i in imports(MODULES[module])
        if i.module.split(".")[0] in NUMERICAL and not (i.typing_only or i.late)
    ]


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


each_file = pytest.mark.parametrize("path", FILES, ids=relative)


@each_file
def test_imports_go_down_only(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert not list(inner(path))
        return
    me = part_of(name_of(path))
    assert me in LEVEL, f"{me} has no line in tests/test_imports.py: give it one"
    wrong = [
        f"{relative(path)}:{i.line} ({me}, line {LEVEL[me]}) imports {i.module} (line {LEVEL[part_of(i.module)]})"
        for i in inner(path)
        if part_of(i.module) != me and LEVEL[part_of(i.module)] >= LEVEL[me]
    ]
    assert not wrong, "\n".join(wrong)


@each_file
def test_losses_and_advantages_see_only_the_bottom(path: Path) -> None:
    if relative(path).split("/")[0] in ("losses", "advantages"):
        own = part_of(name_of(path))
        wrong = [i.module for i in inner(path) if part_of(i.module) not in (own, "kernels", *LINES[0], *LINES[1])]
        assert not wrong


def test_environments_never_reach_jax() -> None:
    modules = [m for m in MODULES if m == "ppojax.envs" or m.startswith("ppojax.envs.")]
    assert modules
    for module in modules:
        assert "ppojax.lazy" not in reached(module), f"{module} reaches ppojax.lazy"
        assert numerical_imports(module) == []


@pytest.mark.parametrize(
    "module", ["config", "cli", "train", "critic_fit", "evaluate", "export", "report", "view", "sweep", "plan"]
)
def test_a_config_is_read_without_jax(module: str) -> None:
    assert numerical_imports(f"ppojax.{module}") == []


@each_file
def test_imports_stand_at_the_top(path: Path) -> None:
    late = {(relative(path), i.module) for i in imports(path) if i.late}
    assert late <= LATE_IMPORTS


@each_file
def test_nothing_runs_data_as_code(path: Path) -> None:
    assert not {i.module.split(".")[0] for i in imports(path)} & UNSAFE_MODULES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS), f"line {node.lineno}"
            assert "allow_pickle" not in {k.arg for k in node.keywords}, f"line {node.lineno}"
            yaml_load = ast.unparse(node.func) in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
            assert not yaml_load, f"line {node.lineno}"


@each_file
def test_no_probing_and_no_broad_except(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and relative(path) not in PROBES:
            assert node.func.id not in ("getattr", "hasattr"), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler) and relative(path) not in BROAD_EXCEPTS:
            caught = "" if node.type is None else ast.unparse(node.type)
            reraised = bool(node.body) and isinstance(node.body[-1], ast.Raise)
            assert reraised or caught not in ("", "Exception", "BaseException"), f"line {node.lineno}"


@each_file
def test_public_functions_spell_out_their_arguments(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert node.args.kwarg is None, f"line {node.lineno}: {node.name}(**{node.args.kwarg})"


def test_sizes() -> None:
    files = sorted(((len(path.read_text().splitlines()), relative(path)) for path in FILES), reverse=True)
    functions = sorted(
        (
            (node.end_lineno - node.lineno + 1, f"{relative(path)}:{node.lineno} {node.name}")
            for path in FILES
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
        ),
        reverse=True,
    )
    largest = "\n".join(f"{lines:5d} {name}" for lines, name in (*files[:5], *functions[:5]))
    print(f"largest files and functions:\n{largest}")  # shown by pytest -s, and when this fails
    assert files[0][0] <= MAX_FILE, largest
    assert functions[0][0] <= MAX_FUNCTION, largest


def test_every_exception_to_a_rule_is_used() -> None:
    assert BROAD_EXCEPTS | PROBES | {file for file, _ in LATE_IMPORTS} <= set(map(relative, FILES))
    late = {(relative(path), i.module) for path in FILES for i in imports(path) if i.late}
    assert late >= LATE_IMPORTS, f"not imported late: {LATE_IMPORTS - late}"
