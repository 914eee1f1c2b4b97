"""Mutation testing: what do the tests of the numeric modules notice?

    unshare --pid --fork --mount-proc python benchmarks/mutation.py
    unshare --pid --fork --mount-proc python benchmarks/mutation.py --module gae

The first runs a sample and writes benchmarks/results/mutation.md. The second runs every mutant of a module.

A mutant is a module with one small fault: another operator, comparison or constant, a negated condition,
another result, or a statement left out. It is killed if the module's own tests fail, or exceed a time limit.
A mutant that survives is equivalent, which `EQUIVALENT` explains, or shows that something is not tested.

A mutant of the lock may send signals to anybody, so the command gives the run process ids of its own.

Each mutant runs in a fork of this process, which has imported torch but nothing of ppo_hpo. So a run of the
tests costs little more than the tests. docs/explanation/dependencies.md says why this is no library.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.util
import itertools
import json
import os
import random
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "mutation.md"
OUTCOMES = RESULT.with_suffix(".json")
SAMPLE, SEED = 300, 0

# Modules, and the arguments of pytest that choose their own fast tests.
MODULES: dict[str, str] = {
    "ppo/gae": "ppo/test_gae.py",
    "ppo/losses": "ppo/test_losses.py",
    "ppo/normalize": "ppo/test_normalize.py",
    "ppo/adam": "ppo/test_adam.py",
    "ppo/numpy_engine": "ppo/test_numpy_engine.py",
    "ppo/autograd": "ppo/test_autograd.py",
    "ppo/rollout": "ppo/test_rollout.py",
    "state/checkpoint": "state/test_checkpoint.py -k 'not is_killed and not readers_see and not full_disk'",
    "state/lock": "state/test_lock.py -k 'not fifty_times and not wakes_up and not many_break'",
    "spec/results": "spec/test_results.py spec/test_trial_seeds.py "
    "-k 'test_results or aggregates or by_hand or goes_as_far'",
    "spec/trial_seeds": "spec/test_trial_seeds.py -k 'numbers or disjoint or twice or each_seed or one_seed'",
}
# (module, original, mutant): why no test can tell the two apart.
_TWO = "the tensor has two dimensions, so the last one is 1"
_RANKS = "observations have two dimensions, or four as images"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "ppo/autograd",
        "action = output if self._continuous else output.argmax(-1)",
        "action = output if self._continuous else output.argmax(+1)",
    ): _TWO,
    (
        "ppo/losses",
        "log_probs = torch.log_softmax(logits, dim=-1)",
        "log_probs = torch.log_softmax(logits, dim=+1)",
    ): _TWO,
    (
        "ppo/losses",
        "log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)",
        "log_prob = log_probs.gather(+1, action.unsqueeze(-1)).squeeze(-1)",
    ): _TWO,
    (
        "ppo/losses",
        "log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)",
        "log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(+1)",
    ): _TWO,
    (
        "ppo/autograd", "images = batch.obs.ndim > 2", "images = batch.obs.ndim >= 2",
    ): "vectors are then gathered for each minibatch, as images are: slower, but the same",
    ("ppo/autograd", "images = batch.obs.ndim > 2", "images = batch.obs.ndim > 3"): _RANKS,
    ("ppo/autograd", "if obs.ndim <= 2:", "if obs.ndim <= 3:"): _RANKS,
    (
        "ppo/numpy_engine",
        "_standardize(gathered[_ADVANTAGE].reshape(-1, size))",
        "_standardize(gathered[_ADVANTAGE].reshape(-2, size))",
    ): "numpy takes every negative length for the one to be found",
    (
        "ppo/numpy_engine",
        "error *= (squared >= clipped) | (np.abs(change) <= np.float32(bound))",
        "error *= (squared >= clipped) | (np.abs(change) < np.float32(bound))",
    ): "at the bound both errors are the same number, so the first condition holds",
    (
        "ppo/rollout",
        "flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]",
        "flat = [array.reshape(-2, *array.shape[2:]) for array in arrays]",
    ): "numpy takes every negative length for the one to be found",
    (
        "state/lock",
        "yields = lost is not None and lost.number == number and (waited < _YIELD)",
        "yields = lost is not None and lost.number == number and (waited <= _YIELD)",
    ): "differs only in a look after exactly 5 s, and the next one is half a second later",
    (
        "ppo/numpy_engine", "self._zero = np.zeros(h.shape[-1], np.float32)", "pass",
    ): "the array of one zero is then broadcast: slower, but the same",
}  # fmt: skip

_SWAPPED: dict[type[ast.AST], type[Any]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
# Parts of a syntax tree without a meaning for the numbers: annotations, imports and messages.
_NO_CODE = (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert, ast.Global, ast.Nonlocal, ast.Pass)
_NO_FIELDS = {"annotation", "returns", "decorator_list", "bases", "keywords of a class", "exc", "cause"}


@dataclass(frozen=True)
class Change:
    """One fault that a syntax tree can get."""

    statement: ast.stmt  # that it is in
    apply: Callable[[], None]
    deletes: bool = False


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    module: str
    index: int  # of the change among all of the module
    line: int
    original: str
    mutated: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}  {self.original}  ->  {self.mutated}"

    @property
    def name(self) -> str:
        source = (REPOSITORY / "ppo_hpo" / f"{self.module}.py").read_bytes()
        return f"{self.module} {hashlib.sha256(source).hexdigest()[:12]} {self.index}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.module, self.original, self.mutated


# ----------------------------------------------------------------------------------- faults


def parse(module: str) -> ast.Module:
    return ast.parse((REPOSITORY / "ppo_hpo" / f"{module}.py").read_text(encoding="utf-8"))


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    found = []
    for index in range(len(changes(parse(module)))):
        change = changes(parse(module))[index]
        before = ast.unparse(change.statement).splitlines()
        change.apply()
        after = ["pass"] if change.deletes else ast.unparse(change.statement).splitlines()
        pairs = itertools.zip_longest(before, after, fillvalue="")
        original, mutated = next((a.strip(), b.strip()) for a, b in pairs if a != b)
        found.append(Mutant(module, index, change.statement.lineno, original, mutated))
    return sorted(found, key=lambda mutant: mutant.line)


def changes(tree: ast.Module) -> list[Change]:
    """Every fault that a module can get. One may be applied to a tree."""
    found: list[Change] = []
    _collect(tree, None, found)
    return found


def _collect(node: ast.AST, statement: ast.stmt | None, found: list[Change]) -> None:
    if isinstance(node, ast.stmt):
        statement = node
    if statement is not None:
        found += [Change(statement, apply) for apply in _faults(node)]
    for name, value in ast.iter_fields(node):
        if name in _NO_FIELDS:
            continue
        for at, child in enumerate(value if isinstance(value, list) else [value]):
            # `zip(strict=)` guards against our own mistakes only.
            strict = isinstance(child, ast.keyword) and child.arg == "strict"
            if isinstance(child, ast.AST) and not isinstance(child, _NO_CODE) and not strict:
                if isinstance(value, list) and _deletable(child):
                    found.append(Change(child, lambda v=value, at=at: v.__setitem__(at, ast.Pass()), True))
                _collect(child, statement, found)


def _deletable(node: ast.AST) -> bool:
    """Statements whose lack is no mere NameError. Docstrings and dataclass fields are not deleted."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        return not all(isinstance(target, ast.Name) for target in node.targets)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break)


