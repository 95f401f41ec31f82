"""The table of docs/models.md: what works with which family of models. Each cell is a test that ran.

A test has the marker `feature("name")` and a parameter `family`. `pytest ... --write-feature-table` writes the table
from what ran; without it, the last test of test_features.py compares.
"""

from __future__ import annotations

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- feature table: begin -->\n", "<!-- feature table: end -->"
COLLECTED = pytest.StashKey[dict]()
OUTCOMES = pytest.StashKey[dict]()


def cell_of(item) -> tuple[str, str] | None:
    """(feature, family) of a test; None for one that is no cell."""
    marker, call = item.get_closest_marker("feature"), getattr(item, "callspec", None)
    if marker is None or call is None or "family" not in call.params:
        return None
    return marker.args[0], call.params["family"]


def note_collected(config, items) -> None:
    """Remember all cells, and the files they come from, before any are deselected."""
    config.stash[COLLECTED] = {cell: item.path.name for item in items if (cell := cell_of(item))}
    config.stash[OUTCOMES] = {}


def note_outcome(item, report) -> None:
    """A cell works if each of its tests passed in all phases; one that is skipped does not."""
    cell = cell_of(item)
    if cell is not None and (report.when == "call" or not report.passed):
        outcomes = item.config.stash[OUTCOMES]
        outcomes[cell] = outcomes.get(cell, True) and report.passed


def table_of(cells) -> str:
    """Markdown: a row for each feature, a column for each family, in their order of appearance."""
    features, families = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    rows = [["", *families], ["---"] * (len(families) + 1)]
    for feature in features:
        rows.append([feature, *({True: "yes", False: "no"}.get(cells.get((feature, f)), "") for f in families)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def committed() -> str:
    """The table as it is in the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def cells_in(table: str) -> dict[tuple[str, str], bool]:
    """The cells of a table that say yes or no."""
    rows = [[text.strip() for text in line.split("|")[1:-1]] for line in table.splitlines()]
    families = rows[0][1:]
    found = {}
    for feature, *marks in rows[2:]:
        found |= {(feature, family): mark == "yes" for family, mark in zip(families, marks, strict=True) if mark}
    return found


def write(outcomes) -> None:
    """Put the table of what ran into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table_of(outcomes) + END + rest.partition(END)[2])
