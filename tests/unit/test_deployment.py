"""What lies in docker/ is well-formed and agrees with the program: settings, flags, ports and time-outs.

Dockerfiles are read by hadolint, compose files by the compose specification's schema, Kubernetes' objects by
Kubernetes' schemas, queries by a parser of Prometheus' language. No container engine is needed.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import typer.main
import yaml

from benchmarks.processes import ROOT
from cloud_server.cli import app as cloud_app
from cloud_server.config.cloud import ENV_PREFIX as CLOUD_PREFIX
from cloud_server.config.cloud import CloudConfig
from cloud_server.config.reading import load_config
from cloud_server.probes import LIVENESS
from edge_client import config as edge_config

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE_FILES = sorted(DOCKER.glob("compose*.yaml"))
KUBERNETES = [
    document
    for file in ("cloud.yaml", "proxy.yaml", "network.yaml")
    for document in yaml.safe_load_all((DOCKER / "kubernetes" / file).read_text())
]
HADOLINT = Path(sys.executable).parent / "hadolint"


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile as (name, rest), continued lines joined."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def of(file: Path, name: str) -> list[str]:
    return [rest for found, rest in instructions(file) if found == name]


def environment(file: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in of(file, "ENV") for pair in shlex.split(rest))


# --- images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_pass_their_linter(file: Path) -> None:
    done = subprocess.run([HADOLINT, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_faults(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp && sudo apt-get install x\n")
    assert subprocess.run([HADOLINT, bad], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_are_set_up_by_the_makefile(file: Path, tmp_path: Path) -> None:
    """The command in the Dockerfile is one that make carries out with nothing but what is copied."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for rest in of(file, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            assert f"!{source.split('/')[0]}" in ignored, f"{source} does not get to the builder"
            place = tmp_path / (target if len(sources) == 1 else source)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, place)
    command = next(rest for rest in of(file, "RUN") if "make install" in rest).split("&&")[0]
    pinned = re.search(r"^TORCH +\?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert pinned and of(file, "ARG").count(f"TORCH={pinned[1]}") == 1
    side = "cloud" if file.name.startswith("cloud") else "edge"
    words = [*shlex.split(command.replace("${TORCH}", pinned[1])), "--dry-run", "--no-print-directory"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f'install --quiet "{pinned[1]}"' in done.stdout
    assert f"install --quiet --editable '.[{side}]'" in done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_run_as_nobody_in_particular(file: Path) -> None:
    names = [name for name, _ in instructions(file)]
    assert of(file, "USER") == ["10001"] and names.index("USER") > max(
        index for index, name in enumerate(names) if name == "RUN"
    )
    assert environment(file)["PYTHONDONTWRITEBYTECODE"] == "1"  # the root is read-only
    volumes = of(file, "VOLUME")
    for name, value in environment(file).items():
        if name.startswith("PRIVATELORA") and name.endswith("_DIR"):
            assert any(value.startswith(volume) for volume in volumes), f"{name} is lost with the container"


# --- compose --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", COMPOSE_FILES, ids=lambda file: file.name)
def test_compose_files_fit_their_schema(file: Path) -> None:
    vendor = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendor.read_text())
    document = yaml.safe_load(file.read_text())
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "services": {"cloud": {"imagee": "x"}}}, schema)


