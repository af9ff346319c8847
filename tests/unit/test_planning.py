"""Predictions: pure functions of a model's shape, two devices' speeds and a link. No clock is looked at."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.link_preset import PRESETS
from benchmarks.plan_quality import RECORD, entries
from benchmarks.tuning_runs import Record
from edge_client import cli
from edge_client.planning import measure_cloud, measure_edge, paper, quality
from edge_client.planning.candidates import candidates, schedules
from edge_client.planning.model_shape import ModelShape, edge_cost
from edge_client.planning.network import LINKS, LinkFacts
from edge_client.planning.predict import (
    Setting,
    UnknownSpeedError,
    chunk_tokens,
    first_token_s,
    predict,
    step_bytes,
    step_time,
)
from edge_client.planning.recommend import recommend
from edge_client.planning.speeds import CloudSpeed, Drafting, EdgeSpeed, Line
from edge_client.wire_cost import wire_cost
from shared.plan import SHARING_LAYERS, Plan, Projection
from shared.wire_dtypes import WireDtypes
from tests import families

PRODUCTS = tuple(
    Projection(name=name, d_in=d_in, d_out=d_out)
    for name, d_in, d_out in (
        ("self_attn.q_proj", 64, 64), ("self_attn.k_proj", 64, 32), ("self_attn.v_proj", 64, 32),
        ("self_attn.o_proj", 64, 64), ("mlp.gate_proj", 64, 128), ("mlp.up_proj", 64, 128),
        ("mlp.down_proj", 128, 64),
    )
)  # fmt: skip
SHAPE = ModelShape(
    num_layers=16, hidden_size=64, q_dim=64, kv_dim=32, vocab_size=1000, tied_head=True, products=PRODUCTS
)
EDGE = EdgeSpeed(
    head=Line(one_s=1e-3, each_s=1e-4),
    layer=Line(one_s=1e-3, each_s=1e-4),
    codes=Line(one_s=2e-5, each_s=1e-6),
    loop_s=1e-3,
)
CLOUD = CloudSpeed(
    layer=Line(one_s=2e-3, each_s=5e-4),
    exchange=Line(one_s=1e-3, each_s=1e-5),
    message_s=5e-4,
    max_context_tokens=8192,
    max_step_tokens=512,
    max_steps_in_flight=8,
)
FACTS = {"backbone": "tiny", "num_layers": 16, "hidden_size": 64, "rank": 8}
EVERY = tuple(range(16))
PER_LAYER = Plan.subset(name="per-layer", **FACTS)
GROUPED = Plan.subset(EVERY, exchange_layers=EVERY[::4], name="grouped", **FACTS)
ONE_TRIP = Plan.one_trip(PRODUCTS, name="one-trip", **FACTS)
SHARED = Plan.one_trip(PRODUCTS, name="one-trip-shared", share_residual_codes=SHARING_LAYERS, **FACTS)
PLANS = (PER_LAYER, GROUPED, ONE_TRIP, Plan.subset((3, 9), name="subset", **FACTS))


FLOAT32 = WireDtypes.named("float32")


def setting(rtt_s: float = 0.02, **changes) -> Setting:
    link = LinkFacts(name="test", rtt_s=rtt_s, up_bit_s=60e6, down_bit_s=100e6)
    return Setting(**{"shape": SHAPE, "edge": EDGE, "cloud": CLOUD, "link": link, **changes})


def by_name(plan: Plan) -> str:
    return plan.name


# --- the paper's estimate -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_hidden", [False, True])
@pytest.mark.parametrize("model", paper.PAPER_MODELS, ids=lambda model: model.name)
def test_the_papers_estimates_are_reproduced(model, with_hidden):
    found = paper.estimate(model, with_hidden=with_hidden)
    assert found.latency_s == 0
    assert found.tok_s == pytest.approx(model.published_tok_s, rel=0.05)


@pytest.mark.parametrize(("model", "megabytes"), zip(paper.PAPER_MODELS, (265, 332, 432), strict=True))
def test_the_papers_footprint_is_reproduced(model, megabytes):
    assert paper.footprint_bytes(model) / 1e6 == pytest.approx(megabytes, rel=0.005)


@pytest.mark.parametrize(("rtt_s", "most"), [(0.01, 3.0), (0.02, 1.5), (0.08, 0.38)])
def test_latency_is_what_bounds_the_papers_plan(rtt_s, most):
    found = paper.estimate(paper.PAPER_MODELS[0], LinkFacts(name="real", rtt_s=rtt_s))
    assert found.round_trips == 33 and 0.5 * most < found.tok_s <= most * 1.02


def test_the_command_prints_the_papers_estimates_without_a_cloud():
    result = CliRunner().invoke(cli.app, ["plan", "--paper", "--json"])
    assert result.exit_code == 0, result.output
    for model in json.loads(result.stdout)["models"]:
        assert model["reproduced"]["tok_s"] == pytest.approx(model["published_tok_s"], rel=0.05)
        assert [over["link"] for over in model["over_links"]] == ["wifi", "5g", "wan"]
    shown = CliRunner().invoke(cli.app, ["plan", "--paper"])
    assert shown.exit_code == 0 and "27.8" in shown.output


# --- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [WireDtypes.named("bfloat16"), WireDtypes.named("float32", codes="int8")])
@pytest.mark.parametrize("plan", PLANS, ids=by_name)
def test_bytes_of_one_position_are_those_of_the_wire(plan, dtypes):
    cost = wire_cost(plan, dtypes)
    assert step_bytes(plan, dtypes, 1, 1) == (cost.up, cost.down)
    found = predict(plan, setting(wire=dtypes))
    assert (found.bytes_up_per_token, found.bytes_down_per_token) == (cost.up, cost.down)
    assert found.round_trips_per_token == cost.round_trips == found.step.round_trips


@pytest.mark.parametrize("plan", PLANS, ids=by_name)
def test_positions_share_the_messages_overhead(plan):
    (up, down), (more_up, more_down) = step_bytes(plan, FLOAT32, 1, 1), step_bytes(plan, FLOAT32, 5, 5)
    bare_up, bare_down = step_bytes(plan, FLOAT32, 0, 0)
    assert more_up - bare_up == 5 * (up - bare_up) and more_down - bare_down == 5 * (down - bare_down)
    kept_less = step_bytes(plan, FLOAT32, 5, 1)
    assert kept_less == (more_up, more_down - 4 * 64 * 4)


# --- time -----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(rtts=st.tuples(*[st.floats(0, 1)] * 2), positions=st.integers(1, 16))
def test_a_longer_round_trip_never_is_faster(rtts, positions):
    drafting = Drafting(positions=positions)
    for plan in PLANS:
        fast, slow = (predict(plan, setting(rtt, drafting=drafting)) for rtt in sorted(rtts))
        assert fast.decode_tok_s >= slow.decode_tok_s
        assert fast.time_to_first_token_s <= slow.time_to_first_token_s


def test_more_round_trips_never_are_faster():
    plans = [
        Plan.subset(EVERY, exchange_layers=EVERY[::step], name=f"every-{step}", **FACTS)
        for step in (1, 2, 4, 8, 16)
    ]
    for rtt_s in (0.0, 0.004, 0.08):
        found = [predict(plan, setting(rtt_s)) for plan in plans]
        for more, fewer in itertools.pairwise(found):
            assert more.step.round_trips > fewer.step.round_trips
            assert more.decode_tok_s < fewer.decode_tok_s
            assert more.time_to_first_token_s > fewer.time_to_first_token_s


def test_a_step_is_the_sum_that_is_documented():
    found = step_time(PER_LAYER, setting(0.02), 1, 1)
    up, down = step_bytes(PER_LAYER, FLOAT32, 1, 1)
    assert found.latency_s == pytest.approx(16 * 0.02)
    assert found.transfer_s == pytest.approx(8 * up / 60e6 + 8 * down / 100e6)
    assert found.exchange_s == pytest.approx(5e-4 + 15 * 1e-3)
    assert found.cloud_s == pytest.approx(16 * 2e-3)
    assert found.edge_s == pytest.approx(1e-3 + 1e-3 + 2e-5)  # loop, head, one layer's first codes
    resident = step_time(ONE_TRIP, setting(0.02), 1, 1)
    assert resident.latency_s == pytest.approx(0.02) and resident.cloud_s == pytest.approx(14 * 2e-3)
    assert resident.edge_s == pytest.approx(1e-3 + 1e-3 + 14 * 2e-5 + 2 * 1e-3)


def test_drafting_divides_what_a_step_costs():
    plain, drafted = setting(0.08), setting(0.08, drafting=Drafting(positions=4, tokens_per_step=2.0))
    one, two = predict(ONE_TRIP, plain), predict(ONE_TRIP, drafted)
    assert one.decode_tok_s < two.decode_tok_s < 2 * one.decode_tok_s
    assert two.round_trips_per_token == 0.5 and two.bytes_up_per_token > one.bytes_up_per_token


def test_a_prompt_in_chunks_hides_round_trips_but_not_work():
    several = setting(0.08, cloud=CLOUD.model_copy(update={"max_step_tokens": 128}))
    one_by_one = setting(
        0.08, cloud=CLOUD.model_copy(update={"max_step_tokens": 128, "max_steps_in_flight": 1})
    )
    pipelined, waiting = first_token_s(PER_LAYER, several), first_token_s(PER_LAYER, one_by_one)
    assert pipelined < waiting
    work = sum(16 * CLOUD.layer.at(128) for _ in range(4))
    assert pipelined > work and pipelined > 16 * 0.08


def test_a_plan_with_layers_here_needs_their_speed():
    unknown = setting(edge=EDGE.model_copy(update={"layer": None}))
    assert predict(PER_LAYER, unknown).decode_tok_s > 0
    with pytest.raises(UnknownSpeedError, match="one-trip"):
        predict(ONE_TRIP, unknown)


def test_energy_is_power_times_time():
    found = predict(PER_LAYER, setting())
    busy, idle = found.step.edge_s, found.step.total_s - found.step.edge_s
    assert found.energy_per_token_j == pytest.approx(10 * busy + 2 * idle)


# --- the edge's share -----------------------------------------------------------------------------------


def test_memory_counts_resident_layers():
    head = Plan.subset((), name="head", head_layers=1, **FACTS)
    two = Plan.subset((), name="two", head_layers=1, tail_layers=1, **FACTS)
    none, one, more = (edge_cost(SHAPE, plan, 4, 100) for plan in (PER_LAYER, head, two))
    assert (none.resident_layers, none.resident_bytes, none.kv_bytes, none.backbone_share) == (0, 0, 0, 0.0)
    assert more.resident_bytes == 2 * one.resident_bytes and more.kv_bytes == 2 * one.kv_bytes
    assert one.kv_bytes == 2 * 32 * 100 * 4 and one.backbone_share == pytest.approx(1 / 16)
    assert more.memory_bytes - one.memory_bytes == one.resident_bytes + one.kv_bytes
    assert more.flops_per_token - one.flops_per_token == SHAPE.layer_flops(100)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_sizes_are_those_of_the_real_model(family):
    model = families.build(family)
    shape = ModelShape.from_config(model.config)
    layer = model.model.layers[0]
    linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    assert shape.layer_weights == linear
    assert shape.head_weights == model.lm_head.weight.numel()
    plan = Plan.subset((), name="x", backbone="x", num_layers=4, hidden_size=48, head_layers=2)
    held = 2 * sum(parameter.numel() for parameter in layer.parameters()) * 4
    assert edge_cost(shape, plan, 4, 10).resident_bytes == pytest.approx(held, rel=0.02)  # biases, more norms


def test_rejected_guesses_are_operations_too():
    one, five = (
        predict(ONE_TRIP, setting(0.08, drafting=drafting)).edge.flops_per_token
        for drafting in (Drafting(), Drafting(positions=5, tokens_per_step=2.0))
    )
    assert five == pytest.approx(2.5 * one)


# --- the recommendation ---------------------------------------------------------------------------------


def test_one_trip_is_recommended_over_a_slow_link_and_says_why():
    found = [predict(plan, setting(0.08)) for plan in PLANS[:3]]
    chosen = recommend(found, {})
    assert chosen.plan == "one-trip"
    said = " ".join(chosen.reasons)
    assert "1 round trips" in said and "not measured" in said and "grouped" in said


def test_a_plan_that_is_too_large_or_not_offered_is_not_recommended():
    found = [predict(PER_LAYER, setting(0.08)), predict(ONE_TRIP, setting(0.08), offered=False)]
    chosen = recommend(found, {})
    assert chosen.plan == "per-layer" and "one-trip would give" in " ".join(chosen.reasons)
    offered = [predict(plan, setting(0.08)) for plan in (PER_LAYER, ONE_TRIP)]
    room = offered[1].edge.memory_bytes - 1
    chosen = recommend(offered, {}, room)
    assert chosen.plan == "per-layer" and "one-trip asks too much" in " ".join(chosen.reasons)
    assert recommend(offered, {}, 1).plan is None
    half = Plan.subset((), name="half", head_layers=8, **FACTS)
    assert recommend([predict(half, setting(0.08)), offered[0]], {}).plan == "per-layer"


def test_measured_quality_decides_between_equally_fast_plans():
    fused = Plan.subset(name="fused", layout="fused", **FACTS)
    found = [predict(plan, setting(0.08)) for plan in (PER_LAYER, fused)]
    measured = quality.table()[0]
    assert recommend(found, {}).plan == "fused"  # less M, less memory
    chosen = recommend(found, {"per-layer": [measured]})
    assert chosen.plan == "per-layer" and measured.line() in " ".join(chosen.reasons)
    assert "taken because its quality was measured" in " ".join(chosen.reasons)


def test_named_schedules_are_those_that_are_not_offered():
    assert [plan.schedule for plan in candidates([GROUPED], SHAPE)] == [
        "per_layer",
        "per_layer",
        "subset",
        "grouped",
        *["resident"] * 4,
    ]
    offered = Plan.subset(name="mine", **{**FACTS, "rank": 64})
    names = [plan.name for plan in candidates([offered], SHAPE)]
    assert names == ["fused", "subset", "grouped", "one-trip", "one-trip-shared", "one-trip-lean", "resident"]


# --- quality --------------------------------------------------------------------------------------------


def test_every_figure_is_in_the_record():
    runs = [run for run in Record(RECORD) if run.spec.method == "privatelora" and run.test]
    assert quality.table()
    for one in quality.table():
        for scored in one.seeds:
            found = [
                run.test
                for run in runs
                if (run.spec.model, run.spec.task, run.spec.layout, run.spec.rank, run.spec.initialiser)
                == (one.backbone, one.task, one.layout, one.rank, one.initialiser)
                and (run.spec.steps, run.spec.batch, run.spec.lr, run.spec.seed)
                == (one.steps, one.batch, one.lr, scored.seed)
            ]
            assert (one.rows, scored.nats, scored.correct) in [(t.rows, t.nats, t.correct) for t in found]


def test_the_table_is_made_of_the_record():
    made = entries(Record(RECORD))
    assert made and all(quality.Quality.model_validate(one).seeds for one in made)


def test_quality_is_known_of_the_very_plan_only():
    facts = {"backbone": "smollm2-135m-instruct", "num_layers": 30, "hidden_size": 576}
    assert {one.task for one in quality.known(Plan.subset(name="a", **facts), PRODUCTS)} >= {"reuters8"}
    for other in (
        Plan.subset(name="a", rank=32, **facts),
        Plan.subset(name="a", r_c2d=64, r_d2c=32, **facts),
        Plan.subset(name="a", scale=2.0, **facts),
        Plan.subset(name="a", targets=("q",), **facts),
        Plan.subset(name="a", initialiser="gaussian", **facts),
        Plan.subset((1, 2), name="a", **facts),
        Plan.subset(name="a", **{**facts, "backbone": "another"}),
    ):
        assert not quality.known(other, PRODUCTS)


def test_a_named_schedule_is_recognised_at_any_rank_and_under_any_name():
    facts = {**FACTS, "rank": 5}
    found = {name: quality.layout_of(plan, PRODUCTS) for name, plan in schedules(PRODUCTS, **facts).items()}
    assert found == {
        "per-layer": "per_projection",
        "fused": "fused",
        "subset": "subset",
        "grouped": "grouped",
        "one-trip": "one_trip",
        "one-trip-shared": "one_trip_shared",
        "one-trip-lean": "one_trip_lean",
        "resident": "resident",
    }
    mine = SHARED.model_copy(update={"name": "mine", "lora": PRODUCTS[::-1]})
    assert SHARED.name not in [plan.name for plan in candidates([mine], SHAPE, rank=8)]
    assert quality.layout_of(mine, PRODUCTS) == "one_trip_shared"
    higher = Plan.one_trip(PRODUCTS, lora_rank=32, name="x", **FACTS)
    fewer = Plan.one_trip(PRODUCTS[:1], name="x", **FACTS)
    without = Plan.subset((), name="x", head_layers=1, tail_layers=1, **FACTS)
    assert [quality.layout_of(plan, PRODUCTS) for plan in (higher, fewer, without)] == [None] * 3


def test_ranks_of_codes_that_are_never_sent_do_not_matter():
    offered = schedules(PRODUCTS, **{**FACTS, "rank": 5})["resident"].model_copy(update={"r_d2c": 3})
    assert quality.layout_of(offered, PRODUCTS) == "resident"
    assert "resident" not in [plan.name for plan in candidates([offered], SHAPE)]


def test_plans_of_as_many_codes_in_other_groups_are_not_the_same():
    wide = Plan.subset(name="mine", layout="fused", **{**FACTS, "rank": 192})
    assert "per-layer" in [plan.name for plan in candidates([wide], SHAPE)]


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rtt-ms", "1e308"), "--rtt-ms at most 3,600,000"),
        (("--rtt-ms", "inf"), "must be a finite number"),
        (("--up-mbit", "0"), "must be above 0"),
        (("--up-mbit", "inf"), "must be a finite number"),
        (("--memory-mib", "inf"), "must be a finite number"),
        (("--busy-watt", "nan"), "--busy-watt"),
        (("--tokens-per-step", "nan"), "--tokens-per-step"),
        (("--positions", "66"), "--positions"),
    ],
)
def test_impossible_numbers_are_refused_before_anybody_is_asked(words, said, tmp_path):
    run = CliRunner().invoke(
        cli.app, ["plan", "--cloud", "127.0.0.1:9", "--cache-dir", str(tmp_path), *words]
    )
    assert run.exit_code != 0 and isinstance(run.exception, SystemExit)
    assert said in " ".join(run.output.replace("│", " ").split())


# --- measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_this_side_is_timed_for_a_family(family):
    model = families.build(family)
    found = measure_edge.measure_edge(model.config, families.plan_for(model), "cpu", torch.float32)
    assert found.head.one_s > 0 and found.loop_s > 0 and found.codes.one_s > 0
    assert found.layer is not None and found.layer.one_s > 0


def test_a_rate_is_told_from_noise():
    slow, fast = [0.21, 0.2, 0.19, 0.2, 0.22], [0.1, 0.1, 0.11, 0.1, 0.09]
    assert measure_cloud.rate_of(1_000_000, slow, fast) == pytest.approx(80e6)
    assert measure_cloud.rate_of(-1_000_000, fast, slow) == pytest.approx(80e6)
    assert measure_cloud.rate_of(1_000_000, fast, slow) is None  # more bytes in less time
    assert measure_cloud.rate_of(-1_000_000, slow, fast) is None
    assert measure_cloud.rate_of(0, slow, fast) is None
    assert measure_cloud.rate_of(1_000_000, [t + 0.01 for t in fast], fast) is None  # a tenth
    assert measure_cloud.rate_of(1000, [0.002], [0.001]) is None  # too short to tell
    assert measure_cloud.rate_of(2_500_000, [5.0], [3.0]) == pytest.approx(10e6)  # each taken once
    # One step of each kind may have been disturbed, and no more.
    assert measure_cloud.rate_of(1_000_000, [*slow[:4], 0.05], [*fast[:4], 0.9]) is not None
    assert measure_cloud.rate_of(1_000_000, [*slow[:3], 0.05, 0.05], fast) is None


def test_a_machine_that_slows_down_is_no_rate():
    before, between, after = [0.1] * 5, [0.15] * 5, [0.3] * 5
    assert measure_cloud.rate_of(1_000_000, before + after, between) is None
    assert measure_cloud.rate_of(-1_000_000, before + after, between) is None


def test_a_line_never_falls():
    assert Line.through(1.0, 4.0, 4).at(4) == 4.0
    assert Line.through(2.0, 1.0, 4) == Line(one_s=2.0, each_s=0.0)
    assert Line.through(1.0, 1.0, 1) == Line(one_s=1.0, each_s=0.0)


def test_links_are_those_that_are_measured_over():
    assert LINKS.keys() == PRESETS.keys()
    for name, link in LINKS.items():
        preset = PRESETS[name]
        assert link.rtt_s == pytest.approx(preset.rtt_ms / 1e3)
        rates = [None if rate is None else rate * 1e6 for rate in (preset.up_mbit_s, preset.down_mbit_s)]
        assert [link.up_bit_s, link.down_bit_s] == rates


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--link", "moon"], "no link is called 'moon'"),
        (["--tokens-per-step", "2"], "cannot yield 2 tokens"),
        (["--cloud", "nowhere"], "HOST:PORT"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_measured(words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path))
    result = CliRunner().invoke(cli.app, ["plan", *words])
    assert result.exit_code == 2 and message in result.stderr


def test_as_much_is_read_between_two_timings_as_the_largest_cache_has(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "266240K", "nonsense")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert measure_edge.cache_bytes(tmp_path) == 260 << 20
    (tmp_path / "index2" / "size").write_text("9999M\n")
    assert measure_edge.cache_bytes(tmp_path) == measure_edge.MOST_CACHE_BYTES, "more is not believed"
    assert measure_edge.cache_bytes(tmp_path / "none") == measure_edge.LEAST_CACHE_BYTES


def test_a_prompt_is_cut_shorter_where_no_chunk_waits_for_answers():
    assert (chunk_tokens(PER_LAYER, setting()), chunk_tokens(ONE_TRIP, setting())) == (512, 256)
