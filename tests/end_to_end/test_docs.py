"""The pages of docs/ agree with the code, and their links lead somewhere."""

import configparser
import dataclasses
import re
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from ppo_hpo.cli import main
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import GROUPS, OTHER_SPELLINGS, check_value

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted((REPOSITORY / "experiments").rglob("README.md")),
]
# A link or an image: [text](target).
LINK = re.compile(r"\]\(([^)\s]+)\)")


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


@cache
def anchors_of(page: Path) -> set[str]:
    """What may follow the ``#`` of a link to a page, by GitHub's rule."""
    found: Counter[str] = Counter()
    anchors = set()
    for line in without_code(page).splitlines():
        if heading := re.fullmatch(r"#{1,6} +(.+?) *", line):
            text = LINK.sub("]", heading[1]).lower()
            anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            anchors.add(f"{anchor}-{found[anchor]}" if found[anchor] else anchor)
            found[anchor] += 1
    return anchors


def without_code(page: Path) -> str:
    """A page without its indented and fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?:(?<=\n\n)|\A)(?:(?: {4}.*)?\n)+", "\n", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_relative_link_resolves(page: Path) -> None:
    for target in LINK.findall(without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            file = file / "README.md" if file.is_dir() else file
            assert anchor in anchors_of(file), f"{page} links to {target}, which has no such heading"


def test_every_page_is_in_the_index() -> None:
    index = {(DOCS / target).resolve() for target in LINK.findall(without_code(DOCS / "README.md"))}
    assert {page for page in DOCS.rglob("*.md") if page.name != "README.md"} <= index


@pytest.mark.parametrize("page", [page for page in PAGES if DOCS in page.parents], ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, name in re.findall(r"(?:`(test_\w+\.py)`: )?`(test_\w+)`", text):
        files = REPOSITORY.glob(f"tests/*/{file or '*.py'}")
        assert any(f"def {name}(" in one.read_text(encoding="utf-8") for one in files), name
    for path in re.findall(r"`(?:python )?((?:tests|benchmarks|experiments|ppo_hpo)/[\w/.-]+\.\w+)`", text):
        assert (REPOSITORY / path).is_file(), path


def test_every_command_has_a_section() -> None:
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    usage = main.build_parser().format_help()
    commands = re.findall(r"^    (\w+)(?: |$)", usage, re.MULTILINE)
    assert {"run", "sweep", "completion"} <= set(commands)
    assert set(re.findall(r"^## `(\w+)`: ", page, re.MULTILINE)) == set(commands)


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", DOCS / "how-to" / "orion-hunt.md"], ids=str)
def test_a_second_terminal_finds_the_experiment_by_the_documented_file(page: Path) -> None:
    """`report -c orion.yaml` has no variables of the first terminal, so the file must name the database."""
    blocks = re.findall(r"cat > orion\.yaml <<YAML\n(.*?)\n\s*YAML\n", page.read_text(), re.S)
    assert blocks
    for block in blocks:
        content = yamlio.parse(textwrap.dedent(block), str(page))
        assert content["storage"]["database"] == {"type": "sqlitedb", "host": "$PWD/orion.sqlite"}


def test_every_dependency_is_explained() -> None:
    page = (DOCS / "explanation" / "dependencies.md").read_text(encoding="utf-8")
    setup = configparser.ConfigParser()
    setup.read(DOCS.parent / "setup.cfg")
    extras = setup["options.extras_require"]
    required = [
        setup["options"]["install_requires"],
        *(extras[name] for name in extras if name not in ("test", "lint")),
    ]
    for name in re.findall(r"^([\w-]+)", "\n".join(required), re.MULTILINE):
        assert re.search(rf"\b{name}\b", page, re.IGNORECASE), name
    assert [name for name in extras if f"`{name}`" not in page] == ["lint"]
