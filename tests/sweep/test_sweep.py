"""Sweeps without Ray: what becomes a trial, what is refused before any starts, what is there already, what is proposed."""

from __future__ import annotations

import http.server
import json
import math
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from fleetune.columns import TRIAL_COLUMNS, names
from fleetune.errors import UserError
from fleetune.records import RunDirectory
from fleetune.spec import RunSpec
from fleetune.sweep import config, expansion
from fleetune.sweep.config import Metric, SweepSpec
from fleetune.sweep.optuna_search import OptunaSearch, probes
from fleetune.sweep.status import Entry, SweepStatus
from support import tiny
from support.commands import fleetune


def sweep_of(**fields: Any) -> SweepSpec:
    """A sweep of the tiny run; DevFT unless the base says otherwise."""
    base = {**tiny.spec({"execution": "auto"}, method="devft").to_dict(), **fields.pop("base", {})}
    return SweepSpec.model_validate({"name": "growth", "base": base, **fields})


def file_of(folder: Path, **fields: Any) -> Path:
    """The same as a sweep file beside its base."""
    (folder / "job.yaml").write_text(yaml.safe_dump(tiny.spec(method="devft").to_dict()))
    path = folder / "growth.yaml"
    path.write_text(yaml.safe_dump({"base": "job.yaml", **fields}))
    return path


# -- expansion ---------------------------------------------------------------------------------------------------------
def test_a_grid_is_every_combination_the_last_field_fastest():
    """2 growth rates x 2 capacities x 2 seeds are eight trials, seeds innermost."""
    sweep = sweep_of(grid={"method.growth_rate": [2, 4], "method.initial_capacity": [1, 2]}, seeds=[0, 7])
    trials = expansion.trials_of(sweep)
    found = [tuple(trial.overrides.values()) for trial in trials]
    assert found == [(2, 1, 0), (2, 1, 7), (2, 2, 0), (2, 2, 7), (4, 1, 0), (4, 1, 7), (4, 2, 0), (4, 2, 7)]
    assert [trial.number for trial in trials] == list(range(8))
    assert trials[5].spec.method.growth_rate == 4  # type: ignore[union-attr]
    assert trials[5].spec.seed == 7


def test_a_trial_is_one_process_of_one_thread_unless_it_asks_for_a_gang():
    """On every machine alike, because cohorts and threads are part of a job's identity."""
    (auto,) = expansion.trials_of(sweep_of(seeds=[0]))
    assert (auto.spec.execution.kind, auto.spec.execution.workers, auto.spec.execution.threads) == ("serial", 1, 1)
    assert auto.spec.execution.cohort == 3  # all clients of a round
    (gang,) = expansion.trials_of(sweep_of(seeds=[0], base={"execution": {"workers": 3, "threads": 2}}))
    assert (gang.spec.execution.kind, gang.spec.execution.workers, gang.spec.execution.threads) == ("ray", 3, 2)


def test_a_trial_on_gpus_takes_its_share_of_them():
    """A process takes half a GPU where two share one, and a gang of three workers as much each; four halves hold one gang."""
    from fleetune.sweep import resources

    shared = {"execution.device": "cuda", "execution.workers_per_gpu": 2}
    alone = expansion.decided(tiny.spec({"execution": "auto", **shared}))
    gang = expansion.decided(
        tiny.spec({"execution": "auto", **shared, "execution.kind": "ray", "execution.workers": 3})
    )
    assert resources.bundles_of(alone) == [{"CPU": 1.0, "GPU": 0.5}]
    assert resources.bundles_of(gang) == [{"CPU": 1.0, "GPU": 0.5}] * 3
    assert resources.bundles_of(expansion.decided(tiny.spec({"execution": "auto"}))) == [{"CPU": 1.0}]
    resources.check_fits([alone, gang], [4], [2])
    with pytest.raises(UserError, match=r"needs 3 worker\(s\) with a GPU .* room for 2") as error:
        resources.check_fits([gang], [4, 4], [1, 0])
    assert error.value.field == "execution.device"


def test_whatever_a_sweep_can_go_by_is_a_column_of_its_table():
    """Of its results: the driver and the scheduler look a metric up by this name."""
    assert set(get_args(Metric)) <= set(names(TRIAL_COLUMNS, "metric", "total"))


def test_another_method_in_a_grid_starts_from_its_own_defaults():
    """The base's settings of DevFT are none of FedIT's."""
    trials = expansion.trials_of(sweep_of(grid={"method.name": ["devft", "fedit"]}))
    assert [trial.spec.method.name for trial in trials] == ["devft", "fedit"]
    assert trials[0].spec.method.initial_capacity == 1  # type: ignore[union-attr]


