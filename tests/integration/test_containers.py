"""What the containers run, without containers: the images' files alone, their commands, compose's settings.

Only folders, ports and the model are replaced. What runs may write to what is a volume, and nowhere else.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from benchmarks.ports import free_port
from benchmarks.processes import ROOT
from cloud_server.probes import LIVENESS, health_of
from tests.integration.raw_edge import RawEdge
from tests.unit.test_deployment import environment, expressions, of
from tests.waiting import until

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
COMMANDS = {"cloud": "cloud_server", "edge": "edge_client"}


class Image:
    """The files that an image holds, and the surroundings in which its commands run.

    Parameters
    ----------
    side
        Which Dockerfile: cloud or edge.
    replaced
        Paths and addresses of the image, and what stands for them here.
    """

    def __init__(self, side: str, folder: Path, replaced: dict[str, str]) -> None:
        self.file, self.folder, self.replaced = DOCKER / f"{side}.Dockerfile", folder, replaced
        for rest in of(self.file, "COPY"):
            *sources, target = rest.split()
            for source in sources:
                place = folder / "app" / (target if len(sources) == 1 else source)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
        for name in ("bin", "home", "tmp"):
            (folder / name).mkdir()
        absent = {"benchmarks", "tests", *COMMANDS.values()} - {COMMANDS[side]}
        text = f"import sys; sys.path.insert(0, {str(folder / 'app')!r}); "
        text += f"sys.modules.update(dict.fromkeys({sorted(absent)!r})); "  # None: cannot be imported
        text += f"from {COMMANDS[side]}.cli import main; main()"
        command = folder / "bin" / f"privatelora-{side}"
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(text)} "$@"\n')
        command.chmod(0o755)
        self.tree = self._files()

    def here(self, text: str) -> str:
        for there, here in self.replaced.items():
            text = text.replace(there, here)
        return text

    def surroundings(self, **compose: str) -> dict[str, str]:
        """Return the environment of a container, and nothing of this process's own."""
        own = {name: self.here(value) for name, value in (environment(self.file) | compose).items()}
        own["PATH"] = f"{self.folder / 'bin'}:/usr/bin:/bin"
        places = {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}
        return {**own, **places, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(self.folder / "tmp")}

    def argv(self, instruction: str) -> list[str]:
        """Return the words of ENTRYPOINT, CMD or the command in HEALTHCHECK."""
        found = re.search(r"\[.*\]", of(self.file, instruction)[0])
        assert found
        return [self.here(word) for word in json.loads(found[0])]

    def _files(self) -> set[Path]:
        return {path for name in ("app", "home") for path in (self.folder / name).rglob("*")}

    def untouched(self) -> bool:
        return self._files() == self.tree


