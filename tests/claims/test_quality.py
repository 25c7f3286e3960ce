"""What runs had spent when they came to a quality, and the quality that all who learn come to; numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fleetune.claims.quality import Ending, Quality, common_quality, learns, spendings, spent
from fleetune.claims.verdicts import Verdict, verdicts_of
from fleetune.records import RunDirectory, SweepDirectory
from support.synthetic_runs import make_spec, rounds_of
from support.synthetic_sweeps import make_study

METHODS = {"method.name": ["devft", "fedit"]}
DEVFT, FEDIT = {"method.name": "devft"}, {"method.name": "fedit"}
LOSSES = [1.0, 0.8, math.nan, 0.5]
ROUND_SECONDS, ROUND_BYTES = 10.0, 100


def run_with(
    workspace: Path, run_id: str, losses: Sequence[float], *, slower: float = 1.0, memory: int = 1000
) -> RunDirectory:
    """A run with these losses after its rounds, untrained 2.0. A round takes 10 s times ``slower``, and 100 bytes of uplink."""
    spec = make_spec(num_rounds=len(losses), num_clients=1)
    run = RunDirectory.create(workspace, run_id, spec, meta={"baseline": {"eval_loss": 2.0}})
    for number, ((row, clients), loss) in enumerate(zip(rounds_of(spec), losses, strict=True), start=1):
        row |= {"eval_loss": None if math.isnan(loss) else loss, "eval_accuracy": None}
        row |= {"sim_seconds": slower * ROUND_SECONDS * number, "uplink_bytes": ROUND_BYTES}
        run.append_round({**row, "peak_memory_bytes_max": memory * number}, clients)
    run.consolidate()
    return run


def test_costs_add_up_to_the_first_evaluation_that_comes_to_the_quality(tmp_path: Path):
    """0.8 is reached with the second round (20 s, 200 bytes), 0.6 with the fourth, as the third is not evaluated, 0.4 never; 2.0
    is the untrained model, which costs nothing.
    """
    rounds = spendings(run_with(tmp_path, "a", LOSSES))
    levels = [2.0, 1.5, 0.8, 0.6, 0.4]
    found = [spent(rounds, "sim_seconds", Quality("eval_loss", level)) for level in levels]
    assert found == pytest.approx([0.0, 10.0, 20.0, 40.0, math.nan], nan_ok=True)
    found = [spent(rounds, "uplink_bytes", Quality("eval_loss", level)) for level in levels]
    assert found == pytest.approx([0.0, 100.0, 200.0, 400.0, math.nan], nan_ok=True)


def test_an_accuracy_is_reached_from_below():
    rounds = pd.DataFrame({"eval_accuracy": [0.2, 0.4, 0.3], "energy_joules": [0.0, 5.0, 9.0]})
    found = [spent(rounds, "energy_joules", Quality("eval_accuracy", level)) for level in (0.2, 0.3, 0.5)]
    assert found == pytest.approx([0.0, 5.0, math.nan], nan_ok=True)


def ends(*finals: float, untrained: float = 0.5) -> list[Ending]:
    return [Ending(untrained, final) for final in finals]


def test_the_common_loss_is_the_worst_end_of_those_that_learn():
    """0.1341 of the second configuration, to 0.135. The third does not learn: -0.1 and +0.06 leave zero in the interval."""
    assert common_quality("eval_loss", [ends(0.12, 0.121), ends(0.13, 0.1341), ends(0.4, 0.56)]) == Quality(
        "eval_loss", 0.135
    )
    assert common_quality("eval_loss", [ends(0.4, 0.56)]) is None
    assert common_quality("eval_loss", []) is None
    assert common_quality("eval_loss", [ends(0.125)]) == Quality("eval_loss", 0.125)
    up = [ends(0.8126, 0.8129), ends(0.7, 0.7009)]
    assert common_quality("eval_accuracy", up) == Quality("eval_accuracy", 0.7)


def test_who_learns():
    """Better with the whole interval; a single seed just better; not known without the untrained model."""
    assert learns(ends(0.12, 0.121), -1)
    assert not learns(ends(0.12, 0.121), 1)
    assert not learns(ends(0.45, 0.52), -1)
    assert learns(ends(0.4), -1)
    assert not learns(ends(0.4, 0.3, untrained=math.nan), -1)


# -- in claims ---------------------------------------------------------------------------------------------------------
def study(workspace: Path, *claims: Mapping[str, Any], fedit: Sequence[float] = LOSSES) -> SweepDirectory:
    """devft has `LOSSES`; fedit's rounds take three times as long and twice the memory."""

    def result(trial: Mapping[str, Any]) -> Mapping[str, Any]:
        name, seed = trial["method.name"], trial["seed"]
        slower, memory, losses = (1.0, 1000, LOSSES) if name == "devft" else (3.0, 2000, fedit)
        run = run_with(workspace, f"{name}-{seed}", losses, slower=slower, memory=memory)
        final = {"eval_loss": losses[-1], "baseline_eval_loss": 2.0, "sim_seconds": 10 * slower * len(losses)}
        return {"run_dir": run.path, **final}

    return make_study(workspace, METHODS, claims, result)


