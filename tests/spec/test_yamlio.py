"""YAML as people write it, and nothing that is more than data."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.errors import UserError

LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # PyYAML alone reads the first six as words.
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-3e-4", -3e-4),
        ("+2e3", 2e3),
        ("5.e-2", 5e-2),
        (".5e1", 5.0),
        ("1.5e-4", 1.5e-4),
        ("0.1", 0.1),
        ("3", 3),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("", None),
        ("none", "none"),
        ("CartPole-v1", "CartPole-v1"),
        ("1e-4x", "1e-4x"),
        ("e4", "e4"),
        ("'1e-4'", "1e-4"),
        ("[1e-4, a]", [1e-4, "a"]),
        ("{a: {b: 1e-4}}", {"a": {"b": 1e-4}}),
        ("lr: orion~loguniform(1e-5, 1e-2)", {"lr": "orion~loguniform(1e-5, 1e-2)"}),
        ("module:EnvId-v0", "module:EnvId-v0"),
    ],
)
def test_read_as_people_mean_it(text: str, value: Any) -> None:
    found = yamlio.parse(text, "it")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\na: 2", ["it: Line 1", "key `a` is given twice"]),
        ("ppo:\n  gamma: 1\n  lr: 2\n  gamma: 3", ["Line 2", "key `gamma` is given twice"]),
        ("x: {a: 1, 'a': 2}", ["key `a` is given twice"]),
        ("1: a", ["keys must be strings", "got 1"]),
        ("true: a", ["keys must be strings", "True"]),
        ("? [a, b]\n: 1", ["keys must be strings", "['a', 'b']"]),
        ("a: &x [1]\nb: *x", ["Line 2", "aliases (*name) are not read", "Write the value out"]),
        ("a: &x {b: 1}\nc:\n  <<: *x", ["Line 3", "aliases"]),
        ("a: &a [*a]", ["aliases"]),
        (LAUGHS, ["Line 2", "aliases"]),
        (
            "!!python/object/apply:os.system ['true']",
            ["Line 1", "tags", "python/object/apply", "plain value"],
        ),
        ("a:\n  !!python/name:os.system ''", ["Line 2", "tags", "python/name:os.system", "are not read"]),
        ("a: !mine 3", ["tags (!mine) are not read"]),
        # Each of these made PyYAML fail with an error that is none of its own.
        ("a: !!timestamp x", ["tags"]),
        ("a: !!bool x", ["tags"]),
        ("a: !!float ''", ["tags"]),
        ("a: !!set {b}", ["tags"]),
        ("a: ! 3", ["tags (!)"]),
        (f"a: {'1:' * 3000}1.5", ["write numbers without underscores or colons"]),
        ("a: 1_0.5", ["write numbers without underscores or colons", "1_0.5"]),
        ("a: [1, 2", ["it is not valid YAML", "line"]),
        ("a: b: c", ["it is not valid YAML"]),
        ("\tx: 1", ["it is not valid YAML"]),
        ("a: 1\n---\nb: 2", ["it is not valid YAML", "single document"]),
        ("a: \x00", ["it is not valid YAML", "special characters"]),
        ("9" * 5000, ["Line 1", "a number of 5000 digits is too long"]),
        ("[" * 100_000, ["Line 1", "nested more than 30 deep"]),
        ("- " * 100_000, ["nested more than 30 deep"]),
        ("{a: " * 31 + "1" + "}" * 31, ["nested more than 30 deep"]),
        ("[" + "a," * 400_000 + "]", ["a configuration has at most 10000 values"]),
        ("[" + "[]," * 300_000 + "]", ["a configuration has at most 10000 values"]),
        ("\n".join(f"k{i}: 1" for i in range(60_000)), ["Line 5000", "at most 10000 values"]),
    ],
)
def test_refused_quickly_with_the_place(text: str, parts: list[str]) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as error:
        yamlio.parse(text, "it")
    assert time.process_time() - started < 2.0
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_tags_run_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    for tag in ("object/apply", "object/new"):
        with pytest.raises(UserError, match="YAML tags"):
            yamlio.parse(f"!!python/{tag}:os.system ['touch {victim}']", "it")
    assert not victim.exists()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    value = {
        "env": {"id": "CartPole-v1", "kwargs": {}},
        "ppo": {"lr": 1e-5, "eps": 1e-08, "target_kl": None, "a": [1, "1e-4", "none", True], "b": 1e300},
    }
    path = tmp_path / "a.yaml"
    path.write_text(yamlio.dump(value))
    assert yamlio.load(path) == value
    assert list(yamlio.load(path)) == ["env", "ppo"]


def test_a_long_row_of_digits_is_read_once() -> None:
    # A pattern that tries again from each of them takes minutes.
    for text in ("1" * 300_000 + "x", "1." + "2" * 300_000 + "x", ":1" * 100_000):
        assert yamlio.parse(f"a: {text}", "it") == {"a": text}


def test_dates_stay_words() -> None:
    for text in ("2001-12-14", "0001-01-01T00:00:00+23:59", "2001-99-99"):
        assert yamlio.parse(text, "it") == text


@pytest.mark.parametrize("text", [".inf", "-.inf", "+.INF", "1.5e999"])
def test_infinity_is_a_number(text: str) -> None:
    assert yamlio.parse(text, "it") == float(text.replace(".inf", "inf").replace(".INF", "inf"))


def test_messages_are_one_short_line() -> None:
    with pytest.raises(UserError) as error:
        yamlio.parse("? '\x1b[2J\u202e" + "a" * 100_000 + "'\n: [\n" + "b" * 100_000, "it")
    text = str(error.value)
    assert len(text) < 2100
    assert text.isprintable()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.yaml cannot be read: No such file or directory\.$"):
        yamlio.load(tmp_path / "nothing.yaml")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        yamlio.load(tmp_path)


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: größer".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml cannot be read: .*utf-8.*can't decode"):
        yamlio.load(path)


def test_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "utf8.yaml"
    path.write_text("name: größer ≥ 東京", encoding="utf-8")
    assert yamlio.load(path) == {"name": "größer ≥ 東京"}


def test_huge_file_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(UserError, match=r"larger than 1048576 bytes: a configuration is smaller"):
        yamlio.load(path)


def test_endless_file_is_not_read() -> None:
    # It tells a size of 0.
    with pytest.raises(UserError, match="/dev/zero is larger than 1048576 bytes"):
        yamlio.load(Path("/dev/zero"))


def test_pipe_is_read(tmp_path: Path) -> None:
    # As a shell's `--config <(...)`.
    read, write = os.pipe()
    try:
        os.write(write, b"a: 1e-4")
        os.close(write)
        assert yamlio.load(Path(f"/dev/fd/{read}")) == {"a": 1e-4}
    finally:
        os.close(read)


@pytest.mark.parametrize("text", ["010", "0x10", "1_000", "1:30", "0b11", "-07"])
def test_whole_numbers_that_mean_another_one_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write whole numbers in decimal digits"):
        yamlio.parse(text, "it")
    assert [yamlio.parse(good, "it") for good in ("0", "10", "-7", "+3")] == [0, 10, -7, 3]


def test_numbers_of_numpys_are_written_as_numbers() -> None:
    given = {
        "a": np.int64(3),
        "b": [np.float32(0.5), np.float64(2.5)],
        "c": np.bool_(True),
        "d": np.str_("3"),
    }
    assert yamlio.parse(yamlio.dump(given), "text") == {"a": 3, "b": [0.5, 2.5], "c": True, "d": "3"}
    with pytest.raises(yaml.representer.RepresenterError):
        yamlio.dump({"a": object()})
