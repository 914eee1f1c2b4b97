"""Files of somebody else's: nothing in them is executed, leads elsewhere, or takes much before it is refused.

Hostile files are read in a process of their own, whose memory and CPU time are looked at. The fuzz tests take
the number of examples from PPO_HPO_FUZZ (150): 100,000 have been run by hand.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_hpo import PPO
from ppo_hpo.cli.main import main
from ppo_hpo.ppo.task_state import load_checkpoint
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import GROUPS, TrialConfig, field_names
from ppo_hpo.spec.errors import CheckpointError, UserError
from ppo_hpo.spec.results import evaluation_columns
from ppo_hpo.spec.space import fill, read_space
from ppo_hpo.state import ownership
from ppo_hpo.state.checkpoint import VERSION, Checkpoint, Storage, from_bytes, to_bytes
from tests.runs import run_quietly

REPOSITORY = Path(__file__).parents[2]
FUZZ = settings(
    max_examples=int(os.environ.get("PPO_HPO_FUZZ", "150")),
    deadline=None,
    database=None,
    derandomize="PPO_HPO_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
TINY = TrialConfig.from_mapping(
    {
        "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
        "task": {"epochs": 2, "steps_per_epoch": 128, "eval_episodes": 2},
        "model": {"width": 8, "depth": 1},
        "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 1},
    }
)
NAME = "checkpoint-000001.safetensors"


def forge(meta: str | dict[str, Any], tensors: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """A file of somebody who knows the format, digest and all."""
    text = meta if isinstance(meta, str) else json.dumps(meta)
    whole = {**(tensors or {}), "__metadata__": {"ppo_hpo": text, "sha256": "0" * 64}}
    header = json.dumps(whole, ensure_ascii=False).replace(": ", ":").encode(errors="surrogatepass")
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + data
    digest = hashlib.sha256(content).hexdigest().encode()
    at = content.rfind(b'"sha256":"') + 10
    return content[:at] + digest + content[at + 64 :]


def claim(shape: list[int], size: int, kind: str = "F32") -> dict[str, Any]:
    return {"w": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}


GOOD = {"version": VERSION, "epoch": 1}


class Bomb:
    def __init__(self, victim: str) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.victim}",))


def hostile_checkpoints(victim: str) -> dict[str, bytes]:
    """What must be refused by the loader itself."""
    nan = np.array([1.0, np.nan], np.float32).tobytes()
    many = (11 << 20) // 3
    return {
        "pickle": pickle.dumps(Bomb(victim)),
        "header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}" * 100,
        "2^60 elements": forge(GOOD, claim([1 << 60], 8), bytes(8)),
        "2^60 elements, and offsets": forge(GOOD, claim([1 << 60], 1 << 62), bytes(8)),
        "sizes that overflow": forge(GOOD, claim([1 << 32, 1 << 32, 4], 8), bytes(8)),
        "negative sizes": forge(GOOD, claim([-1, -2], 8), bytes(8)),
        "no such type": forge(GOOD, claim([8], 8, "F8_E5M2"), bytes(8)),
        "offsets outside": forge(GOOD, claim([2], 1 << 40), bytes(8)),
        "not finite": forge(GOOD, claim([2], 8), nan),
        "NaN in the metadata": forge('{"version": 1, "epoch": 1, "seconds": NaN}'),
        "infinity in the metadata": forge('{"version": 1, "epoch": 1, "seconds": 1e999}'),
        "a number beyond a float": forge(f'{{"version": 1, "epoch": 1, "seconds": {"9" * 400}}}'),
        "a number too long for Python": forge(f'{{"version": 1, "epoch": 1, "seconds": {"9" * 5000}}}'),
        "deep": forge('{"version": 1, "epoch": 1, "a": ' + "[" * 400 + "]" * 400 + "}"),
        "deeper": forge("[" * 1_000_000),
        "deep header": (1_000_000).to_bytes(8, "little") + b"[" * 1_000_000,
        "many values": forge('{"version": 1, "epoch": 1, "a": [' + "[]," * many + "0]}"),
        "many values in the header": (3 * many + 2).to_bytes(8, "little") + b"[" + b"[]," * many + b"]",
        "wide letters": forge("\U0001f600" + "a" * (11 << 20)),
        "long header": forge("a" * (40 << 20)),
        "epoch of another name": forge({"version": VERSION, "epoch": 7}),
    }


def hostile_spaces(victim: str) -> dict[str, str]:
    laughs = "a: &a [lol, lol]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    lr = "optimizer: {{lr: 'orion~{}'}}".format
    return {
        "a tag": f"!!python/object/apply:os.system ['touch {victim}']",
        "a tag in a value": f"env: {{id: !!python/object/new:os.system ['touch {victim}']}}",
        "a billion laughs": laughs,
        "an alias to itself": "env: &a {kwargs: *a}",
        "a merge": "env: &a {id: x}\ntask:\n  <<: *a",
        "huge": "#" * (2 << 20),
        "many values": "ppo: [" + "1," * 300_000 + "]",
        "many keys": "ppo:\n" + "".join(f"  k{i}: 1\n" for i in range(90_000)),
        "deep": "[" * 500_000,
        "deep mappings": "a: {" * 100_000,
        "digits": f"ppo: {{gamma: {'1' * 500_000}x}}",
        "a long key": f"ppo: {{? '{'k' * 500_000}' : 1}}",
        "code for a prior": lr(f'__import__("os").system("touch {victim}")'),
        "code in a prior": lr(f'uniform(0, __import__("os").system("touch {victim}"))'),
        "code in an option": lr(f'uniform(0, 1, default_value=__import__("os").system("touch {victim}"))'),
        "code behind a prior": lr(f'uniform(0, 1) or __import__("os").system("touch {victim}")'),
        "code in a choice": f'env: {{id: \'orion~choices([__import__("os").system("touch {victim}")])\'}}',
        "classes of a prior": lr("uniform.__class__.__mro__"),
        "code in a fidelity": f"task: {{epochs: 'orion~fidelity(1, open(chr(47) + \"{victim}\"))'}}",
        "power of a prior": lr("uniform(0, 9**9**9)"),
        "long strings of a prior": lr('choices(["a"] * 999999999)'),
        "deep prior": lr("(" * 200_000),
        "minus signs": lr("uniform(" + "-" * 100_000 + "1, 2)"),
        "digits of a prior": lr("uniform(0, " + "9" * 3900 + ")"),
        "precision": lr("uniform(0, 1, precision=999999999)"),
        "power of an argument": "env: {kwargs: {leak: 'orion~uniform(1, 9**9**9)'}}",
        "code in an argument": f"env: {{kwargs: {{a: 'orion~choices([open(chr(47) + \"{victim}\")])'}}}}",
        "fidelity": "task: {epochs: 'orion~fidelity(1, 999999999999)', max_epochs: 999999999999}",
        "environments": "env: {n_envs: 1152921504606846976}",
        "width": "model: {width: 1152921504606846976}",
        "network": "model: {width: 16384, depth: 64}",
        "threads": "task: {threads: 1000000}",
        "path for a module": "env: {id: '../../evil:Env-v0'}",
        "relative module": "env: {id: '.evil:Env-v0'}",
        "path for a group": "'../../x': {a: 1}",
        "path for a key": "ppo: {'../../x': 1}",
        "terminal": 'ppo: {"\\e[2J\\n\\u202e": 1}',
        "infinite": "optimizer: {lr: .inf}",
        "no number": "optimizer: {lr: .nan}",
    }


CHILD = """
import json, os, resource, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from ppo_hpo.state.checkpoint import read
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import read_space
from ppo_hpo.spec import yamlio
import safetensors.numpy
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    for name, do in (
        ("read", lambda: read(path / "checkpoint-000001.safetensors")) if path.is_dir() else
        ("space", lambda: read_space(str(path))),
        ("check", lambda: None) if path.is_dir() else
        ("trial", lambda: TrialConfig.from_mapping(yamlio.load(path))),
    ):
        began, error = time.process_time(), None
        try:
            do()
        except UserError as failure:
            error = str(failure)
        found[path.name + " " + name] = (error, time.process_time() - began)