def verdict_of(workspace: Path, claim: Mapping[str, Any], **fields: Any) -> Verdict:
    (found,) = verdicts_of(study(workspace, claim, **fields))
    return found


def ratio(metric: str, value: float) -> dict[str, Any]:
    return {"ratio": {"of": FEDIT, "to": DEVFT, "in": metric, "is": value, "within": 0.1}}


def test_a_ratio_of_costs_to_a_common_quality(tmp_path: Path):
    """Both come to their worst end, 0.5, with the fourth round: three times the virtual time, the same bytes."""
    time, bytes_ = verdicts_of(
        study(
            tmp_path,
            {**ratio("sim_seconds", 3), "until": {"eval/loss": "common"}},
            {**ratio("uplink_bytes", 2), "until": {"eval_loss": "common"}},
        )
    )
    assert (time.verdict, time.mean) == ("holds", pytest.approx(3))
    assert time.claim == "sim_seconds to the common eval_loss of fedit is 3 ± 0.1 times that of devft"
    assert time.remark == "the eval_loss is 0.5; only 3 seeds"
    assert (bytes_.verdict, bytes_.mean) == ("reversed", pytest.approx(1))


def test_the_common_loss_is_that_of_the_worse_method(tmp_path: Path):
    """fedit ends at 0.8, after four rounds; devft has that after two: 120 s and 20 s."""
    claim = {**ratio("sim_seconds", 6), "until": {"eval_loss": "common"}}
    found = verdict_of(tmp_path, claim, fedit=[1.5, 1.2, 1.0, 0.8])
    assert (found.verdict, found.mean) == ("holds", pytest.approx(6))


def test_trials_that_never_come_to_the_quality_are_left_out_and_counted(tmp_path: Path):
    claim = {"better": DEVFT, "than": FEDIT, "in": "sim/seconds", "until": {"eval_loss": 0.6}}
    found = verdict_of(tmp_path, claim, fedit=[1.5, 1.2, 1.0, 0.8])
    assert (found.verdict, found.mean, found.num_left_out) == ("not decided", None, 3)
    assert found.claim == "devft is better than fedit in sim/seconds to an eval_loss of 0.6"
    assert "which 3 of the sweep's 6 trials never reach" in (found.remark or "")


def test_a_quality_that_no_trial_comes_to_is_said_with_the_best_that_there_is(tmp_path: Path):
    claim = {"better": DEVFT, "than": FEDIT, "in": "uplink_bytes", "until": {"eval_loss": 0.1}}
    found = verdict_of(tmp_path, claim)
    assert (found.verdict, found.num_seeds) == ("not decided", 0)
    assert "no trial comes to an eval_loss of 0.1: the best is 0.5" in (found.remark or "")


def test_without_a_configuration_that_learns_nothing_is_common(tmp_path: Path):
    found = verdict_of(tmp_path, {**ratio("sim_seconds", 3), "until": {"eval_accuracy": "common"}})
    assert found.verdict == "not decided"
    assert "no configuration learns, so there is no common eval_accuracy" in (found.remark or "")


def test_peak_memory_is_the_largest_of_the_rounds(tmp_path: Path):
    """4 rounds: 4,000 bytes and 8,000."""
    found = verdict_of(tmp_path, {"better": DEVFT, "than": FEDIT, "in": "peak_memory_bytes_max"})
    assert (found.verdict, found.mean) == ("holds", -4000)
    assert found.mean_text() == "-4 kB"
