"""Reports of benchmarks: tables for a terminal, a page and the documentation, and files of figures."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}caption{text-align:left;font-weight:600}"
    "th,td{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)


WIDEST = 1000
"""Most characters in a line of a table."""


def cell(value: object) -> str:
    """Format a figure to about three digits; a dash for a missing one.

    Numbers have at most two decimals and no exponent, so that a column can be compared.
    """
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


@dataclass(frozen=True)
class Table:
    """Rows of figures.

    Attributes:
        title: the subject of the rows.
        columns: the headings of the keys that are shown.
        rows: the rows, which may lack keys.
        notes: sentences below the table.
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def cells(self) -> Iterator[list[str]]:
        """Yield the text of each row."""
        for row in self.rows:
            yield [cell(row.get(key)) for key in self.columns]

    def is_number(self, key: str) -> bool:
        """Return whether a column has figures, perhaps as text with their spread."""
        return all(re.match(r"[-–\d]|$", cell(row.get(key))) for row in self.rows)

    def show(self) -> None:
        """Print the table in the terminal, with every figure in full, even if the terminal is narrow."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid

        grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for key, heading in self.columns.items():
            grid.add_column(heading, justify="right" if self.is_number(key) else "left", no_wrap=True)
        for cells in self.cells():
            grid.add_row(*cells)
        console = Console()
        console.width = max(console.width, Console(width=WIDEST).measure(grid).maximum)
        for part in (self.title, grid, *self.notes):
            console.print(part, markup=False, highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown, without title and notes."""
        head, *body = (
            f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (self.columns.values(), *self.cells())
        )
        return "\n".join([head, "|---" * len(self.columns) + "|", *body])

    def html(self) -> str:
        """Return the table as HTML."""
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in self.columns.values())
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in cells)}</tr>\n" for cells in self.cells()
        )
        notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in self.notes)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}\n<tr>{head}</tr>\n{body}</table>\n{notes}"


def conditions(facts: Row) -> str:
    """Return the machine and the versions in one line."""
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, gam_fast {facts['gam_fast']}"


def write_json(path: Path | None, figures: Row) -> None:
    """Write figures to a file, if there is a path."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def panels(count: int, height: float, facts: Row) -> tuple[Figure, list[Any]]:
    """Return a figure of axes below each other, with the machine above; it belongs to no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height * count), layout="constrained")
    figure.suptitle(conditions(facts), fontsize=9)
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def page(title: str, tables: Sequence[Table], chart: bytes, facts: Row) -> str:
    """Return tables, chart and machine as one self-contained HTML page."""
    machine = Table("Machine", {"what": "", "value": ""}, [{"what": key, "value": facts[key]} for key in facts])
    image = base64.b64encode(chart).decode("ascii")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f"{''.join(table.html() for table in tables)}"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{image}">\n{machine.html()}</body></html>\n'
    )
