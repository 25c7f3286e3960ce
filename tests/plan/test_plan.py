"""A plan tells the run's costs before the run: the same clients, batches, prices and endings, without training."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fleetune.cost.polynomials import BASIS
from fleetune.engine.round.planner import RoundPlanner
from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.models.outline import outline_base
from fleetune.plan import walk
from fleetune.plan.schedule import ExpectedRounds, expected_longest
from fleetune.plan.summary import by_stage, comparison
from fleetune.plan.variants import variants
from fleetune.plan.walk import Plan, outline, plan
from fleetune.spec import load
from support import REPOSITORY, commands, runs, tiny
from support.commands import Output

Command = Callable[..., Output]
COSTED = {"cost.model": "llama2-7b", "cost.weights": "nf4", "cost.precision": "bf16"}

COMING_AND_GOING = {
    "fleet.dropout": 0.3,
    "fleet.adapt": "checkpointing",
    "fleet.budgets": {"memory_bytes": 4.0e9},
    "fleet.availability": {"kind": "markov", "mean_on_seconds": 60, "mean_off_seconds": 30},
    "rounds.close": "deadline",
    "rounds.deadline_seconds": 20,
}


SHORT_BATCHES = {"local.epochs": 0.6, "local.batch_size": 4}


@pytest.fixture
def fleetune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A command of this process."""
    return lambda *arguments: commands.fleetune(capfd, monkeypatch, *arguments)


def planned(of: Plan) -> pd.DataFrame:
    return pd.DataFrame(of.rounds)


def as_recorded(column: Any, recorded: pd.Series) -> list[Any]:
    """Whole bytes where the records hold whole bytes, None for what is not there."""
    return plain(np.rint(column) if recorded.dtype.kind == "i" else column)


def plain(column: Any) -> list[Any]:
    return [None if pd.isna(value) else value for value in np.asarray(column).tolist()]


AS_LLAMA2_7B = {**COSTED, **COMING_AND_GOING, **SHORT_BATCHES}
# AdaLoRA's scores are added up site by site over all blocks, so that 32 of them are traced at full depth: a minute.
CASES = [(name, {}) for name in METHODS] + [(name, AS_LLAMA2_7B) for name in METHODS if name != "adalora"]

# What training alone can tell, a plan assumes (`Method.plan_assumes`): SmartFed's quotas follow importances that were measured.
WITHOUT_GUESSES = {"smartfed": {"method.elastic": False}}


@pytest.mark.parametrize(
    ("method", "costs"), CASES, ids=[f"{name}-as {'llama2-7b' if costs else 'trained'}" for name, costs in CASES]
)
def test_a_plan_is_what_the_run_records(method: str, costs: dict[str, Any], tmp_path: Path):
    """Every column of rounds.parquet that needs no training, and every client's costs, to the last bit."""
    spec = tiny.spec({"evaluation.generate": False, **costs, **WITHOUT_GUESSES.get(method, {})}, method=method)
    done = runs.run(spec)
    problem, assumed = outline(spec, cache_dir=tmp_path)
    assert assumed == []
    rows, clients = zip(*walk.walk(problem, RoundPlanner(problem)), strict=True)
    ours, theirs = pd.DataFrame(rows), done.rounds
    assert {"sim_seconds", "uplink_bytes", "energy_joules", "num_ok"} <= set(ours)
    for name in ours:
        assert as_recorded(ours[name], theirs[name]) == plain(theirs[name]), name
    for number, columns in enumerate(clients, start=1):
        recorded = done.clients[done.clients["round"] == number].reset_index(drop=True)
        for name, column in columns.items():
            assert as_recorded(column, recorded[name]) == plain(recorded[name]), name


def test_a_plan_ends_with_the_virtual_time_as_the_run_does(tmp_path: Path):
    spec = tiny.spec({"rounds.num_rounds": 4})
    ends = planned(plan(spec, cache_dir=tmp_path))["sim_seconds"].tolist()
    limited = tiny.spec({"rounds.num_rounds": 4, "rounds.max_sim_seconds": (ends[0] + ends[1]) / 2})
    assert planned(plan(limited, cache_dir=tmp_path))["sim_seconds"].tolist() == ends[:2]


