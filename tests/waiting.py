"""How tests wait for something that happens elsewhere: until it has, however slow the machine.

There is no deadline here: pytest's own limit finds what never happens, and shows the line that waits.
"""

import time
from collections.abc import Callable

PAUSE_S = 0.02


def until(holds: Callable[[], object], still: Callable[[], object] = lambda: True) -> None:
    """Wait until something holds.

    Parameters
    ----------
    holds
        Whether it does.
    still
        Whether it still can, such as that a process runs; it may raise with what is known.

    Raises
    ------
    AssertionError
        If it cannot any more.
    """
    while not holds():
        assert still() or holds(), "what is waited for cannot come about any more"
        time.sleep(PAUSE_S)