@pytest.fixture(scope="module")
def deployed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Make keys and start the cloud as compose does."""
    folder = tmp_path_factory.mktemp("deployed")
    ports = {port: str(free_port()) for port in ("50051", "50052", "9464")}
    for name in ("ca", "cloud", "edge", "cache", "data"):
        (folder / "keys" / name).mkdir(parents=True)
    common = {f":{port}": f":{free}" for port, free in ports.items()}
    common |= {"0.0.0.0": "127.0.0.1", "smollm2-135m-instruct": str(small_model)}
    cloud = Image(
        "cloud", folder / "cloud", {**common, "/keys/": f"{folder}/keys/", "/cache": f"{folder}/keys/cache"}
    )
    edge = Image(
        "edge",
        folder / "edge",
        {**common, "cloud:": "127.0.0.1:", "/keys/": f"{folder}/keys/edge/", "/data": f"{folder}/keys/data"},
    )

    def make_keys() -> None:
        keys = COMPOSE["keys"]
        words = [str(DOCKER / "make-keys.sh"), *map(cloud.here, keys["entrypoint"][1:]), *keys["command"]]
        done = subprocess.run(words, env=cloud.surroundings(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    make_keys()
    token = (folder / "keys" / "edge" / "token").read_text()
    before = (folder / "keys" / "cloud" / "server.pem").read_bytes()
    make_keys()
    assert (folder / "keys" / "edge" / "token").read_text() == token
    assert (folder / "keys" / "cloud" / "server.pem").read_bytes() != before
    command = [*cloud.argv("ENTRYPOINT"), *map(cloud.here, COMPOSE["cloud"]["command"])]
    command += ["--rank", "8"]  # the small model's heads are narrower than the default rank
    log = folder / "log"
    surroundings = cloud.surroundings(**COMPOSE["cloud"]["environment"])
    surroundings["PRIVATELORA_CLOUD_DRAIN_TIMEOUT_S"] = "600"  # the test says when the end comes
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=surroundings,
            cwd=cloud.folder / "app",
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:

        def is_healthy() -> bool:
            check = cloud.argv("HEALTHCHECK")
            return not subprocess.run(check, env=surroundings, capture_output=True, check=False).returncode

        def still() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            return True

        until(is_healthy, still)
        yield {
            "cloud": cloud,
            "edge": edge,
            "ports": ports,
            "log": log,
            "process": process,
            "keys": folder / "keys" / "edge",
        }
    finally:
        process.kill()
        process.wait()


def test_the_edge_of_compose_gets_in(deployed: dict[str, Any]) -> None:
    edge: Image = deployed["edge"]
    surroundings = edge.surroundings(**COMPOSE["edge"]["environment"])
    done = subprocess.run(
        [*edge.argv("ENTRYPOINT"), "doctor", "--no-link", "--json"],
        env=surroundings, cwd=edge.folder / "app", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {one["check"]: one for one in json.loads(done.stdout)["clouds"][0]["checks"]}
    assert checks["tls"]["facts"]["names"] == COMPOSE["keys"]["command"]
    assert "takes this edge's token" in checks["token"]["says"]
    assert edge.untouched()
    default = subprocess.run(
        [*edge.argv("ENTRYPOINT"), *edge.argv("CMD")],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert default.returncode == 0 and "doctor" in default.stdout


def test_every_metric_that_is_drawn_or_watched_is_there(deployed: dict[str, Any]) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{deployed['ports']['9464']}/metrics", timeout=60
    ) as answer:
        text = answer.read().decode()
    known = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE):
        known |= {f"{name}{end}" for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    used = {name for expr in expressions() for name in re.findall(r"\b(?:privatelora|process)_\w+", expr)}
    assert used and used <= known, sorted(used - known)


def test_probes_need_no_certificate_and_get_nothing_else(deployed: dict[str, Any]) -> None:
    probes, served = (f"127.0.0.1:{deployed['ports'][port]}" for port in ("50052", "50051"))
    for service in ("", "privatelora.v1.PrivateLoraService", LIVENESS):
        assert health_of(probes, service, 60.0) == "SERVING"
    assert health_of(probes, "another", 60.0) == "NOT_FOUND"
    assert health_of(served) == "UNAVAILABLE", "in clear to the port with TLS"
    with grpc.insecure_channel(probes) as channel:
        for method in ("privatelora.v1.PrivateLoraService/Describe", "grpc.health.v1.Health/Watch"):
            with pytest.raises(grpc.RpcError) as error:
                next(iter(channel.unary_stream(f"/{method}")(b"", timeout=60)))
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"\n\x80\x80\x01" + b"x" * 16384, timeout=60)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_cloud_drains_writes_to_its_volume_only_and_ends_in_order(deployed: dict[str, Any]) -> None:
    """Last in this file: it ends the cloud."""
    process, cloud, keys = deployed["process"], deployed["cloud"], deployed["keys"]
    assert cloud.untouched()
    probes, seen = f"127.0.0.1:{deployed['ports']['50052']}", set()
    ca, key, cert = ((keys / name).read_bytes() for name in ("ca.pem", "edge.key", "edge.pem"))
    token = grpc.access_token_call_credentials((keys / "token").read_text().strip())
    own = grpc.composite_channel_credentials(grpc.ssl_channel_credentials(ca, key, cert), token)
    with (
        RawEdge(f"127.0.0.1:{deployed['ports']['50051']}", own) as edge,
        edge.open(next(iter(edge.offers))) as stream,
    ):
        stream.step([(0, 0, 4, 1)])  # who is in the middle of a step delays the end
        first = stream.receive()
        process.send_signal(signal.SIGTERM)

        def says_that_it_goes() -> bool:
            seen.add((health_of(probes, timeout_s=60.0), health_of(probes, LIVENESS, timeout_s=60.0)))
            return ("NOT_SERVING", "SERVING") in seen

        until(says_that_it_goes, lambda: process.poll() is None)
        assert process.poll() is None, "a step is under way"
        stream.answer(first.codes.layer, stream.zeros(4)[first.codes.layer])
        while not (message := stream.receive()).HasField("hidden"):
            stream.answer(message.codes.layer, stream.zeros(4)[message.codes.layer])
        assert stream.refused().code is grpc.StatusCode.UNAVAILABLE, "and is told to move when it is done"
    assert process.wait() == 0
    assert health_of(probes, timeout_s=1.0) == "UNAVAILABLE"
    log = deployed["log"].read_text()
    assert "Traceback" not in log and os.path.getsize(deployed["log"]) > 0
    assert all(json.loads(line) for line in log.splitlines()), "the log is JSON, as compose asks"