def _faults(node: ast.AST) -> Iterator[Callable[[], None]]:
    def setting(name: str, value: Any) -> Callable[[], None]:
        return lambda: setattr(node, name, value)

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPPED:
        yield setting("op", _SWAPPED[type(node.op)]())
    elif isinstance(node, ast.Compare):
        yield setting("ops", [_SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield setting("op", ast.UAdd())
    elif isinstance(node, ast.UnaryOp):
        yield setting("operand", ast.UnaryOp(node.op, node.operand))
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):  # which have such a fault of their own
            yield setting("test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        number = node.value + 1 if node.value + 1 != node.value else node.value / 2
        yield setting("value", not node.value if isinstance(node.value, bool) else number)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield setting("value", ast.Constant(None))


# ---------------------------------------------------------------------------------- running


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a syntax tree."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self._name = f"ppo_hpo.{module.replace('/', '.')}"
        self._path = str(REPOSITORY / "ppo_hpo" / f"{module}.py")
        self._tree = ast.fix_missing_locations(tree)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname == self._name:
            return importlib.util.spec_from_file_location(fullname, self._path, loader=self)
        return None

    def get_filename(self, fullname: str) -> str:
        return self._path

    def exec_module(self, module: Any) -> None:
        exec(compile(self._tree, self._path, "exec"), module.__dict__)


def run_tests(module: str, index: int | None, limit: int) -> tuple[str, float]:
    """Run a module's tests on one of its mutants, or on itself: passed, failed or late, and the CPU seconds.

    ``limit`` is in seconds of CPU, of which other work on the machine takes none; a mutant may wait for three
    times as long.
    """
    started = time.monotonic()
    child = os.fork()
    if not child:
        _become(module, index, limit)
    while time.monotonic() - started < 3 * limit:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            how = {0: "passed", -signal.SIGXCPU: "late"}.get(code, "failed")
            return how, used.ru_utime + used.ru_stime
        time.sleep(0.02)
    # It leads a group of its own, with all that the tests started.
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late", limit


def _become(module: str, index: int | None, limit: int) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        tree = parse(module)
        if index is not None:
            changes(tree)[index].apply()
            silent = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(silent, descriptor)
        sys.meta_path.insert(0, _Finder(module, tree))
        import pytest

        os.chdir(REPOSITORY / "tests")
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(MODULES[module])]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def preload() -> None:
    """Import what the tests import, but for ppo_hpo and the tests themselves."""
    import gymnasium.vector  # noqa: F401
    import numpy.ma  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import scipy.stats  # noqa: F401
    import threadpoolctl  # noqa: F401
    import torch
    from _pytest.config import default_plugins

    for name in default_plugins:
        importlib.import_module(f"_pytest.{name}")
    torch.optim.Adam([torch.zeros(1)])  # the first optimizer imports torch's compiler
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # each costs as much as the fastest tests
    torch.set_num_threads(1)


def sample_of(mutants: dict[str, list[Mutant]], n: int, seed: int) -> list[Mutant]:
    """About ``n`` random mutants, of each module in proportion, but 20 at least, or all that it has."""
    drawn: list[Mutant] = []
    total = sum(map(len, mutants.values()))
    for module, own in mutants.items():
        share = max(20, round(n * len(own) / total))
        # Drawn by the module's name, so that a change of one module leaves the others' mutants as they are.
        drawn += random.Random(f"{seed} {module}").sample(own, min(len(own), share))
    return sorted(drawn, key=lambda m: (m.module, m.line, m.index))


# ------------------------------------------------------------------------------------ page


def page(totals: dict[str, int], outcomes: list[tuple[Mutant, str]]) -> str:
    from benchmarks import machine

    lines = [
        "# What the tests of the numeric modules notice",
        "",
        f"`python benchmarks/mutation.py` wrote this page: a random sample of {len(outcomes)} mutants of "
        f"{sum(totals.values())}, drawn with seed {SEED}. Each ran against the tests of its own module.",
        "",
        f"{machine.sentence(machine.describe())}.",
        "",
        "| module | tests | mutants | sampled | killed | by the time limit | equivalent | not killed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    killed = survivors = 0
    for module, total in totals.items():
        own = [(m, how) for m, how in outcomes if m.module == module]
        dead, late = sum(how != "passed" for _, how in own), sum(how == "late" for _, how in own)
        same = sum(how == "passed" and m.key in EQUIVALENT for m, how in own)
        left = len(own) - dead - same
        numbers = " | ".join(map(str, (total, len(own), dead, late, same, left)))
        lines.append(f"| `{module}` | `{MODULES[module]}` | {numbers} |")
        killed, survivors = killed + dead, survivors + left
    lines += [
        "",
        f"Killed: {killed} of {len(outcomes)}, {killed / len(outcomes):.1%}; without those that are "
        f"equivalent {killed / (killed + survivors):.1%}.",
        "",
        "## Survivors",
        "",
        "| module | line | original | mutant | why |",
        "|---|---|---|---|---|",
    ]
    for mutant, how in outcomes:
        if how == "passed":
            why = EQUIVALENT.get(mutant.key, "**not tested**")
            texts = [f"`{text.replace('|', chr(92) + '|')}`" for text in (mutant.original, mutant.mutated)]
            lines.append(f"| `{mutant.module}` | {mutant.line} | {texts[0]} | {texts[1]} | {why} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--module", default="", help="only modules whose names contain this; all their mutants"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--survivors", action="store_true", help="run those that survived last time again")
    arguments = parser.parse_args()
    mutants = {module: mutants_of(module) for module in MODULES}
    chosen = sample_of(mutants, SAMPLE, SEED)
    if arguments.module:
        chosen = [m for own in mutants.values() for m in own if arguments.module in m.module]
    if arguments.list:
        print("\n".join(map(str, chosen)))
        return
    sys.path.insert(0, str(REPOSITORY))
    preload()
    outcomes = run_all(chosen, again=arguments.survivors)
    killed = sum(how != "passed" for how in outcomes.values())
    print(f"{killed} of {len(outcomes)} killed")
    if not arguments.module:
        totals = {module: len(own) for module, own in mutants.items()}
        RESULT.write_text(page(totals, [(m, outcomes[m.name]) for m in chosen]), encoding="utf-8")


def run_all(chosen: list[Mutant], *, again: bool) -> dict[str, str]:
    """How the tests end on each mutant, by its name. A run that was interrupted goes on from `OUTCOMES`.

    ``again`` repeats the mutants that survived.
    """
    known: dict[str, str] = json.loads(OUTCOMES.read_text(encoding="utf-8")) if OUTCOMES.exists() else {}
    limits: dict[str, int] = {}
    for mutant in chosen:
        how = known.get(mutant.name, "")
        if how and not (again and how == "passed"):
            continue
        if mutant.module not in limits:
            without, seconds = run_tests(mutant.module, None, 100)
            if without != "passed":
                sys.exit(f"the tests of {mutant.module} fail without a mutant")
            limits[mutant.module] = 5 + round(3 * seconds)
        how, _ = run_tests(mutant.module, mutant.index, limits[mutant.module])
        mark = {"passed": "equivalent" if mutant.key in EQUIVALENT else "SURVIVES"}.get(how, how)
        print(f"{mark:10}  {mutant}", flush=True)
        known[mutant.name] = how
        OUTCOMES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return {mutant.name: known[mutant.name] for mutant in chosen}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
