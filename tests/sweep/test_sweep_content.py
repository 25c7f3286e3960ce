"""A trial counts as finished only while what it read is still the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from support import tiny
from support.changed_files import other_answers


def test_a_trial_whose_data_changed_is_not_finished(tmp_path: Path):
    """It runs again beside the former run, which stays; one whose data are as they were is taken as it is."""
    from fleetune.sweep.config import SweepSpec
    from fleetune.sweep.existing_runs import add_trials
    from fleetune.sweep.expansion import sweep_id, trials_of
    from fleetune.sweep.status import SweepStatus
    from fleetune.sweep.trial_runner import TrialOrder, TrialRunner

    data = tmp_path / "train.jsonl"
    shutil.copy(tiny.data_file(), data)
    base = tiny.spec({"data.dataset": str(data), "rounds.num_rounds": 1, "evaluation.generate": False}).to_dict()
    sweep = SweepSpec.model_validate({"name": "s", "base": base, "seeds": [0]})
    trials, place = trials_of(sweep), tmp_path / "sweeps" / sweep_id(sweep)

    def stock() -> tuple[Any, Any]:
        board = SweepStatus(sweep, num_trials=1)
        return board, add_trials(board, trials, place)

    def work(board: Any) -> dict[str, Any]:
        entry = board.entries[0]
        order = TrialOrder(0, entry.trial.spec.to_dict(), str(tmp_path), entry.run.path.name, {})
        return list(TrialRunner().run(order))[-1]

    first, _ = stock()
    assert first.entries[0].status == "missing"
    assert work(first)["over"] == "finished"
    again, told = stock()
    assert (again.entries[0].status, told.num_outdated) == ("finished", 0)

    other_answers(data)
    changed, told = stock()
    assert (changed.entries[0].status, told.num_outdated) == ("missing", 1)
    assert changed.entries[0].run.path != first.entries[0].run.path
    failed = work(first)  # as if the file had changed between the launch and the trial's turn
    assert (failed["over"], "has changed since the run was started" in failed["error"]) == ("failed", True)
    assert first.entries[0].run.result()["status"] == "finished"  # type: ignore[index]
    assert work(changed)["over"] == "finished"
    losses = [b.entries[0].run.result()["metrics"]["eval_loss"] for b in (first, changed)]
    assert losses[0] != losses[1]
    assert stock()[0].entries[0].run.path == changed.entries[0].run.path
    shutil.copy(tiny.data_file(), data)
    assert stock()[0].entries[0].run.path == first.entries[0].run.path


def test_trials_over_other_traces_share_no_inputs(tmp_path: Path):
    """A process keeps what it has read for the next trial; intervals are part of that."""
    from fleetune.sweep.trial_runner import TrialRunner, inputs_key

    specs = []
    for name, clients in (("one", (0, 1, 2)), ("two", (3, 4, 5))):
        file = tmp_path / f"{name}.csv"
        file.write_text("\n".join(["client_id,start_seconds,end_seconds", *(f"{c},0,1e9" for c in clients)]))
        specs.append(tiny.spec({"fleet.availability": {"kind": "trace", "path": str(file)}}))
    assert len({inputs_key(spec) for spec in (*specs, tiny.spec(), tiny.spec({"fleet.dropout": 0.5}))}) == 3
    resident = TrialRunner()
    traces = [resident.inputs(spec).availability for spec in specs]
    assert [trace.client_ids.tolist() for trace in traces if trace is not None] == [[0, 1, 2], [3, 4, 5]]
