"""How long a chaos run is, what takes part in it, and how much has to happen."""

from dataclasses import dataclass, field

from benchmarks.chaos_events import KINDS


@dataclass(frozen=True)
class Settings:
    """A run. Times in seconds.

    Attributes
    ----------
    plans
        What the cloud offers, as ``--plan`` takes them.
    edge_plans
        For each process that decodes, the names of the plans that it uses: a connection for each.
    edges
        Decoding edges of one connection (count).
    counts, mid_step, tuning_under_way
        Events by kind, and how many of every kind have to be mid-step, and to strike while an optimiser step
        is under way (counts). Over all kinds one has to, wherever anybody tunes.
    tail_s
        Calm at the end, in which all go on working.
    warm_up_s, window_s
        Memory is judged by windows of this length; a cloud's from so long on after it has served all edges
        for the first time, that of edges from a quarter of the run on.
    step_timeout_s, connect_timeout_s, recover_s
        The edges' patience with one step, with connecting, and with a cloud that is lost.
    start_s, patience_s, finish_s
        How long edges may take until they have done once what they will do, a cloud to end, and an edge to
        finish its answer.
    reference_here
        Whether the reference runs in this process, which has to have torch anyway.
    """

    model: str = "smollm2-135m-instruct"
    plans: tuple[str, ...] = ("per-layer", "one-trip")
    edge_plans: tuple[tuple[str, ...], ...] = (("per-layer-r64",), ("one-trip-r64",))
    tune_plan: str | None = "per-layer-r64"
    edges: int = 4
    prompts: int = 8
    tokens: int = 48
    std: float = 0.05
    seed: int = 1
    seconds: float = 1800.0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 22))
    mid_step: int = 10
    tuning_under_way: int = 1
    shortest_s: float = 0.5
    longest_s: float = 20.0
    step_timeout_s: float = 15.0
    connect_timeout_s: float = 10.0
    recover_s: float = 300.0
    start_s: float = 300.0
    patience_s: float = 40.0
    finish_s: float = 300.0
    grace_s: float = 20.0
    tail_s: float = 90.0
    warm_up_s: float = 20.0
    window_s: float = 15.0
    kv_bytes: int = 96 << 20
    tune_steps: int = 4
    tune_batch: int = 4
    micro_batch_tokens: int = 48
    cache_dir: str | None = None
    reference_here: bool = False
    cloud_env: dict[str, str] = field(default_factory=dict)


SHORT = Settings(
    seconds=240.0, counts=dict.fromkeys(KINDS, 3), mid_step=1, tuning_under_way=0, prompts=4,
    tokens=24, longest_s=6.0, tail_s=50.0, window_s=8.0, warm_up_s=12.0, grace_s=5.0, tune_steps=2,
)  # fmt: skip
