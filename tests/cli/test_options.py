"""What the options mean: aliases, former names, values that are refused, help texts and shell completion."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator

import pytest

from ppo_hpo.cli.common import Parser
from ppo_hpo.cli.main import build_parser, main


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(arguments)


def every_parser() -> Iterator[tuple[str, Parser]]:
    waiting = [("", build_parser())]
    while waiting:
        name, parser = waiting.pop()
        yield name, parser
        for action in parser._actions:
            if isinstance(action.choices, dict):
                waiting += [(f"{name} {key}".strip(), each) for key, each in action.choices.items()]


@pytest.mark.parametrize(
    ("option", "alias"),
    [
        ("sweep --max-trials 3", "sweep --n-trials 3"),
        ("sweep --workers 3", "sweep --n-jobs 3"),
        ("sweep --checkpoint-store there", "sweep --store there"),
        ("sweep --fidelity fidelity(1,4)", "sweep --epochs fidelity(1,4)"),
        ("sweep --name foo", "sweep --name foo/"),
        ("run --config a --preload", "run --config a --warm"),
        ("run --config a --checkpoint-store there", "run --config a --store there"),
        ("best foo --workers 3", "best foo --n-jobs 3"),
        ("best foo --test-dir there", "best foo --dir there"),
        ("best foo", "best foo/"),
        ("clean foo --checkpoint-store there", "clean foo --store there"),
        ("report foo -c file", "report foo --config file"),
        ("lineage foo --orion-config file", "lineage foo --config file"),
        ("doctor -c file", "doctor --config file"),
        ("preload --stop", "warm --stop"),
    ],
)
def test_aliases_and_former_names(option: str, alias: str) -> None:
    assert vars(parse(*option.split())) == vars(parse(*alias.split()))
    hidden = alias.split()[1 if alias.startswith("warm") else -2]
    if hidden in ("--store", "--warm", "--dir"):
        help_text = dict(every_parser())[option.split()[0]].format_help()
        assert f"{hidden} " not in help_text


def test_epochs_of_a_sweep() -> None:
    assert parse("sweep", "--epochs", "3").epochs == 3
    assert parse("sweep", "--fidelity", "fidelity(1, 4)").epochs == "fidelity(1, 4)"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sweep --epochs many", "argument --epochs: must be a whole number of at least 1, but got 'many'"),
        ("sweep --epochs 2 --fidelity 3", "argument --fidelity: not allowed with argument --epochs"),
        ("sweep --n-jobs 0", "argument --n-jobs: must be a whole number of at least 1, but got '0'"),
        ("sweep --dir=", "argument --dir: must name a directory, but got ''. Write . for the current one"),
        ("best x --top 0", "argument --top: must be a whole number of at least 1, but got '0'"),
        (
            "best x --test-seeds -1",
            "argument --test-seeds: must be a whole number of at least 0, but got '-1'",
        ),
        ("best x --workers 0", "argument --workers: must be a whole number of at least 1, but got '0'"),
        ("best x --test-dir=", "argument --test-dir: must name a directory, but got ''."),
    ],
)
def test_bad_values(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ppo-hpo: error: {message}")
    assert error.endswith(f"See ppo-hpo {command.split()[0]} --help.\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sweep", "Name an environment, as in: ppo-hpo sweep CartPole-v1."),
        ("sweep a.yaml --space b", "Two spaces were given, a.yaml and b. Leave one out."),
        ("sweep A-v0 --env B-v0", "Two environments were given, A-v0 and B-v0. Leave one out."),
    ],
)
def test_what_a_sweep_is_given(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert capsys.readouterr().err.startswith(f"ppo-hpo: error: {message}")


def test_every_help_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parsers = dict(every_parser())
    assert {"sweep", "run", "space copy", "completion"} <= parsers.keys()
    for name, parser in parsers.items():
        assert all(len(line) <= 80 for line in parser.format_help().splitlines()), name
        for action in parser._actions:
            # A command's list of subcommands has a title instead.
            assert action.help or isinstance(action.choices, dict), (name, action)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shell_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="pip install 'ppo-hpo[completion]'")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "orion-config" in script
    assert not re.search(r"--store|\bwarm\b(?!-start)(?!\.md)", script)
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        files = re.findall(r"^(_shtab_\w+)_COMPGEN=_shtab_compgen_files$", script, re.MULTILINE)
        assert {"_shtab_ppo_hpo_run___config", "_shtab_ppo_hpo_sweep_pos_0"} <= set(files)


def test_shell_completion_without_shtab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "ppo-hpo: error: Shell completion needs shtab. Install it: pip install 'ppo-hpo[completion]'"
    )