def test_a_plan_adds_up_its_rounds(tmp_path: Path):
    """Sums over devices are the rounds' own; a stage's row is the mean of its clients that start."""
    spec = tiny.spec({"rounds.num_rounds": 4}, method="devft")
    of = plan(spec, cache_dir=tmp_path)
    by_round = pd.DataFrame(of.devices).groupby("round")
    for name in ("uplink_bytes", "downlink_bytes", "energy_joules", "num_clients", "num_ok"):
        np.testing.assert_allclose(by_round[name].sum(), planned(of)[name], rtol=1e-12)
    stages = pd.DataFrame(by_stage(of))
    assert stages.groupby("stage")["depth"].first().tolist() == [1, 2, 4]
    assert stages["num_clients"].sum() == of.totals["num_clients"] == 4 * 3
    assert (stages["uplink_bytes"] * stages["num_clients"]).sum() == pytest.approx(of.totals["uplink_bytes"])
    assert of.totals["sim_seconds"] == planned(of)["sim_seconds"].iloc[-1]


def test_expected_longest_is_the_mean_over_all_draws():
    """Lengths 3, 5, 9 and 9; two of them: pairs (3,5) (3,9) (3,9) (5,9) (5,9) (9,9) have 5 + 5 x 9 = 50 / 6 as their mean.
    A second owner has 4 alone, and a third nothing."""
    lengths, owner, sizes = np.array([9.0, 3, 9, 5, 4]), np.array([0, 0, 0, 0, 1]), np.array([4, 1, 0])
    found = expected_longest(lengths, owner, sizes, draws=2)
    pairs = [max(pair) for pair in itertools.combinations([3, 5, 9, 9], 2)]
    assert found.tolist() == pytest.approx([np.mean(pairs), 4, 0])
    assert expected_longest(lengths, owner, sizes, draws=7).tolist() == pytest.approx([9, 4, 0])


def test_expected_lengths_are_near_those_drawn(tmp_path: Path):
    """600 batches of the tiny world: the mean of the padded lengths to 1 %, steps exactly, the longest never exceeded."""
    spec = tiny.spec({"rounds.num_rounds": 60, "rounds.clients_per_round": 5, "local.epochs": 0.4})
    problem, _ = outline(spec, cache_dir=tmp_path)
    drawn, expected = RoundPlanner(problem), ExpectedRounds(problem)
    state = problem.method.start()
    padded: list[float] = []
    learnt: list[float] = []
    for round_idx in range(60):
        ours = drawn.round(state, round_idx, {}, np.zeros(6), sim_seconds=0)
        theirs = expected.round(state, round_idx, {}, np.zeros(6), sim_seconds=0)
        assert ours.client_ids.tolist() == theirs.client_ids.tolist()
        a, b = drawn.load(ours.work, ours.client_ids), expected.load(theirs.work, theirs.client_ids)
        assert a.num_steps.tolist() == b.num_steps.tolist()
        assert (a.largest <= b.largest).all()
        total = [(load.mean * load.num_steps[:, None]).sum(axis=0) for load in (a, b)]
        padded.append(total[0][BASIS.index("B S")] / total[1][BASIS.index("B S")])
        learnt.append(total[0][BASIS.index("M")] / total[1][BASIS.index("M")])
    assert np.mean(padded) == pytest.approx(1, abs=0.01)
    assert np.mean(learnt) == pytest.approx(1, abs=0.01)


