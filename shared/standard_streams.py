"""Descriptors 0, 1 and 2, which a program may be started without (``<&-``, some service managers).

What is opened next would get their numbers: a socket that then is taken for standard output, or an event
loop that ends the process because it may not close it.
"""

import os


def fill_standard_streams() -> None:
    """Open whatever of the three is closed on the null device; call it before anything else is opened."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # or a child would start without it
    os.close(descriptor)
