"""Real cloud processes, each started once: open and closed ones, and one with hardly any memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from benchmarks.ports import free_port
from benchmarks.processes import CloudProcess
from cloud_server import tokens
from shared import lowrank
from shared.models import DEFAULT_MODEL, resolve
from shared.plan import Plan
from tests.families import COMMON, build, tokenizer
from tests.integration.bystander import Bystander
from tests.integration.raw_edge import RawEdge
from tests.integration.secured import Secured, certificates, started
from tests.integration.served import TINY_PLANS, WIDE, WIDE_BLOCK_BYTES, WIDE_BLOCKS, WIDE_WAIT_S, Served

LONGEST = ("test_tune_runs", "test_chaos", "test_readme", "test_exact", "test_parallel", "test_recovery")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, so that no worker is left alone with one of them."""
    longest = [f"{name}.py" for name in LONGEST]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="session")
def packaged_cloud() -> Iterator[CloudProcess]:
    """Serve the packaged model, as a person would serve it."""
    with CloudProcess(DEFAULT_MODEL, arguments=("--grace-period-s", "1")) as process:
        yield process


@pytest.fixture(scope="session")
def tiny_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve four tiny layers, two plans.

    The grace period is longer than a slow machine takes between two lines of a test, and shorter than
    `settled` waits.
    """
    folder, cache_dir = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("cache")
    _save(build("llama"), folder)
    arguments = ["--grace-period-s", "30", "--kv-bytes", str(16 << 20), "--cache-dir", str(cache_dir)]
    for plan in TINY_PLANS:
        arguments += ["--plan", plan]
    with CloudProcess(str(folder), arguments=[*arguments, "--threads", "1"], log=folder / "log") as process:
        yield Served(process, folder, cache_dir)


@pytest.fixture(scope="session")
def cramped_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve one wide layer, so that replies are megabytes; little KV; dropped sessions are held for long."""
    folder, cache_dir = tmp_path_factory.mktemp("wide"), tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**COMMON | WIDE | {"num_key_value_heads": 1})
    _save(AutoModelForCausalLM.from_config(config), folder)
    arguments = ["--grace-period-s", "3600", "--kv-bytes", str(WIDE_BLOCKS * WIDE_BLOCK_BYTES)]
    arguments += ["--cache-dir", str(cache_dir), "--plan", TINY_PLANS[0], "--threads", "1"]
    environment = {"PRIVATELORA_CLOUD_WRITE_TIMEOUT_S": "2"}
    environment["PRIVATELORA_CLOUD_QUEUE__MAX_WAIT_S"] = str(WIDE_WAIT_S)
    with CloudProcess(str(folder), arguments=arguments, env=environment, log=folder / "log") as process:
        yield Served(process, folder, cache_dir)


@pytest.fixture(scope="session")
def bystander(tiny_cloud: Served) -> Bystander:
    """Return an honest session for the tiny cloud, not started."""
    checkpoint = resolve(str(tiny_cloud.folder), progress=False)
    with tiny_cloud.raw() as edge:
        plan = Plan.parse(edge.offers["r8"].plan_json)
    matrices, _ = lowrank.ensure(plan, checkpoint, tiny_cloud.cache_dir)
    return Bystander(tiny_cloud.address, build("llama"), plan, matrices)


@pytest.fixture
def edge(tiny_cloud: Served, bystander: Bystander) -> Iterator[RawEdge]:
    """Return a channel to the tiny cloud, while an honest session generates."""
    with tiny_cloud.raw() as raw:
        assert raw.settled()
        with bystander:
            yield raw
        raw.end_all()
        assert raw.settled(), "the KV bytes in use did not return to what they were"
    log = tiny_cloud.process.logs()
    assert "Traceback" not in log and "never retrieved" not in log, log[-3000:]


@pytest.fixture
def cramped(cramped_cloud: Served) -> Iterator[RawEdge]:
    with cramped_cloud.raw() as raw:
        yield raw
    assert "Traceback" not in cramped_cloud.process.logs()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with four tiny layers, for clouds that a test starts itself."""
    folder = tmp_path_factory.mktemp("small")
    _save(build("llama"), folder)
    return folder


@pytest.fixture(scope="session")
def guarded(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Serve TLS to those who have a token: alice and bob."""
    certs = certificates(tmp_path_factory.mktemp("certs"))
    file = certs / "tokens.json"
    known = {name: tokens.add(file, name) for name in ("alice", "bob")}
    metrics = f"127.0.0.1:{free_port()}"
    seen = ("--log-format", "json", "--metrics", metrics)
    secured = started(small_model, certs, "--tokens", str(file), *seen)
    secured.tokens, secured.known, secured.metrics = file, known, metrics
    with secured.process:
        yield secured


@pytest.fixture(scope="session")
def mutual(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Serve mTLS to the certificates of alice and bob."""
    certs = certificates(tmp_path_factory.mktemp("mutual"), "alice", "bob")
    secured = started(small_model, certs, "--client-ca", str(certs / "ca.pem"), client="alice")
    with secured.process:
        yield secured


@pytest.fixture
def shut(guarded: Secured) -> Iterator[Secured]:
    """Return the cloud with tokens, while alice's stream stays as it is whatever a test tries."""
    yield from undisturbed(guarded)


@pytest.fixture
def shut_mutual(mutual: Secured) -> Iterator[Secured]:
    """Return the cloud with client certificates, likewise."""
    yield from undisturbed(mutual)


def undisturbed(secured: Secured) -> Iterator[Secured]:
    with secured.raw("alice") as alice:
        assert alice.settled()
        with alice.open() as stream:
            stream.run([(0, 0, 4, 1)])
            held = alice.kv_used
            yield secured
            assert alice.settled(held), "KV bytes leaked"
            stream.run([(0, 4, 2, 1)])
            stream.finish()
        assert alice.settled()
    log = secured.process.logs()
    assert "Traceback" not in log and "never retrieved" not in log, log[-3000:]


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
