"""Tables whose figures are whole on any terminal: what is too wide for one is printed as several.

rich makes columns fit by cutting cells short, and a number that is cut short is no number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Columns:
    """What a table's columns are called, and how they stand.

    Parameters
    ----------
    names
        The header; a line break in a name is one in the header.
    keys
        How many columns say which row it is; they stand first, in each of several tables (count).
    right
        Whether the others are numbers, which stand to the right.
    """

    names: Sequence[str]
    keys: int = 1
    right: bool = True

    def table(self, chosen: Iterable[int], rows: Iterable[Sequence[str]], title: str | None) -> Table:
        """Return the table of these columns, none of which wraps."""
        kept = list(chosen)
        table = Table(title=title, title_justify="left")
        for place in kept:
            justify = "right" if self.right and place >= self.keys else "left"
            table.add_column(self.names[place], justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(row[place] for place in kept))
        return table


def print_rows(
    console: Console, columns: Columns, rows: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """Print rows as one table where it fits, else as several of fewer columns; no cell is cut or wrapped.

    Parameters
    ----------
    console
        Where to; its width decides.
    columns
        Of every row.
    rows
        Cells, as many in each row as there are columns.
    title
        Stands above the first table.
    """
    keys = list(range(columns.keys))
    left = list(range(columns.keys, len(columns.names)))
    while left:
        taken = 1  # however narrow the terminal: then it wraps the lines, and nothing is lost
        while taken < len(left) and _width(console, columns.table(keys + left[: taken + 1], rows, None)) <= (
            console.width
        ):
            taken += 1
        table = columns.table(keys + left[:taken], rows, title)
        table.width = _width(console, table)
        console.print(table, crop=False)
        left, title = left[taken:], None


def _width(console: Console, table: Table) -> int:
    """Return the width at which every cell is on one line (characters)."""
    return table.__rich_measure__(console, console.options.update(max_width=10**6)).maximum