def test_a_fleet_too_large_to_draw_is_planned_by_expectation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same clients and bytes, times that differ by what batches differ; and the plan says so."""
    spec = tiny.spec()
    exact = plan(spec, cache_dir=tmp_path)
    monkeypatch.setattr(walk, "MAX_DRAWN", 8)
    near = plan(spec, cache_dir=tmp_path)
    assert exact.assumptions == []
    assert "expectation" in near.assumptions[0]
    assert near.totals["uplink_bytes"] == exact.totals["uplink_bytes"]
    assert near.totals["flops"] == pytest.approx(exact.totals["flops"], rel=0.05)
    costly = plan(tiny.spec(COSTED, method="devft"), cache_dir=tmp_path)
    refused = [row for row in costly.devices if row["num_oom"]]
    assert [row["stage"] for row in refused] == [row["stage"] for row in refused if row["refused_hint"]]
    assert len(refused) >= 1


def test_lengths_come_from_the_cache_and_notice_a_changed_file(tmp_path: Path):
    """The second plan reads no text; another content of the same file is seen."""
    data = tmp_path / "data.jsonl"
    text = Path(tiny.data_file()).read_text()
    data.write_text(text)
    spec = tiny.spec({"data.dataset": str(data)})
    first = plan(spec, cache_dir=tmp_path)
    assert len(list((tmp_path / "lengths").iterdir())) == 1
    assert plan(spec, cache_dir=tmp_path).rounds == first.rounds
    data.write_text(text.replace("Q: ", "Question: what is "))
    longer = plan(spec, cache_dir=tmp_path)
    assert longer.totals["flops"] > first.totals["flops"]


def test_who_is_refused_reads_what_would_fit(tmp_path: Path):
    """DevFT of 4, 8, 16 and 32 blocks of llama2-7b in nf4 on a TX2 NX: from the third stage on, half the blocks."""
    spec = load(REPOSITORY / "jobs" / "paper" / "devft_on_jetson.yaml")
    stages = [row for row in by_stage(plan(spec, cache_dir=tmp_path)) if row["device"] == "jetson-tx2-nx"]
    assert [row["num_oom"] > 0 for row in stages] == [False, False, True, True]
    assert [row["refused_by"] for row in stages] == [None, None, "memory", "memory"]
    assert ["8 blocks" in (row["refused_hint"] or "") for row in stages] == [False, False, True, True]
    adapted = spec.model_copy(update={"fleet": spec.fleet.model_copy(update={"adapt": "capacity"})})
    stages = [row for row in by_stage(plan(adapted, cache_dir=tmp_path)) if row["device"] == "jetson-tx2-nx"]
    assert [row["num_oom"] for row in stages] == [0] * 4
    assert [row["least_depth"] for row in stages] == [4, 8, 8, 8]


def test_checkpointing_needs_less_memory_and_more_work(tmp_path: Path):
    """llama2-7b in nf4: blocks keep their input alone, and are computed once more."""
    jobs = {"model.base": "llama2-7b", "model.quantization": "nf4", "fleet.devices": {"server-a100": 1.0}}
    kept, again = (plan(tiny.spec({**jobs, "local.checkpointing": on}), cache_dir=tmp_path) for on in (False, True))
    assert again.devices[0]["activation_bytes"] < 0.5 * kept.devices[0]["activation_bytes"]
    assert 1.2 < again.totals["flops"] / kept.totals["flops"] < 1.5
    assert all(row["checkpointing"] for row in again.devices)


def test_an_architecture_is_planned_without_weights_or_data(tmp_path: Path):
    """Rank 2 on q of llama2-7b's 32 blocks: 32 x 2 x (4096 + 4096) x 4 B = 2,097,152 B each way; 16 tokens a batch assumed."""
    jobs: dict[str, Any] = {
        "model.base": "llama2-7b",
        "model.lora.targets": "q_proj",
        "data.partition.kind": "dirichlet",
    }
    jobs["fleet.devices"] = {"server-a100": 1.0}
    of = plan(tiny.spec(jobs), cache_dir=tmp_path)
    hub = plan(tiny.spec({**jobs, "model.base": "meta-llama/Llama-2-7b-hf"}), cache_dir=tmp_path)
    assert of.totals["uplink_bytes"] == 9 * 2_097_152
    assert hub.totals == of.totals
    assert [note.partition(":")[0] for note in of.assumptions] == [
        "llama2-7b comes without a tokenizer",
        "its size is not known",
        "data.partition.kind=dirichlet goes by a column of it",
    ]


def test_a_folder_with_nothing_but_a_configuration_can_be_planned(tmp_path: Path):
    """Bytes as with the weights beside it; lengths, for want of a tokenizer, are assumed."""
    (tmp_path / "config.json").write_text((Path(tiny.model_folder()) / "config.json").read_text())
    whole, bare = (plan(tiny.spec(base), cache_dir=tmp_path) for base in ({}, {"model.base": str(tmp_path)}))
    assert bare.totals["uplink_bytes"] == whole.totals["uplink_bytes"]
    assert "comes without a tokenizer" in bare.assumptions[0]


def test_a_data_set_of_the_hub_is_not_fetched(tmp_path: Path):
    """Every example has data.max_tokens tokens then: FLOPs grow faster than the length, because of attention."""
    short = plan(tiny.spec({"data.dataset": "tatsu-lab/alpaca", "data.max_tokens": 16}), cache_dir=tmp_path)
    long = plan(tiny.spec({"data.dataset": "tatsu-lab/alpaca", "data.max_tokens": 32}), cache_dir=tmp_path)
    assert "tatsu-lab/alpaca is not read by a plan" in short.assumptions[0]
    assert long.totals["flops"] > 2 * short.totals["flops"]