def test_a_method_s_settings_can_be_swept_with_it():
    grid = {"method": [{"name": "devft", "initial_capacity": 2}, {"name": "fedprox", "mu": 0.5}]}
    trials = expansion.trials_of(sweep_of(grid=grid))
    assert [expansion.label(trial.overrides) for trial in trials] == [
        "method.name=devft, method.initial_capacity=2",
        "method.name=fedprox, method.mu=0.5",
    ]


def test_what_gives_the_same_results_is_one_trial():
    """Where a run's records are sent does not change what they are."""
    sweep = sweep_of(grid={"tracking.experiment": ["a", "b"], "seed": [0, 1]})
    assert [trial.overrides["seed"] for trial in expansion.trials_of(sweep)] == [0, 1]


def test_a_random_search_draws_the_same_at_every_launch():
    """Three draws, each repeated for two seeds; every value lies in its range."""
    space = {
        "local.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "method.initial_capacity": {"randint": [1, 2]},
        "fleet.dropout": {"uniform": [0.0, 0.5]},
        "rounds.close": {"choice": ["all"]},
    }
    sweep = sweep_of(search={"kind": "random", "num_trials": 3, "space": space}, seeds=[0, 1])
    trials = expansion.trials_of(sweep)
    assert len(trials) == 6
    assert [t.overrides for t in trials] == [t.overrides for t in expansion.trials_of(sweep)]
    for first, second in zip(trials[::2], trials[1::2], strict=True):
        assert {**first.overrides, "seed": 1} == second.overrides
    assert all(1e-4 <= t.overrides["local.learning_rate"] <= 1e-2 for t in trials)
    assert {t.overrides["method.initial_capacity"] for t in trials} <= {1, 2}
    assert len({t.overrides["fleet.dropout"] for t in trials}) == 3


def test_the_id_is_that_of_the_content():
    """A further launch finds its directory; another grid has another."""
    sweep = sweep_of(grid={"seed": [0, 1]})
    assert expansion.sweep_id(sweep) == expansion.sweep_id(sweep_of(grid={"seed": [0, 1]}, max_concurrent=1))
    assert expansion.sweep_id(sweep) != expansion.sweep_id(sweep_of(grid={"seed": [0, 2]}))
    assert expansion.sweep_id(sweep).startswith("growth-")


# -- Optuna ------------------------------------------------------------------------------------------------------------
SPACE = {"local.learning_rate": {"loguniform": [1e-4, 1e-1]}, "method.initial_capacity": {"choice": [1, 2]}}


def optuna_sweep(**fields: Any) -> SweepSpec:
    search = {"kind": "optuna", "num_trials": 30, "space": SPACE, **fields}
    return sweep_of(search=search, metric="eval_loss")


def loss(trial: expansion.Trial) -> float:
    """Least at a learning rate of 10^-2 and a capacity of 2."""
    distance = math.log10(trial.overrides.get("local.learning_rate", 1e-2)) + 2
    return distance**2 + (trial.overrides["method.initial_capacity"] == 1)


def search_through(search: OptunaSearch, trials: list[expansion.Trial], num_trials: int) -> list[expansion.Trial]:
    """Go on until there are so many trials."""
    while len(trials) < num_trials:
        known = {trial.spec.spec_hash for trial in trials}
        trial = search.propose(len(trials), known)
        assert trial is not None
        search.tell(trial, loss(trial))
        trials = [*trials, trial]
    return trials


def test_optuna_goes_by_results():
    """Its last ten proposals are better than its first ten, which know nothing."""
    trials = search_through(OptunaSearch(optuna_sweep()), [], 30)
    early, late = ([loss(trial) for trial in part] for part in (trials[:10], trials[20:]))
    assert sum(late) < 0.5 * sum(early)


def test_optuna_goes_on_where_it_stopped():
    """A new process that is told of the first twelve results proposes what the old one would have."""
    whole = search_through(OptunaSearch(optuna_sweep()), [], 16)
    search = OptunaSearch(optuna_sweep())
    for trial in whole[:12]:
        search.tell(trial, loss(trial))
    assert [t.overrides for t in search_through(search, whole[:12], 16)] == [t.overrides for t in whole]


