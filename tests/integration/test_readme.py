"""What the README tells a person to type does what it says, from the commands to the figures it quotes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import ROOT, CloudProcess, child_environment

README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
ADDRESS = "127.0.0.1:50051"


def _run(*arguments: str, timeout_s: float = 800) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _last_json(output: str) -> dict[str, object]:
    return json.loads(output.strip().splitlines()[-1])


@pytest.mark.model
def test_python_example_answers(packaged_cloud: CloudProcess) -> None:
    assert PYTHON_BLOCKS, "the README has no Python example"
    for block in PYTHON_BLOCKS:
        assert ADDRESS in block
        assert "Paris" in _run("-c", block.replace(ADDRESS, packaged_cloud.address))


@pytest.mark.model
def test_demo_answers_and_leaves_no_process() -> None:
    output = _run("-m", "benchmarks.demo", "generate", "--prompt", "What is the capital of France?")
    assert "Paris" in output
    pid = int(re.search(r"cloud +process (\d+)", output)[1])
    assert not psutil.pid_exists(pid)


@pytest.mark.model
def test_prompt_is_read_from_captured_traffic() -> None:
    # the README states it, so it has to stay true for as long as it does
    figures = _last_json(_run("-m", "benchmarks.read_prompt", "--prompts", "2", "--max-new-tokens", "8"))
    assert figures["prompt_read_rate"] == 1.0
    assert figures["answers_read"] == figures["answers"]


@pytest.mark.model
def test_m_is_recovered_from_captured_traffic() -> None:
    figures = _last_json(_run("-m", "benchmarks.recover_m", "--max-new-tokens", "48"))
    assert figures["relative_error"][-1]["worst"] < 1e-2


def test_readme_names_only_files_that_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        for path in re.findall(
            r"`((?:shared|cloud_server|edge_client|tests|benchmarks)/[\w/]+\.py)`", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_makefile_has_the_targets_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    table = README.split("| make | does |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z-]+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert named and named <= targets, named - targets


def test_ci_runs_the_readme_test_command() -> None:
    script = Path(ROOT / ".ci" / "run").read_text()
    assert "make test" in script and "make test" in README
