"""Tables on narrow terminals: what they are for, figures and names, is never cut in two."""

import io

import pytest
from rich.console import Console

from edge_client.tables import Columns, print_rows

NAMES = ("plan", "tok/s", "first,\ns", "kB up", "kB down", "MiB", "GFLOP", "energy")
ROWS = [
    (name, *(f"{start + place}.{place}25" for place in range(7)))
    for start, name in ((1000, "one-trip-shared-r64 *"), (20000, "per-layer-r64"))
]


def shown(width: int) -> str:
    file = io.StringIO()
    print_rows(Console(file=file, width=width), Columns(NAMES), ROWS, "figures")
    return file.getvalue()


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20, 5])
def test_every_cell_is_whole_at_any_width(width):
    words = {cell.strip() for line in shown(width).splitlines() for cell in line.replace("┃", "│").split("│")}
    assert {cell for row in ROWS for cell in row} <= words and "…" not in shown(width)
    assert {word for name in NAMES for word in name.split("\n")} <= words


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_no_line_is_longer_than_the_terminal(width):
    assert max(map(len, shown(width).splitlines())) <= width


def test_there_is_one_table_where_it_fits_and_each_of_several_says_which_row_it_is():
    assert shown(200).count("plan") == 1 and shown(200).count("figures") == 1
    narrow = shown(60)
    assert narrow.count("plan") == narrow.count("per-layer-r64") > 1 and narrow.count("figures") == 1
