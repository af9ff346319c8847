"""Check that an emulated link is what it says: round trips, and a bulk TCP transfer each way.

It sees a link as any benchmark does, through processes on both of its sides (`benchmarks.link_probe`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.link_preset import Joined, Preset
from benchmarks.link_tun import LinkError
from benchmarks.processes import ROOT, child_environment
from benchmarks.quiet import stolen_s

RTT_SLACK_MS = 1.0  # beside the share: two kernels and two processes answer, not the link alone
TOLERANCE = 0.10  # share of the nominal round trip and rates; TCP/IP headers are 3.5 % of a full packet
WARM_UP_S, WARM_UP_ROUND_TRIPS = (
    0.5,
    40,
)  # until TCP has found the rate, lost packets on the way and recovered
PROBE = (sys.executable, "-m", "benchmarks.link_probe")
PROBE_TIMEOUT_S = 60.0
CHECKS = 3  # tries before a link is refused: on a shared machine one may be disturbed


def say(text: str) -> None:
    """Print a line for people, on stderr."""
    print(f"[link] {text}", file=sys.stderr, flush=True)


@contextmanager
def answering(joined: Joined) -> Iterator[str]:
    """Answer probes on the cloud's side inside the block; yields where, as the edge's side sees it.

    Raises
    ------
    LinkError
        If it cannot, or a probe failed inside the block.
    """
    server = subprocess.Popen(
        [*joined.cloud_prefix, *PROBE, "serve", joined.cloud_host], stdout=subprocess.PIPE, **_common()
    )
    try:
        assert server.stdout is not None
        yield joined.address(int(server.stdout.readline()))
    except (ValueError, subprocess.SubprocessError) as error:
        raise LinkError(f"the link could not be measured: {error}") from None
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def probe(joined: Joined, *words: str) -> Any:
    """Run a probe on the edge's side and return what it printed."""
    done = subprocess.run(
        [*joined.edge_prefix, *PROBE, *words],
        stdout=subprocess.PIPE, timeout=PROBE_TIMEOUT_S, check=True, **_common(),
    )  # fmt: skip
    return json.loads(done.stdout)


def _common() -> dict[str, Any]:
    return {"cwd": ROOT, "env": child_environment(), "text": True}


def measure(joined: Joined, rtt_ms: float) -> dict[str, Any]:
    """Measure round trips and bulk transfers, and what the emulation costs meanwhile."""
    with answering(joined) as address:
        warm_up = ("--warm-up-s", str(WARM_UP_S + WARM_UP_ROUND_TRIPS * rtt_ms / 1e3))
        before, taken_s, started = joined.statistics(), stolen_s(), time.perf_counter()
        figures: dict[str, Any] = probe(joined, "measure", address, *warm_up)
        wall_s, after = time.perf_counter() - started, joined.statistics()
    # Share of the cores' time that the host took: while it does, even the emulated link stands still.
    figures["steal"] = round((stolen_s() - taken_s) / (wall_s * (os.cpu_count() or 1)), 4)
    if after:
        figures["emulation"] = {**after, "cpu_share": round((after["cpu_s"] - before["cpu_s"]) / wall_s, 3)}
    return figures


def tcp_s(joined: Joined, up: int, down: int) -> float:
    """Return what TCP takes for ``up`` bytes to the cloud and then ``down`` back, after a pause (seconds)."""
    with answering(joined) as address:
        return float(probe(joined, "swap", address, "--up", str(up), "--down", str(down))[0])


def deviations(figures: dict[str, Any], preset: Preset) -> list[str]:
    """Return what of a measurement is further from the preset than is tolerated."""
    found = []
    if abs(figures["rtt_ms"] - preset.rtt_ms) > TOLERANCE * preset.rtt_ms + RTT_SLACK_MS:
        found.append(f"a round trip takes {figures['rtt_ms']} ms, not {preset.rtt_ms:g}")
    for way, nominal in (("up", preset.up_mbit_s), ("down", preset.down_mbit_s)):
        if nominal is not None and abs(figures[f"{way}_mbit_s"] - nominal) > TOLERANCE * nominal:
            found.append(f"{way} carries {figures[f'{way}_mbit_s']} Mbit/s, not {nominal:g}")
    return found


def checked(joined: Joined, preset: Preset) -> dict[str, Any]:
    """Measure the link until it is what the preset says; every try is printed and returned.

    Raises
    ------
    LinkError
        If none of `CHECKS` tries was within the tolerance; the message says by how much.
    """
    tries = []
    for _ in range(CHECKS):
        figures = measure(joined, preset.rtt_ms)
        found = deviations(figures, preset)
        tries.append(figures)
        say(
            f"{preset.name} ({joined.kind}): round trip {figures['rtt_ms']} ms (nominal {preset.rtt_ms:g}), "
            f"up {figures['up_mbit_s']} ({_rate(preset.up_mbit_s)}) and "
            f"down {figures['down_mbit_s']} Mbit/s ({_rate(preset.down_mbit_s)}): {'; '.join(found) or 'ok'}"
        )
        if not found:
            return {
                "preset": preset.model_dump(),
                "kind": joined.kind,
                **figures,
                "refused": tries[:-1],
            }
    raise LinkError(
        f"the link is not what {preset.name} says: {'; '.join(found)} (tolerated: {TOLERANCE:.0%}, and "
        f"{RTT_SLACK_MS:g} ms more for round trips; {CHECKS} tries). Is this machine busy? "
        f"Its host took {figures['steal']:.1%} of the cores' time"
    )


def _rate(mbit_s: float | None) -> str:
    return "no limit" if mbit_s is None else f"nominal {mbit_s:g}"