# Not getrusage, which counts what this process was before it became Python.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([found, int(peak.split()[1]) // 1024]))
"""


def child(directory: Path) -> dict[str, str | None]:
    """What the loaders say of the files in a directory; quickly, and without much memory."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, mebibytes = json.loads(done.stdout)
    assert mebibytes < 200, mebibytes
    slow = {name: seconds for name, (_, seconds) in found.items() if seconds >= 1.0}
    assert not slow
    return {name: error for name, (error, _) in found.items()}


def test_hostile_checkpoints_are_refused_quickly(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    cases = hostile_checkpoints(str(victim))
    for name, content in cases.items():
        (tmp_path / "cases" / name).mkdir(parents=True)
        (tmp_path / "cases" / name / NAME).write_bytes(content)
    for name, make in (
        ("a link", lambda path: path.symlink_to("/dev/zero")),
        ("a pipe", os.mkfifo),
        ("a terabyte", lambda path: (path.touch(), os.truncate(path, 1 << 40))),
    ):
        (tmp_path / "cases" / name).mkdir()
        make(tmp_path / "cases" / name / NAME)
    said = child(tmp_path / "cases")
    assert len(said) == 2 * (len(cases) + 3)
    for name, error in said.items():
        if name.endswith("read"):
            assert error is not None, name
            assert len(error) < 2100
            assert error.isprintable()
    assert "a link read" in said
    assert str(said["a link read"]).endswith("cannot be read: it is a link.")
    assert str(said["a pipe read"]).endswith("cannot be read: it is not a regular file.")
    assert "its header has more than 600000 values" in str(said["many values read"])
    assert "its header is larger than 16777216 bytes" in str(said["long header read"])
    assert "not finite: w holds NaN" in str(said["not finite read"])
    assert not victim.exists()


def test_hostile_spaces_are_refused_quickly(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    (tmp_path / "cases").mkdir()
    cases = hostile_spaces(str(victim))
    for name, text in cases.items():
        (tmp_path / "cases" / f"{name}.yaml").write_text(text)
    said = child(tmp_path / "cases")
    assert len(said) == 2 * len(cases)
    for name, error in said.items():
        # What only the combination makes too much is found when the values are filled in.
        if name != "network.yaml space":
            assert error is not None, name
            assert len(error) < 2200
            assert error.isprintable()
    assert not victim.exists()


@pytest.mark.parametrize("name", ["a tag", "a billion laughs", "code in a prior", "terminal", "width"])
def test_the_command_says_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim, path = tmp_path / "touched", tmp_path / "space.yaml"
    path.write_text(hostile_spaces(str(victim))[name])
    for command in (
        ["space", "check", str(path)],
        ["run", "--config", str(path), "--dir", str(tmp_path / "t")],
    ):
        assert main(command) == 2
        out, error = capsys.readouterr()
        assert not out
        assert error.startswith("ppo-hpo: error: ")
        assert error.count("\n") == 1
    assert not victim.exists()
    assert not (tmp_path / "t").exists()


def test_space_check_tells_which_module_a_good_space_imports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("env: {id: 'my.games:Chess-v0'}\noptimizer: {lr: 'orion~loguniform(1e-4, 1e-2)'}")
    assert main(["space", "check", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{path}: searches 1 hyperparameter. All priors are valid and run no code. Trials train on "
        f"my.games:Chess-v0, which imports the module my.games.\n"
    )
    assert main(["space", "check", "classic-control"]) == 0
    assert "imports" not in capsys.readouterr().out


def test_what_orion_evaluates_again_is_what_was_checked(tmp_path: Path) -> None:
    """Orion saves a space as text and evaluates that too: quotes in a choice do not get out of it."""
    from orion.core.io.space_builder import SpaceBuilder

    wild = "x', open('/nothing', 'w'), '\\"
    path = tmp_path / "space.yaml"
    path.write_text(yamlio.dump({"env": {"id": f"orion~choices([{wild!r}, {'b' + chr(34)!r}])"}}))
    space = SpaceBuilder().build(read_space(str(path)).priors)
    again = SpaceBuilder().build({"env.id": space["env.id"].get_prior_string()})
    assert list(again["env.id"].categories) == list(space["env.id"].categories) == [wild, 'b"']


# ------------------------------------------------------------------ what a trial makes of them


def state() -> dict[str, Any]:
    """Parts of a good state of `TINY` after one epoch."""
    task = PPO.from_config(TINY, "cpu")
    task.fit(1)
    task.finish()
    found = task.state_dict()
    progress = found.pop("progress")
    return {"arrays": {name: value.numpy() for name, value in found.items()}, "meta": progress}


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return state()


def checkpoint(good: dict[str, Any], arrays: dict[str, Any] | None = None, **meta: Any) -> Checkpoint:
    whole = {**{k: v for k, v in good["meta"].items() if k != "epoch"}, **meta}
    return Checkpoint(1, {**good["arrays"], **(arrays or {})}, whole)


def wrong_states(good: dict[str, Any]) -> dict[str, tuple[Checkpoint, str]]:
    rows = good["meta"]["curve"]
    escape = "../../../tmp/x"
    deep: Any = 1
    for _ in range(30):
        deep = {"a": deep}
    return {
        "a name that leads elsewhere": (
            checkpoint(good, {escape: np.ones(2)}),
            "unknown entries: ../../../tmp/x",
        ),
        "a name with an escape": (checkpoint(good, {"\x1b[2J\n": np.ones(2)}), r"unknown entries: \x1b[2J\n"),
        "another shape": (
            checkpoint(good, {"model.actor.0.weight": np.ones((3, 3), np.float32)}),
            "does not fit",
        ),
        "another type": (checkpoint(good, uid=["../x"]), "does not say whose it is"),
        "no identity": (checkpoint(good, identity=None), "does not say whose it is"),
        "a lineage that is none": (checkpoint(good, lineage="x"), "does not say whose it is"),
        "deep": (checkpoint(good, hyperparameters={"ppo": deep}), "belongs to other hyperparameters"),
        "no curve": (checkpoint(good, curve=[]), "does not lead to its epoch"),
        "a curve of words": (
            checkpoint(good, curve=[rows[0], rows[1] | {"return_mean": "x"}]),
            "contains an invalid row",
        ),
        "a curve that overflows": (
            checkpoint(good, curve=[rows[0], rows[1] | {"return_mean": 1.7e308}]),
            "contains an invalid row",
        ),
        "a curve without a column": (
            checkpoint(good, curve=[rows[0], {"epoch": 1}]),
            "contains an invalid row",
        ),
        "larger than the state can be": (
            checkpoint(good, {"w": np.zeros(30 << 20, np.uint8)}),
            "is larger than",
        ),
    }


WRONG = list(wrong_states({"arrays": {}, "meta": {"curve": [{}, {}]}}))


@pytest.mark.parametrize("name", WRONG)
def test_a_trial_refuses_an_invalid_state(
    name: str, good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, reason = wrong_states(good)[name]
    (tmp_path / "c.yaml").write_text(yamlio.dump(TINY.to_mapping()))
    directory = tmp_path / "inner" / "trial"
    Storage(directory).save(wrong)
    before = {path for path in tmp_path.rglob("*") if directory not in path.parents}
    code = main(["run", "--config", str(tmp_path / "c.yaml"), "--dir", str(directory), "--device", "cpu"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.splitlines()[-1].startswith("ppo-hpo: error: ")
    assert "Traceback" not in error
    assert reason in error.splitlines()[-1]
    assert {path for path in tmp_path.rglob("*") if directory not in path.parents} == before


@pytest.mark.parametrize("name", ["log.txt", "timing.jsonl", "lock", "writer"])
def test_a_link_in_the_directory_is_not_written_through(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "mine"
    outside.mkdir()
    (outside / "000001").mkdir()
    (outside / "file").write_text("mine")
    directory = tmp_path / "trial"
    directory.mkdir()
    (directory / name).symlink_to(outside if name == "writer" else outside / "file")
    with pytest.raises(UserError, match=rf"{name} is a link, which would be written through"):
        run_quietly(TINY, directory)
    assert sorted(path.name for path in outside.iterdir()) == ["000001", "file"]
    assert (outside / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["config.yaml", "curve.jsonl", "results.json", "checkpoint-000001.safetensors"]
)
def test_a_link_under_a_files_name_is_replaced(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "mine"
    outside.write_text("mine")
    directory = tmp_path / "trial"
    directory.mkdir()
    (directory / name).symlink_to(outside)
    if name.startswith("checkpoint"):
        with pytest.raises(CheckpointError, match="it is a link"):
            run_quietly(TINY, directory)
    else:
        run_quietly(TINY, directory)
        assert not (directory / name).is_symlink()
    assert outside.read_text() == "mine"


def test_siblings_are_not_looked_for_elsewhere(tmp_path: Path) -> None:
    """The index is made of names; one that is a link to another experiment's trial is not followed."""
    trials, elsewhere = tmp_path / "trials", tmp_path / "elsewhere"
    run_quietly(TINY.replace(task={"epochs": 1, "max_epochs": 2}), elsewhere)
    index = trials / ".ppo_hpo" / TINY.identity()[:32]
    index.mkdir(parents=True)
    (trials / "a").symlink_to(elsewhere)
    for name in ("a", "nothing", "..."):
        (index / name).touch()
    outcome = run_quietly(TINY, trials / "b", siblings=trials)
    assert outcome.statistics["continued"] == 0.0
    (trials / "a").unlink()
    elsewhere.rename(trials / "a")
    outcome = run_quietly(TINY, trials / "c", siblings=trials)
    assert outcome.statistics["continued"] == 1.0


def test_names_in_a_store_of_others_do_no_harm(tmp_path: Path) -> None:
    place = tmp_path / "s" / "identities" / TINY.identity()[:32]
    place.mkdir(parents=True)
    for name in ("..", "...", "a b", ".x", "-", "x" * 200):
        if name != "..":
            (place / name).touch()
    outcome = run_quietly(TINY, tmp_path / "t", checkpoint_store=str(tmp_path / "s"))
    assert outcome.statistics["continued"] == 0.0


def test_what_is_too_much_to_read_is_not_written() -> None:
    row = {"epoch": 1, "env_steps": 1, **evaluation_columns([1.2345678901234567], [4])}
    row |= {f"column_{number}": 1.2345678901234567 for number in range(16)}
    most = {"curve": [row] * 10_001}
    assert from_bytes(to_bytes(Checkpoint(10_000, {}, most)), "it").meta == most
    with pytest.raises(CheckpointError, match="is not saved: its header has more than 600000 values"):
        to_bytes(Checkpoint(1, {}, {"curve": [0] * 700_000}))
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    with pytest.raises(CheckpointError, match="is not saved: it is nested more than 40 deep"):
        to_bytes(Checkpoint(1, {}, {"a": deep}))


# ------------------------------------------------------------------------------- fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
TENSORS = st.dictionaries(
    st.text(max_size=8) | st.sampled_from(["__metadata__", "w", "../w"]),
    JSON
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(
                ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F4"]
            )
            | st.text(max_size=4),
            "shape": st.lists(st.integers(-2, 5) | st.integers(), max_size=4) | JSON,
            "data_offsets": st.lists(st.integers(0, 64) | st.integers(), max_size=3) | JSON,
        }
    ),
    max_size=3,
)
WHOLE = to_bytes(Checkpoint(3, {"w": np.arange(8.0), "n": np.array(3)}, {"uid": "me", "curve": [{"a": 1}]}))


def one_line(error: Exception) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 2200


def only(kind: type[Exception], do: Callable[[], Any]) -> None:
    """Nothing but one kind of error comes out, and it is one line."""
    try:
        do()
    except kind as error:
        one_line(error)


@FUZZ
@given(st.binary(max_size=400))
def test_fuzz_bytes(content: bytes) -> None:
    only(CheckpointError, lambda: from_bytes(content, "it"))
    only(CheckpointError, lambda: from_bytes(len(content).to_bytes(8, "little") + content, "it"))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_fuzz_damage_by_somebody_who_fixes_the_digest(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(WHOLE)
    for place, value in changes:
        damaged[place] = value
    at = damaged.rfind(b'"sha256":"')
    if at >= 0:
        damaged[at + 10 : at + 74] = b"0" * 64
        damaged[at + 10 : at + 74] = hashlib.sha256(bytes(damaged)).hexdigest().encode()
    only(CheckpointError, lambda: from_bytes(bytes(damaged), "it"))


@FUZZ
@given(JSON, TENSORS, st.binary(max_size=64))
def test_fuzz_headers_with_a_right_digest(meta: Any, tensors: dict[str, Any], data: bytes) -> None:
    whole = {"version": VERSION, "epoch": 1, **(meta if isinstance(meta, dict) else {"a": meta})}
    tensors.pop("__metadata__", None)
    for text in (whole, json.dumps(meta)):
        content = forge(text, tensors, data)
        only(CheckpointError, lambda content=content: from_bytes(content, "it"))  # type: ignore[misc]


@pytest.fixture(scope="module")
def task() -> PPO:
    return PPO.from_config(TINY, "cpu")


GOOD_STATE = state()


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["curve", "hyperparameters", "identity", "lineage", "seconds", "uid"]),
        JSON | st.lists(st.fixed_dictionaries({"epoch": st.integers(0, 3)}), max_size=3) | st.just(None),
        max_size=3,
    ),
    st.sets(st.sampled_from(sorted(GOOD_STATE["arrays"])), max_size=2),
    st.dictionaries(
        st.sampled_from([*sorted(GOOD_STATE["arrays"]), "w", "../w"]),
        st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=4).map(
            lambda values: np.array(values, np.float32)
        ),
        max_size=2,
    ),
)
def test_fuzz_states(task: PPO, meta: dict[str, Any], without: set[str], arrays: dict[str, Any]) -> None:
    found = checkpoint(GOOD_STATE, arrays)
    found = Checkpoint(1, {k: v for k, v in found.arrays.items() if k not in without}, {**found.meta, **meta})

    def go_on() -> None:
        again = from_bytes(to_bytes(found), "it")
        ownership.check_owner(again.meta, again.epoch, TINY.identity_mapping(), None, "memory")
        load_checkpoint(again, task.agent, TINY, logging.getLogger("a test's"))

    try:
        only(CheckpointError, go_on)
    except ValueError as error:
        # What JSON cannot say was never in a file.
        assert "JSON" in str(error)  # noqa: PT017
    finally:
        task.bad_state = False


KEYS = [key for group in GROUPS for key in field_names(group)]
PARTS = """
orion~uniform(0,1) orion~choices([1,2]) orion~fidelity(1,4) none null true 1e5 1e999 .nan .inf 0x1 1:2
1:2.5 1_0 2001-01-01 !!int !!float !x &a *a << = ~ - ? : { } [ ] , | > # % @ ` --- ... " ' \\ '' "" <<: *a
"""
WORDS = st.sampled_from([*GROUPS, *KEYS, *PARTS.split(), " ", "  ", "\n", "\n  ", "\t", ": ", "- ", "? "])


def read_all(path: Path) -> None:
    only(UserError, lambda: TrialConfig.from_mapping(yamlio.load(path)))
    space = None
    try:
        space = read_space(str(path))
    except UserError as error:
        one_line(error)
    if space is not None:
        only(UserError, lambda: TrialConfig.from_mapping(fill(space, {})))


@FUZZ
@given(st.lists(WORDS | st.text(max_size=6), max_size=25).map("".join))
def test_fuzz_text_of_spaces(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    read_all(path)


VALUES = (
    JSON
    | st.integers(-(10**30), 10**30)
    | st.sampled_from(["none", "linear", "auto", "relu", 1, 2, 64, 0.5, 1e999, -1, True])
    | st.builds(
        "orion~{}({}{})".format,
        st.sampled_from(["uniform", "loguniform", "choices", "fidelity", "normal", "", "np.x", "open"]),
        st.text("0123456789.,-+e[](){}'\"\\ abc*_:", max_size=25) | JSON.map(repr),
        st.sampled_from(
            ["", ", discrete=True", ", precision=3", ", default_value=1", ", base=4", ", **{}", ", shape=2"]
        ),
    )
)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from([*GROUPS, "other"]),
        VALUES | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES, max_size=4),
        max_size=3,
    )
)
def test_fuzz_values_of_spaces(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-values.yaml"
    path.write_bytes(yamlio.dump(value).encode(errors="surrogatepass"))
    read_all(path)
    only(UserError, lambda: TrialConfig.from_mapping(value))
    # A key of the right group, so that the value's own rule is reached.
    for group in GROUPS:
        for item in list(value.values())[:1]:
            for key in field_names(group)[:3]:
                only(UserError, lambda g=group, k=key, v=item: TrialConfig.from_mapping({g: {k: v}}))  # type: ignore[misc]


def test_the_bound_of_memory_can_be_broken(tmp_path: Path) -> None:
    """The same bytes, read without a look at them first, take more than is allowed."""
    code = CHILD.replace("import safetensors.numpy", "json.loads('[' + '[],' * (4 << 20) + '0]')")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)[1] > 200
