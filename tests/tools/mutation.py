"""Mutation testing: puts small faults into modules whose faults would cost vectors, and names those
that their tests do not notice.

    python tests/tools/mutation.py [module ...] [--sample 40] [--seed 0]

A mutant is one changed operator, constant, condition or statement, in memory; no file changes. Each
runs in a fork of this process, in which the libraries are loaded and our packages are not. mutmut
and cosmic-ray start an interpreter for each mutant, which takes 3 s here, or instrument copies of
whole packages. CONTRIBUTING.md has the last result.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.machinery
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis

ROOT = Path(__file__).parents[2]
MODULES = {
    "kalm_integrations.validation": ("unit/test_validation", "unit/test_response_validator"),
    "kalm_integrations.batching": ("unit/test_batching", "contract/test_client"),
    "kalm_integrations.dispatch": ("unit/test_dispatch", "contract/test_client"),
    "kalm_integrations.codec": ("unit/test_codec", "unit/test_rpc", "contract/test_http_faults"),
    "modal_backend.admission": ("unit/test_admission", "unit/test_service"),
    "kalm_integrations.bulk.plan": (
        "unit/test_bulk_plan",
        "contract/test_bulk",
        "contract/test_bulk_jobs",
    ),
}
"""Each with the tests of its rules, the quickest first."""
SECONDS = 120
"""After which a mutant counts as noticed: it hangs."""
LIBRARIES = ("aiohttp", "hypothesis", "numpy", "pyarrow", "pydantic", "pytest", "pytest_asyncio")
LIBRARIES += ("rich", "starlette", "uvicorn", "xdist", "xxhash")

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.Continue: ast.Break, ast.Break: ast.Continue,
}  # fmt: skip


def mutations(tree: ast.Module) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Nodes inside functions, each with the name of a child that is replaced, and by what."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    seen = set[int]()
    for node in (
        node for function in functions for part in function.body for node in ast.walk(part)
    ):
        if id(node) in seen or isinstance(node, ast.AnnAssign):
            continue
        seen.add(id(node))
        for name, child in ast.iter_fields(node):
            if isinstance(child, list):
                for index, item in enumerate(child):
                    if isinstance(item, ast.AST) and (new := _changed(item)):
                        yield node, f"{name}.{index}", new
            elif isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                if new := _changed(child):
                    yield node, name, new
                if name == "test" and not isinstance(child, ast.UnaryOp):
                    yield node, name, ast.UnaryOp(ast.Not(), child)
                if name == "value" and isinstance(node, ast.Return):
                    yield node, name, ast.Constant(None)


def _changed(node: ast.AST) -> ast.AST | None:
    match node:
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            return ast.Constant(value + 1)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call() | ast.Await()):
            return ast.Pass()
    swap = SWAPS.get(type(node))
    return swap() if swap else None


def mutant(tree: ast.Module, number: int) -> tuple[ast.Module, str]:
    """The tree with one mutation, and where it is."""
    made = copy.deepcopy(tree)
    node, place, new = list(mutations(made))[number]
    name, _, index = place.partition(".")
    owner = getattr(node, name)
    old = owner[int(index)] if index else owner
    line = getattr(old, "lineno", 0) or getattr(node, "lineno", 0)
    before = ast.unparse(node if isinstance(old, ast.cmpop) or not index else old)
    if index:
        owner[int(index)] = new
    else:
        setattr(node, name, new)
    made = ast.fix_missing_locations(made)
    after = ast.unparse(new if index and not isinstance(new, ast.cmpop) else node)
    return made, f"{line}: {_short(before)}  →  {_short(after)}"


def _short(code: str) -> str:
    return code.split("\n", maxsplit=1)[0][:90]


def survives(module: str, tree: ast.Module, path: Path) -> bool:
    """Whether all tests of the module pass, in a child of this process."""
    pid = os.fork()
    if pid:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status == 0
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return False
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    loader = importlib.machinery.SourceFileLoader
    real = loader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> object:
        return compile(tree, str(path), "exec") if fullname == module else real(self, fullname)

    loader.get_code = get_code  # type: ignore[method-assign, assignment]
    import pytest

    tests = [f"tests/{name}.py" for name in MODULES[module]]
    options = [
        "-x",
        "-q",
        "--fast",
        "--assert=plain",
        "--hypothesis-profile=mutation",
        "-p",
        "no:cacheprovider",
        "-n0",
    ]
    os._exit(int(pytest.main([*options, *tests])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("modules", nargs="*", default=[*MODULES], metavar="module")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module, by lot")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(ROOT)
    for library in LIBRARIES:
        importlib.import_module(library)
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # to shrink takes minutes
    hypothesis.settings.register_profile("mutation", deadline=None, database=None, phases=phases)
    for module in options.modules:
        path = ROOT / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text())
        if not survives(module, tree, path):
            sys.exit(f"{module}: its tests fail without a fault.")
        everything = range(len(list(mutations(tree))))
        chosen = random.Random(options.seed).sample(
            everything, min(options.sample, len(everything))
        )
        survivors = []
        for number in sorted(chosen):
            changed, where = mutant(tree, number)
            if survives(module, changed, path):
                survivors.append(where)
                print(f"  {path.relative_to(ROOT)}:{where}", flush=True)
        noticed = len(chosen) - len(survivors)
        print(f"{module}: {noticed} of {len(chosen)} noticed, of {len(everything)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