def test_methods_are_put_side_by_side(tmp_path: Path):
    """FedSA-LoRA sends A alone. On 4 blocks of width 32 and MLP 48 with rank 2, A has 2 (6 x 32 + 48) = 480 elements a block
    and B 2 (4 x 32 + 2 x 48 + 32) = 512: FedIT sends 992 / 480 as much."""
    job = commands.job_file(tmp_path)
    plans = [
        plan(spec, label=label, cache_dir=tmp_path)
        for label, spec in variants(job, [], compare="fedit,fedsa-lora,fedprox")
    ]
    rows = comparison(plans)
    assert [row["plan"] for row in rows] == ["fedit", "fedsa-lora", "fedprox"]
    assert [row["uplink_bytes_ratio"] for row in rows] == [1, 992 / 480, 1]


def test_variants_are_the_product_of_methods_and_values(tmp_path: Path):
    """A method's own settings reach that method alone."""
    job = commands.job_file(tmp_path, method="devft")
    settings = ["method.beta=0.2", "method.split_point=1"]
    made = variants(job, settings, compare="devft,split-lora,fedit", vary=["local.batch_size=1,2"])
    assert [label for label, _ in made] == [
        f"{name}, local.batch_size={size}" for name in ("devft", "split-lora", "fedit") for size in (1, 2)
    ]
    methods = [spec.method.model_dump() for _, spec in made]
    assert methods[0]["beta"] == 0.2
    assert methods[0]["initial_capacity"] == 1  # the job's own
    assert methods[2]["split_point"] == 1
    assert methods[4] == {"name": "fedit"}
    assert [spec.local.batch_size for _, spec in made] == [1, 2] * 3


def test_the_command_prints_tables_and_writes_files(fleetune: Command, tmp_path: Path):
    job = commands.job_file(tmp_path, {**COSTED, "fleet.devices": {"jetson-nano": 0.5, "server-a100": 0.5}})
    out = fleetune("plan", job, "--compare", "fedit,fedsa-lora", "--out", tmp_path / "plan")
    assert out.status == 0, out.stderr
    assert "tiny: 3 rounds of 3 out of 6 clients" in out.stdout
    assert "costed as llama2-7b" in out.stdout
    assert "none" in out.stdout  # LLaMA2-7B does not fit a Jetson Nano
    table = pd.read_parquet(tmp_path / "plan" / "plan.parquet")
    assert set(table["plan"]) == {"fedit", "fedsa-lora"}
    assert table.loc[table["device"] == "jetson-nano", "num_oom"].equals(
        table.loc[table["device"] == "jetson-nano", "num_clients"]
    )
    assert {path.suffix for path in (tmp_path / "plan" / "figures").iterdir()} == {".png"}
    page = (tmp_path / "plan" / "plan.html").read_text()
    assert page.count("<img") == len(list((tmp_path / "plan" / "figures").iterdir()))


def test_the_command_s_document(fleetune: Command, tmp_path: Path):
    out = fleetune("plan", commands.job_file(tmp_path), "--vary", "local.steps=1,2", "--json")
    document = out.document
    assert [entry["plan"] for entry in document["plans"]] == ["local.steps=1", "local.steps=2"]
    once, twice = (entry["totals"]["flops"] for entry in document["plans"])
    assert twice == pytest.approx(2 * once, rel=0.2)
    assert document["comparison"][1]["flops_ratio"] == once / twice


