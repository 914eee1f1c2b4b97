"""The pages of docs/ agree with the code."""

import dataclasses
import re
from pathlib import Path

import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import GROUPS, OTHER_SPELLINGS, check_value

DOCS = Path(__file__).parents[2] / "docs"


def section_of(group: str) -> str:
    """The section of one group in the reference of hyperparameters."""
    page = (DOCS / "reference" / "hyperparameters.md").read_text(encoding="utf-8")
    found = re.search(rf"^## `{group}`.*?(?=^## )", page, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the page has no section for the group {group}"
    return found[0]


def rows_of(group: str) -> dict[str, str]:
    """Key to the default in its row of key, default, values and meaning."""
    row = r"^\| `(\w+)` \| `([^|]+)` \| [^|]+ \| [^|]+ \|$"
    return dict(re.findall(row, section_of(group), re.MULTILINE))


@pytest.mark.parametrize("group", GROUPS)
def test_every_hyperparameter_is_documented_with_its_default(group: str) -> None:
    rows, record = rows_of(group), GROUPS[group]()
    assert list(rows) == [item.name for item in dataclasses.fields(record)]
    for name, default in rows.items():
        assert check_value(group, name, yamlio.parse(default, name)) == getattr(record, name), name


@pytest.mark.parametrize("group", OTHER_SPELLINGS)
def test_every_second_spelling_is_documented(group: str) -> None:
    for other, name in OTHER_SPELLINGS[group].items():
        assert re.search(rf"^\| `{other}` \| .* \| `{name}`", section_of(group), re.MULTILINE), other