def test_a_space_that_is_used_up_has_no_further_proposal():
    """Two choices are two trials."""
    sweep = optuna_sweep(space={"method.initial_capacity": {"choice": [1, 2]}})
    search = OptunaSearch(sweep)
    found = search_through(search, [], 2)
    assert {trial.overrides["method.initial_capacity"] for trial in found} == {1, 2}
    assert search.propose(2, {trial.spec.spec_hash for trial in found}) is None


def test_a_search_is_checked_at_its_ends():
    """An adaptive search's trials are not known beforehand, but the ends of their ranges are."""
    with pytest.raises(UserError, match=r"local\.learning_rate=-1"):
        probes(optuna_sweep(space={"local.learning_rate": {"uniform": [-1, 1]}}))


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"grid": {}}, "grid", "is empty"),
        ({"grid": {"seed": []}}, "grid.seed", "holds no values"),
        ({}, "JOB", "needs a grid, a search or seeds"),
        ({"grid": {"seed": [0]}, "search": {"num_trials": 1, "space": SPACE}}, "JOB", "not both"),
        ({"gird": {"seed": [0]}}, "gird", "did you mean 'grid'?"),
        ({"grid": {"method.growthrate": [2]}}, "method.growthrate", "did you mean 'growth_rate'?"),
        ({"grid": {"metod.growth_rate": [2]}}, "metod", "did you mean 'method'?"),
        ({"grid": {"method.name": ["devft", "devftt"]}}, "method.name", "did you mean 'devft'?"),
        ({"grid": {"seed": [0, -1]}}, "seed", "trial 1: seed=-1"),
        ({"grid": {"rounds.clients_per_round": [3, 9]}}, "rounds.clients_per_round", "rounds.clients_per_round=9]"),
        ({"seeds": [0], "grid": {"seed": [1]}}, "JOB", "seed is varied twice"),
        ({"search": {"num_trials": 0, "space": SPACE}}, "search.num_trials", "greater than or equal to 1"),
        ({"search": {"num_trials": 2, "space": {}}}, "search.space", "at least 1 item"),
        ({"search": {"num_trials": 2, "space": {"seed": {"randint": [3, 1]}}}}, "search.space.seed", "smaller"),
        ({"search": {"num_trials": 2, "space": {"seed": {}}}}, "search.space.seed", "exactly one of"),
        (
            {"search": {"num_trials": 2, "space": {"seed": {"uniform": [0, 1], "choice": [1]}}}},
            "search.space.seed",
            "one",
        ),
        ({"seeds": [0], "base": "nowhere.yaml"}, "JOB", "cannot be read"),
        ({"seeds": [0], "base": 3}, "base", "path of a job file"),
        ({"seeds": [0], "metric": "accuracy"}, "metric", "eval_accuracy"),
        (
            {"seeds": [0], "early_stopping": {"reduction_factor": 1}},
            "early_stopping.reduction_factor",
            "greater than 1",
        ),
        ({"grid": {"execution.kind": ["ray"], "execution.workers": [99]}}, "execution.workers", "needs 99 workers"),
        ({"grid": {"execution.threads": [999]}}, "execution.threads", "999 cores on one node"),
        ({"grid": {"method.initial_capacity": [1, 40]}}, "method.initial_capacity", "trial 1"),
        ({"search": {"num_trials": 2**40, "space": SPACE}}, "search.num_trials", "less than or equal to 100000"),
        ({"search": {"num_trials": 60_000, "space": SPACE}, "seeds": [0, 1]}, "search.num_trials", "times 2 seeds"),
        (
            {"search": {"num_trials": 2, "space": {"seed": {"randint": [0, 2**62]}}}},
            "search.space.seed.randint.1",
            "less than",
        ),
        (
            {"search": {"num_trials": 2, "space": {"seed": {"randint": [0, 2**70]}}}},
            "search.space.seed.randint",
            "too large",
        ),
        (
            {"search": {"num_trials": 2, "space": {"local.learning_rate": {"uniform": [-1e308, 1e308]}}}},
            "search.space.local.learning_rate.uniform.0",
            "greater than or equal to",
        ),
        (
            {"search": {"num_trials": 2, "space": {"local.learning_rate": {"uniform": [0, float("inf")]}}}},
            "search.space.local.learning_rate.uniform.1",
            "finite",
        ),
        ({"grid": {"name": [b"hi"]}}, "grid.name", "type bytes, which no field takes"),
        ({"grid": {"name": ["x" * 200_000]}}, "grid.name", "longer than 100000 characters"),
        ({"grid": {"seed": [2**70]}}, "grid.seed", "too large"),
        ({"seeds": [0], "max_concurrent": 2**40}, "max_concurrent", "less than or equal to"),
        ({"seeds": [0], "early_stopping": {"grace_rounds": 2**40}}, "early_stopping.grace_rounds", "less than"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    fields: dict[str, Any],
    field: str,
    told: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Status 2, the field and the way out; no directory is left behind, and Ray is not waited for."""
    monkeypatch.setattr("fleetune.engine.launch.cluster.Cluster._connect", lambda self: self._ready.set())
    path = file_of(tmp_path, **fields)
    out = fleetune(capfd, monkeypatch, "sweep", path, "-w", tmp_path / "ws", "--json")
    assert out.status == 2, out.stderr
    assert out.document["field"] == field
    assert told in out.stderr
    assert not (tmp_path / "ws").exists()


def test_a_key_that_stands_twice_in_a_sweep_file_is_refused(tmp_path: Path):
    """One of two lists of seeds would be lost."""
    path = tmp_path / "growth.yaml"
    path.write_text("base: {}\nseeds: [0]\nseeds: [1, 2]\n")
    with pytest.raises(UserError, match="'seeds' is given twice, in line 2 and in line 3"):
        config.load(path)


def test_set_gives_the_base_text_as_it_was_typed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As with ``run``: the comment sign is part of the template."""
    seen: list[SweepSpec] = []
    monkeypatch.setattr("fleetune.sweep.launch.run", lambda spec, **_: seen.append(spec) or stop())

    def stop() -> Any:
        raise UserError("seen")

    fleetune(capfd, monkeypatch, "sweep", file_of(tmp_path, seeds=[0]), "--set", "data.template=Ask {prompt} ### A")
    assert expansion.trials_of(seen[0])[0].spec.data.template == "Ask {prompt} ### A"


def test_set_changes_the_base(tmp_path: Path):
    """And so makes another sweep."""
    path = file_of(tmp_path, seeds=[0])
    plain, changed = config.load(path), config.load(path, {"rounds.num_rounds": 9})
    assert expansion.trials_of(changed)[0].spec.rounds.num_rounds == 9
    assert expansion.sweep_id(plain) != expansion.sweep_id(changed)
    assert plain.name == "growth"


# -- an MLflow server that wants to know who we are ----------------------------------------------------------------------
class Guarded(http.server.BaseHTTPRequestHandler):
    """Lets nobody in."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


def test_a_server_that_wants_credentials_is_told_of_before_any_trial(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        path = file_of(tmp_path, seeds=[0, 1])
        sets = ["--set", "tracking.enabled=true", "--set", f"tracking.uri={uri}"]
        out = fleetune(capfd, monkeypatch, "sweep", path, "-w", tmp_path / "ws", "--json", *sets)
        server.shutdown()
    assert (out.status, out.document["field"]) == (2, "tracking.uri")
    assert not (tmp_path / "ws").exists()


def test_a_sweep_file_is_made_of_json(tmp_path: Path):
    """What is noted in sweep.yaml is a sweep file again, with the same id."""
    sweep = sweep_of(grid={"method.growth_rate": [2, 4]}, early_stopping={"grace_rounds": 2})
    again = SweepSpec.model_validate(json.loads(json.dumps(sweep.model_dump(mode="json", exclude_none=True))))
    assert expansion.sweep_id(again) == expansion.sweep_id(sweep)
    assert isinstance(expansion.trials_of(again)[0].spec, RunSpec)


def test_a_launch_says_first_what_it_will_cost(tmp_path: Path):
    """Four trials of 3 rounds. Once one of them is finished, at 2 s a round, the 9 rounds of the others take 18 s."""
    sweep = sweep_of(grid={"method.growth_rate": [2, 4]}, seeds=[0, 1])
    status = SweepStatus(sweep, num_trials=4)
    for trial in expansion.trials_of(sweep):
        status.entries[trial.number] = Entry(trial, RunDirectory(tmp_path / str(trial.number)))
    assert status.cost_line() == "4 trials; 4 to run: 12 rounds of 3 clients"
    first = status.entries[0]
    first.status, first.num_rounds, first.totals = "finished", 3, {"wall_seconds": 6.0}
    assert status.cost_line() == (
        "4 trials, 1 of them finished already; 3 to run: 9 rounds of 3 clients, about 18 s in one process, as long as those took"
    )
    for entry in status.entries.values():
        entry.status = "finished"
    assert status.cost_line() == "4 trials, 4 of them finished already: nothing is to be run"
