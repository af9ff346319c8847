"""``privatelora-edge doctor``: every failure is a real one, and what it says names the cause and the fix."""

import errno
import json
import os
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.ports import free_port
from benchmarks.processes import run_edge
from edge_client.config import EdgeConfig
from edge_client.credentials import Credentials
from edge_client.doctor.cloud import compared, token
from edge_client.doctor.examination import CHECKS, examine
from edge_client.doctor.finding import Exam, Finding
from shared.adapter import Adapter
from shared.fingerprint import Fingerprint
from shared.plan import Plan
from tests.integration.secured import Impostor, Secured, certificates
from tests.integration.served import Served

ALL = [check.name for check in CHECKS]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PRIVATELORA_CACHE_DIR", str(tmp_path / "cache"))
    for proxy in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(proxy, raising=False)


def look(cloud: str, *, with_link: bool = False, **settings: Any) -> dict[str, Finding]:
    config = EdgeConfig(cloud=cloud, connect_timeout_s=60.0, **settings)
    found = list(examine(config, cloud, with_link=with_link))
    assert [finding.check for finding in found] == (ALL if with_link else ALL[:-1])
    return {finding.check: finding for finding in found}


def verdicts(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict for name, finding in found.items() if finding.verdict != "ok"}


def only_failed(found: dict[str, Finding], name: str, says: str, fix: str) -> None:
    """Check that one thing failed, with these words, and what needs it was not tried."""
    failed = [finding for finding in found.values() if finding.verdict == "failed"]
    assert [finding.check for finding in failed] == [name], verdicts(found)
    assert says in failed[0].says, failed[0]
    assert fix in failed[0].fix, failed[0]
    after = {check.name for check in CHECKS if name in check.needs}
    assert all(found[one].verdict == "skipped" for one in after if one in found)


def token_file(folder: Path, token: str) -> Path:
    path = folder / "token"
    path.write_text(token + "\n")
    path.chmod(0o600)
    return path


def with_token(guarded: Secured, folder: Path, token: str | None = None) -> dict[str, Any]:
    return {
        "tls_ca": guarded.certs / "ca.pem",
        "token_file": token_file(folder, token or guarded.known["bob"]),
    }


# --- all is well ---------------------------------------------------------------------------------------


def test_all_is_well_and_measured(guarded: Secured, tmp_path: Path) -> None:
    found = look(guarded.address, with_link=True, **with_token(guarded, tmp_path))
    # Its certificate is one day old and lives for one day: that is soon.
    assert verdicts(found) == {"tls": "warning"} and "renew" in found["tls"].fix
    assert found["tls"].facts["names"] == ["127.0.0.1"]
    assert "PrivateLoRA development CA" in found["tls"].facts["issuer"]
    clock = found["clock"].facts  # it is the same clock: what it is off by is what the answer took
    assert abs(clock["cloud_ahead_s"]) <= clock["uncertainty_s"] + 0.01, clock
    assert found["link"].facts["rtt_ms"] > 0 and found["link"].facts["round_trips_per_token"] == 4
    assert not (tmp_path / "config" / "known_clouds.json").exists(), "looking is not trusting"
    with guarded.raw("alice") as alice:
        assert alice.settled(), "the sessions that were timed still hold KV"


