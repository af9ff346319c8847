"""Which ports on localhost are given to processes."""

import socket

import pytest

from benchmarks.ports import PORTS_EACH, free_port, port_range


@pytest.mark.parametrize("given_out", [(32768, 60999), (49152, 65535), (15000, 61999)])
def test_workers_choose_from_other_ports_than_each_other_and_the_system(given_out: tuple[int, int]) -> None:
    ranges = [port_range(worker, given_out) for worker in ("", "gw0", "gw1", "gw2", "gw3")]
    ports = [port for own in ranges for port in own]
    assert len(ports) == len(set(ports)) == 5 * PORTS_EACH
    assert not set(ports) & set(range(given_out[0], given_out[1] + 1))
    assert min(ports) > 1023 and max(ports) < 65536


def test_there_may_be_no_room_beside_what_the_system_gives_out() -> None:
    assert not port_range("gw1", (1024, 65535))


def test_a_port_that_is_taken_is_not_given() -> None:
    taken = free_port()
    with socket.create_server(("127.0.0.1", taken)):
        found = [free_port() for _ in range(PORTS_EACH)]
    assert taken not in found and len(set(found)) > PORTS_EACH / 2, "they are given in turn"