def test_compose_names_what_there_is() -> None:
    document = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, service in document["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            found = (DOCKER / source).exists() if source.startswith(".") else source in document["volumes"]
            assert found, f"{name} mounts {source}, which is not there"
        if "build" in service:
            build = service["build"]
            assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    built = [service["image"] for service in document["services"].values() if "build" in service]
    assert len(set(built)) == len(built), "two builds at once would race for one name"
    for service in document["services"].values():
        if service["image"] in built and "build" not in service:
            assert service["pull_policy"] == "never", "it is in no registry"
    over = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    assert over["services"].keys() <= document["services"].keys()
    cloud = document["services"]["cloud"]
    assert all(
        port.startswith("127.0.0.1:") for s in document["services"].values() for port in s.get("ports", ())
    )
    assert _seconds(cloud["stop_grace_period"]) > 2 * _drain_s() + 30
    for command in (cloud["command"], over["services"]["cloud"]["command"]):
        _check_flags(command)
    _check_settings(cloud["environment"])
    edge = document["services"]["edge"]["environment"]
    known = {f"{edge_config.ENV_PREFIX}{field.upper()}" for field in edge_config.EdgeConfig.model_fields}
    assert edge.keys() <= known


def test_containers_may_do_nothing_but_their_work() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for name in ("keys", "cloud", "edge"):
        service = services[name]
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["tmpfs"] == ["/tmp"]
        assert "no-new-privileges:true" in service["security_opt"]


# --- Kubernetes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", KUBERNETES, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_objects_fit_the_schemas_of_kubernetes(document: dict[str, Any]) -> None:
    for version in ("1.29", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(document, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**document, "specc": {}}, kubernetes_validate.latest_version(), strict=True
        )


def test_every_object_finds_its_pods() -> None:
    pods = [d["spec"]["template"]["metadata"]["labels"] for d in KUBERNETES if d["kind"] == "Deployment"]
    for document in KUBERNETES:
        spec = document.get("spec", {})
        wanted = [
            spec.get("selector", {}).get("matchLabels")
            if document["kind"] != "Service"
            else spec["selector"],
            spec.get("podSelector", {}).get("matchLabels"),
            *(peer["podSelector"]["matchLabels"] for peer in _peers(spec) if "podSelector" in peer),
        ]
        for labels in filter(None, wanted):
            assert any(labels.items() <= pod.items() for pod in pods), (document["metadata"]["name"], labels)


def _peers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    rules = [*spec.get("ingress", ()), *spec.get("egress", ())]
    return [peer for rule in rules for key in ("from", "to") for peer in rule.get(key, ())]


def test_the_replicas_are_told_what_the_program_knows() -> None:
    pod = _pod("privatelora-cloud")
    (container,) = pod["containers"]
    _check_flags(container["args"])
    env = {one["name"]: one["value"] for one in container["env"]}
    _check_settings(env)
    config = _configured(env)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.health == f"0.0.0.0:{ports['health']}" and config.metrics == f"0.0.0.0:{ports['metrics']}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]
    assert container["livenessProbe"]["grpc"]["service"] == LIVENESS
    assert "service" not in container["readinessProbe"]["grpc"]
    assert pod["terminationGracePeriodSeconds"] > 2 * config.drain_timeout_s + 30
    # Kubernetes' own PRIVATELORA_CLOUD_SERVICE_HOST would be an unknown setting.
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("name", ["privatelora-cloud", "privatelora-envoy"])
def test_pods_may_do_nothing_but_their_work(name: str) -> None:
    pod = _pod(name)
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    inside = container["securityContext"]
    assert inside["readOnlyRootFilesystem"] and inside["capabilities"] == {"drop": ["ALL"]}
    assert inside["allowPrivilegeEscalation"] is False
    assert "secretName" in str(pod["volumes"]) and "stringData" not in str(KUBERNETES)


def test_envoy_ends_no_stream() -> None:
    bootstrap = yaml.safe_load((DOCKER / "kubernetes" / "envoy.yaml").read_text())
    chain = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]
    http = chain["filters"][0]["typed_config"]
    assert http["stream_idle_timeout"] == "0s" and http["request_timeout"] == "0s"
    (route,) = (
        one["route"]
        for one in http["route_config"]["virtual_hosts"][0]["routes"]
        if "PrivateLoraService" in str(one["match"])
    )
    assert route["timeout"] == route["idle_timeout"] == "0s"
    assert route["max_stream_duration"]["max_stream_duration"] == "0s"
    (cluster,) = bootstrap["static_resources"]["clusters"]
    assert cluster["circuit_breakers"]["thresholds"][0]["max_requests"] >= 100_000
    mounted = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())
    named = set(re.findall(r"/etc/envoy/([\w-]+\.yaml)", str(bootstrap)))
    assert named <= {Path(file).name for file in mounted["configMapGenerator"][0]["files"]}
    for file in mounted["resources"] + mounted["configMapGenerator"][0]["files"]:
        assert (DOCKER / "kubernetes" / file).is_file()


# --- Prometheus and Grafana -----------------------------------------------------------------------------


def expressions() -> list[str]:
    """Return every query of the alerts and the dashboard."""
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((DOCKER / "grafana" / "dashboards" / "privatelora.json").read_text())
    found += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [expr.replace("$__rate_interval", "5m").replace("$instance", ".*") for expr in found]


@pytest.mark.parametrize("expr", expressions())
def test_queries_can_be_parsed(expr: str) -> None:
    promql_parser.parse(expr)


def test_the_files_of_prometheus_and_grafana_name_each_other() -> None:
    scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    port = compose["cloud"]["environment"][f"{CLOUD_PREFIX}METRICS"].rpartition(":")[2]
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == [f"cloud:{port}"]
    assert all((DOCKER / "prometheus" / file).is_file() for file in scraped["rule_files"])
    source = DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    (database,) = yaml.safe_load(source.read_text())["datasources"]
    board = json.loads((DOCKER / "grafana" / "dashboards" / "privatelora.json").read_text())
    used = {panel["datasource"]["uid"] for panel in board["panels"]}
    assert used == {database["uid"]} and database["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    alerts = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in alerts:
        assert rule["alert"] in page, f"docs/operations.md does not say what to do about {rule['alert']}"


# --- shared -----------------------------------------------------------------------------------------------


def _pod(name: str) -> dict[str, Any]:
    (found,) = (d for d in KUBERNETES if d["kind"] == "Deployment" and d["metadata"]["name"] == name)
    return found["spec"]["template"]["spec"]


def _check_flags(words: list[str]) -> None:
    command = typer.main.get_command(cloud_app).commands[words[0]]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given and given <= known, given - known


def _check_settings(env: dict[str, str]) -> None:
    _configured(env)
    assert all(name.startswith(CLOUD_PREFIX) for name in env)


def _configured(env: dict[str, str]) -> CloudConfig:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        return load_config(None)


def _drain_s() -> float:
    return CloudConfig().drain_timeout_s


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text)
    assert found
    return 60 * int(found[1] or 0) + int(found[2] or 0)