def test_a_plan_loads_no_engine_and_no_model_code(tmp_path: Path):
    """From the cache on it imports neither transformers nor Ray, MLflow, pandas or matplotlib: it starts in a second."""
    job = commands.job_file(tmp_path)
    heavy = ("transformers", "ray", "mlflow", "pandas", "matplotlib")
    script = "import sys; from fleetune import cli; sys.argv = sys.argv[1:]\ntry: cli.main()\n"
    script += f"except SystemExit as e: print(e.code, *[m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", script, "fleetune", "plan", str(job)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    ("overrides", "field", "said"),
    [
        ({"model.base": "llama2-7"}, "model.base", "did you mean 'llama2-7b'"),
        ({"model.base": "someone/else-7b"}, "model.base", "a plan reads nothing from the hub"),
        ({"model.base": "tinyllama-1.1b", "data.max_tokens": 4096}, "data.max_tokens", "the model's 2048 positions"),
        ({"cost.model": "tinyllama-1.1b", "data.max_tokens": 4096}, "data.max_tokens", "128 positions"),
        ({"cost.model": "llama2-7x"}, "cost.model", "did you mean 'llama2-7b'"),
        (
            {"method": {"name": "devft", "initial_capacity": 40}, "model.base": "llama2-7b"},
            "method.initial_capacity",
            "32 blocks",
        ),
        (
            {"method": {"name": "split-lora", "split_point": 32}, "model.base": "llama2-7b"},
            "method.split_point",
            "from 1 to 31",
        ),
        ({"model.lora.targets": ["c_attn"]}, "model.lora.targets", "q_proj"),
        ({"cost.precision": "fp8"}, "cost.precision", "fp32"),
        ({"fleet.devices": {"jetson-nanoo": 1.0}}, "fleet.devices", "did you mean 'jetson-nano'"),
        ({"rounds.clients_per_round": 100}, "rounds.clients_per_round", "exceeds"),
        ({"data.dataset": "nothing.jsonl"}, "data.dataset", "nothing.jsonl"),
    ],
)
def test_what_cannot_be_planned_is_said(
    fleetune: Command, tmp_path: Path, overrides: dict[str, Any], field: str, said: str
):
    job = commands.job_file(tmp_path)
    sets = [
        f"--set={path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in overrides.items()
    ]
    out = fleetune("plan", job, *sets, "--json")
    assert out.status == 2
    assert out.document["field"].startswith(field)
    assert said in out.stderr


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--compare", "fedit,fedavgg"], "--compare"),
        (["--vary", "local.batch_size=4"], "--vary"),
        (["--vary", "local.batch=1,2"], "local.batch"),
        (["--vary", "seed=" + ",".join(map(str, range(300)))], "--vary"),
        (["--out", "/dev/null/plan"], "--out"),
    ],
)
def test_options_that_make_no_sense(fleetune: Command, tmp_path: Path, arguments: list[str], field: str):
    out = fleetune("plan", commands.job_file(tmp_path), *arguments, "--json")
    assert out.status == 2
    assert out.document["field"] == field


def test_an_architecture_s_name_is_no_model_to_run(fleetune: Command, tmp_path: Path):
    """It has no weights; the message says what it is good for."""
    out = fleetune("run", commands.job_file(tmp_path), "--set", "model.base=llama2-7b", "--json")
    assert out.status == 2
    assert "cost.model" in out.document["hint"]
    assert "fleetune plan" in out.document["hint"]


def test_the_costed_model_s_positions_are_a_limit_too(tmp_path: Path):
    """TinyLlama has 2,048; LLaMA2-7B, which is trained, 4,096."""
    spec = tiny.spec({"model.base": "llama2-7b", "cost.model": "tinyllama-1.1b", "data.max_tokens": 3000})
    with pytest.raises(UserError, match="2048 positions of the costed tinyllama") as caught:
        plan(spec, cache_dir=tmp_path)
    assert caught.value.field == "data.max_tokens"


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_an_outline_has_the_tensors_of_the_base(quantization: str):
    """Names, types and sizes; but for the digits of one number in nf4's settings, so to 16 bytes a matrix."""
    spec = tiny.spec({"model.quantization": quantization})
    real, outlined = runs.inputs(spec).base, outline_base(spec.model)
    assert outlined.config == {name: real.config[name] for name in outlined.config}
    kinds = {name: (w.dtype, tuple(w.shape)) for name, w in real.weights.items() if "quant_state" not in name}
    assert kinds == {
        name: (w.dtype, tuple(w.shape)) for name, w in outlined.weights.items() if "quant_state" not in name
    }
    assert all(abs(real.weights[name].nbytes - w.nbytes) <= 16 for name, w in outlined.weights.items())
    assert outlined.is_outline
    assert not real.is_outline


def test_a_device_without_bf16_is_named(tmp_path: Path):
    of = plan(tiny.spec({"cost.precision": "bf16"}), cache_dir=tmp_path)
    assert of.assumptions == ["no bf16 on jetson-nano: the fp16 rate stands for it"]
