"""A cloud that drains sends its edges on, over real TLS: to the same cloud elsewhere, and to nobody else."""

import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloud_server import tokens
from edge_client.connection import Timeouts
from edge_client.credentials import Credentials
from edge_client.model import PrivateLoraForCausalLM
from shared.adapter import Adapter
from tests.integration.answers import answer
from tests.integration.secured import Impostor, Secured, certificates, started

CALLED = "localhost"  # the name that the person gave; everybody else here is known by 127.0.0.1


@dataclass
class Site:
    """Two replicas that are called by one name, and a neighbour with a good certificate for its own."""

    one: Secured  # sends to two
    two: Secured  # sends to the neighbour; its certificate is for the name that is called only
    neighbour: Impostor
    folder: Path
    credentials: Credentials
    edges: list[PrivateLoraForCausalLM] = field(default_factory=list)

    def edge(self, cloud: Secured) -> tuple[PrivateLoraForCausalLM, list[str]]:
        """Return an edge that calls a cloud by its name, with an M that is not zero; and what it says."""
        said: list[str] = []
        model = PrivateLoraForCausalLM.from_cloud(
            f"{CALLED}:{cloud.process.port}",
            config_dir=self.folder, cache_dir=self.folder, credentials=self.credentials, say=said.append,
            timeouts=Timeouts(connect_s=60.0, step_s=120.0, recover_s=600.0),
        )  # fmt: skip
        self.edges.append(model)
        model.set_adapter(Adapter.random(model.adapter.plan, model.adapter.fingerprint, seed=3, std=0.5))
        return model, said

    def drain(self, cloud: Secured) -> None:
        process = cloud.process._process
        assert process is not None
        process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def site(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    names = {"one": (CALLED, "127.0.0.1"), "two": (CALLED,), "neighbour": ("127.0.0.1",)}
    certs = {who: folder / who for who in names}
    for who, own in names.items():
        certificates(certs[who], names=own)
        if who == "one":  # the others are certified by the same CA
            for other in ("two", "neighbour"):
                certs[other].mkdir()
                for file in ("ca.pem", "ca.key"):
                    shutil.copy(certs[who] / file, certs[other] / file)
    token = tokens.add(folder / "tokens.json", "alice")
    roots = (certs["one"] / "ca.pem").read_bytes()
    with Impostor(certs["neighbour"]) as neighbour:
        common = ("--tokens", str(folder / "tokens.json"))
        two = started(small_model, certs["two"], *common, "--successor", neighbour.address)
        one = started(small_model, certs["one"], *common, "--successor", two.process.address)
        two.process.address = f"{CALLED}:{two.process.port}"  # its readiness is asked by its name too
        made = Site(one, two, neighbour, folder, Credentials(tls=True, roots=roots, token=token))
        with one.process, two.process:
            yield made
            for model in made.edges:
                model.close()
    logs = one.process.logs() + two.process.logs()
    assert "Traceback" not in logs and token not in logs, logs[-3000:]


def test_who_shows_the_certificate_of_the_name_that_was_called_is_followed(site: Site) -> None:
    model, said = site.edge(site.one)
    expected = answer(model)
    assert answer(model, lambda: site.drain(site.one)) == expected
    assert model.connection is not None
    assert model.connection.target == f"127.0.0.1:{site.two.process.port}"
    assert len(said) == 1 and "shutting down" in said[0], said
    assert answer(model) == expected, "and goes on there"


def test_a_redirect_to_a_foreign_address_is_refused_and_harms_nobody(site: Site) -> None:
    """The neighbour's certificate is from the same CA, and good for its address: but that was not called."""
    model, said = site.edge(site.two)
    expected = answer(model)
    starting: list[threading.Thread] = []

    def drain_and_start_again() -> None:
        site.drain(site.two)

        def again() -> None:
            process = site.two.process._process
            assert process is not None
            process.wait(120)  # by itself: to be asked twice would cut short what it has to say
            site.two.process.start()

        starting.append(threading.Thread(target=again))
        starting[0].start()

    assert answer(model, drain_and_start_again) == expected, "the edge goes on when its cloud is there again"
    starting[0].join()
    refused = f"{site.neighbour.address}: its certificate is not for {CALLED}; nothing was sent"
    assert any(refused in line for line in said), said
    assert site.neighbour.calls == 0, "nobody has called it, so no token has gone there"
    assert model.connection is not None
    assert model.connection.replicas.addresses == [f"{CALLED}:{site.two.process.port}"]
