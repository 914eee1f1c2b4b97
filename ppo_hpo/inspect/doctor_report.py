"""The report that ``ppo-hpo doctor`` fills in and prints."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Facts and problems that the doctor found.

    Attributes:
        facts: pairs of a label and a text, in the order in which they are printed. A fact that belongs to the
            one before it has an empty label.
        findings: problems, one sentence each, with what to do about it.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def add_fact(self, label: str, text: str) -> None:
        """Add a fact."""
        self.facts.append((label, text))

    def add_finding(self, text: str) -> None:
        """Add a problem."""
        self.findings.append(text)

    def __str__(self) -> str:
        lines = [f"{label:11} {text}".rstrip() for label, text in self.facts]
        count = len(self.findings)
        lines.append(f"\n{count} problem{'' if count == 1 else 's'} found" if count else "\nno problem found")
        return "\n".join([*lines, *(f"  {number}. {text}" for number, text in enumerate(self.findings, 1))])