def test_the_command_says_it_and_its_status_is_the_verdict(guarded: Secured, tmp_path: Path) -> None:
    flags = ["--tls-ca", str(guarded.certs / "ca.pem"), "--no-link", "--json"]
    flags += ["--token-file", str(token_file(tmp_path, guarded.known["bob"]))]
    done = run_edge("doctor", "--cloud", f"{guarded.address},127.0.0.1:{free_port()}", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert guarded.known["bob"] not in done.stdout + done.stderr
    said = json.loads(done.stdout)
    good, bad = said["clouds"]
    assert good["ok"] and not bad["ok"] and not said["ok"]
    for report in (good, bad):
        assert [check["check"] for check in report["checks"]] == ALL[:-1]
    assert [check["check"] for check in bad["checks"] if check["verdict"] == "failed"] == ["connection"]


# --- the way there -------------------------------------------------------------------------------------


def test_a_name_that_nobody_knows() -> None:
    only_failed(look("no-such-cloud.invalid:50051"), "name", "not known", "spelling")


def test_the_wrong_port() -> None:
    only_failed(look(f"127.0.0.1:{free_port()}"), "connection", "nothing listens", "privatelora-cloud serve")


def test_in_clear_to_a_cloud_with_tls(guarded: Secured) -> None:
    found = look(guarded.address)
    only_failed(found, "tls", "serves TLS with a certificate for 127.0.0.1", "--tls-ca")


def test_tls_to_a_server_in_clear_and_what_is_no_cloud(tmp_path: Path) -> None:
    certs = certificates(tmp_path / "certs")
    with Impostor(None) as impostor:
        only_failed(look(impostor.address, tls_ca=certs / "ca.pem"), "tls", "no TLS", "--tls-ca away")
        only_failed(look(impostor.address), "service", "not with a health check", "50051")


def test_the_certificate_of_another_ca(guarded: Secured, tmp_path: Path) -> None:
    other = certificates(tmp_path / "certs")
    only_failed(look(guarded.address, tls_ca=other / "ca.pem"), "tls", "not from a CA in", "--tls-ca")
    only_failed(look(guarded.address, tls=True), "tls", "public ones", "--tls-ca")


@pytest.mark.parametrize(
    ("says", "fix", "facts"),
    [
        ("has expired", "clock", {"days": -1 / 24}),
        ("not for 127.0.0.1. It is for other.example", "--name 127.0.0.1", {"names": ("other.example",)}),
    ],
)
def test_a_certificate_that_is_not_right(tmp_path: Path, says: str, fix: str, facts: dict[str, Any]) -> None:
    certs = certificates(tmp_path / "certs", **facts)
    with Impostor(certs) as impostor:
        token = token_file(tmp_path, "plora_never_sent_anywhere")
        only_failed(look(impostor.address, tls_ca=certs / "ca.pem", token_file=token), "tls", says, fix)
        assert impostor.calls == 0, "something was sent to a cloud that is not trusted"


# --- who asks ------------------------------------------------------------------------------------------


def test_no_token(guarded: Secured) -> None:
    found = look(guarded.address, tls_ca=guarded.certs / "ca.pem")
    only_failed(found, "token", "shows no token", "--token-file FILE; ask the operator")


def test_a_wrong_token(guarded: Secured, tmp_path: Path) -> None:
    settings = with_token(guarded, tmp_path, "plora_" + "x" * 40)
    only_failed(look(guarded.address, **settings), "token", "does not take", "privatelora-cloud token add")


def test_a_token_that_nobody_asks_for(tmp_path: Path) -> None:
    certs = certificates(tmp_path / "certs")
    roots = (certs / "ca.pem").read_bytes()
    seen: list[bool] = []

    def describe(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append("authorization" in dict(context.invocation_metadata()))
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Describe": grpc.unary_unary_rpc_method_handler(describe)}
    service = grpc.method_handlers_generic_handler("privatelora.v1.PrivateLoraService", handlers)
    server.add_generic_rpc_handlers((service,))
    pair = ((certs / "server.key").read_bytes(), (certs / "server.pem").read_bytes())
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', grpc.ssl_server_credentials([pair]))}"
    server.start()
    try:
        shown = Credentials(tls=True, roots=roots, token="plora_" + "x" * 40)
        found = token(Exam(EdgeConfig(cloud=address, connect_timeout_s=60.0), address, shown))
    finally:
        server.stop(None).wait()
    assert found.verdict == "warning" and "lets everybody in" in found.says, found
    assert seen == [True, False]


def test_no_client_certificate_and_one_of_another_ca(tmp_path: Path) -> None:
    certs, other = certificates(tmp_path / "certs", "alice"), certificates(tmp_path / "other", "mallory")
    with Impostor(certs, asks=True) as cloud:
        ca = certs / "ca.pem"
        found = look(cloud.address, tls_ca=ca)
        only_failed(found, "tls", "asks for a client certificate", "--client-cert")
        pair = {"client_cert": other / "mallory.pem", "client_key": other / "mallory.key"}
        found = look(cloud.address, tls_ca=ca, **pair)
        only_failed(found, "tls", "does not take the certificate", "--client-ca")
        pair = {"client_cert": certs / "alice.pem", "client_key": certs / "alice.key"}
        found = look(cloud.address, tls_ca=ca, **pair)
        assert found["keys"].verdict == found["tls"].verdict == "warning"  # of one day both
        assert "CN=alice" in found["keys"].says and "renew" in found["keys"].fix


def test_keys_that_cannot_be_used(guarded: Secured, tmp_path: Path) -> None:
    ca, address = guarded.certs / "ca.pem", guarded.address
    old = certificates(tmp_path / "old", "alice", days=-1 / 24)
    pair = {"client_cert": old / "alice.pem", "client_key": old / "alice.key"}
    only_failed(look(address, tls_ca=ca, **pair), "keys", "expired", "renew")
    new = certificates(tmp_path / "new", "alice", "bob")
    pair = {"client_cert": new / "alice.pem", "client_key": new / "bob.key"}
    only_failed(look(address, tls_ca=ca, **pair), "keys", "is not the key of", "right files")
    only_failed(look(address, tls_ca=tmp_path / "none.pem"), "keys", "cannot read", "right files")
    token = token_file(tmp_path, "plora_" + "x" * 40)
    only_failed(look(address, token_file=token), "keys", "never sent without TLS", "right files")


# --- what is served, and what is kept ------------------------------------------------------------------


def test_an_adapter_that_was_made_for_another_model(guarded: Secured, tmp_path: Path) -> None:
    with guarded.raw("bob") as edge:
        plan = Plan.parse(edge.offers["r8"].plan_json)
        stated = edge.offers["r8"].fingerprint
    other = Fingerprint(stated.plan, stated.lowrank, b"\7" * 32, stated.edge)
    file = tmp_path / "mine.safetensors"
    Adapter.random(plan, other, seed=1, std=0.02, name="mine").save(file)
    own = with_token(guarded, tmp_path)
    found = look(guarded.address, adapter=file, **own)
    only_failed(found, "adapter", "'mine' does not fit", "--adapter NAME")
    found = look(guarded.address, adapter=tmp_path / "nothing", **own)
    only_failed(found, "adapter", "no adapter", "adapter list")


def test_the_plan_that_is_looked_at_is_the_adapters(tiny_cloud: Served, tmp_path: Path) -> None:
    with tiny_cloud.raw() as edge:
        stated = [(Plan.parse(o.plan_json), o.fingerprint) for o in edge.offers.values()]
    first, other = stated[0][1].root.hex(), stated[1][1].root.hex()
    plan, print_ = stated[1]
    file = tmp_path / "mine.safetensors"
    own = Fingerprint(print_.plan, print_.lowrank, print_.layers, print_.edge)
    Adapter.random(plan, own, seed=1, std=0.02, name="mine").save(file)
    found = look(tiny_cloud.address, adapter=file, fingerprint=other)
    assert verdicts(found) == {} and found["model"].facts["fingerprint"] == other
    only_failed(look(tiny_cloud.address, adapter=file, fingerprint=first), "model", "not the one given", "")
    assert look(tiny_cloud.address, fingerprint=first)["model"].verdict == "ok"


def test_another_model_than_was_meant(guarded: Secured, tmp_path: Path) -> None:
    own = with_token(guarded, tmp_path)
    found = look(guarded.address, fingerprint="0" * 64, **own)
    only_failed(found, "model", "not the one given", "info")
    only_failed(look(guarded.address, plan="r99", **own), "model", "no plan 'r99'", "--plan")


def test_a_folder_that_cannot_be_written_to(guarded: Secured, tmp_path: Path) -> None:
    own = with_token(guarded, tmp_path)
    (tmp_path / "file").touch()  # root may write everywhere, but not below a file
    found = look(guarded.address, cache_dir=tmp_path / "file" / "cache", **own)
    only_failed(found, "folders", "cannot write to", "--cache-dir")
    assert "to fetch" in look(guarded.address, **own)["folders"].says


def test_a_full_disk_is_not_called_a_matter_of_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    found = look(f"127.0.0.1:{free_port()}")["folders"]
    assert found.verdict == "failed" and os.strerror(errno.ENOSPC) in found.says, found
    assert "free some space" in found.fix and "writable" not in found.fix, found


def test_a_cloud_that_hangs_is_not_called_a_wrong_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as paused:  # the kernel connects, and nobody ever answers
        target = f"127.0.0.1:{paused.getsockname()[1]}"
        config = EdgeConfig(cloud=target, connect_timeout_s=3.0)
        found = {finding.check: finding for finding in examine(config, target, with_link=False)}
    assert found["connection"].verdict == "ok", found["connection"]
    only_failed(found, "service", "answers nothing within 3 s", "log and its machine")


def test_clocks_that_differ() -> None:
    assert compared(1_000_000_000, 1_000_000.0, 1_000_000.2).verdict == "ok"
    late = compared(1_000_000_000, 1_000_600.0, 1_000_600.2)
    assert late.verdict == "warning" and "600 s ahead of the cloud's" in late.says
    early = compared(1_000_000_000, 999_400.0, 999_400.2)
    assert "600 s behind the cloud's" in early.says
    assert compared(0, 1.0, 2.0).verdict == "skipped"
    # An answer that took a minute says nothing about half of it.
    assert compared(1_000_000_000, 1_000_000.0, 1_000_100.0).verdict == "ok"
