"""Each client's own model on the examples that it holds out: which model, which examples, and what is left behind."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from fleetune.engine.execution.worker_process import WorkerProcess
from fleetune.errors import UserError
from fleetune.methods.base import GlobalModel, Method, PrivateStates, State, is_lora_a
from fleetune.methods.fedavg import FedIT
from fleetune.records.personal_summary import summary
from fleetune.tensors import Tensors
from fleetune.training.evaluate import evaluate_rows, totals
from support import runs, tiny

LAST = {"evaluation.generate": False, "data.held_out": 0.25, "evaluation.personal": "last"}
EVERY = {**LAST, "evaluation.personal": "every", "evaluation.every": 1}


def quality(
    done: runs.Finished, model: GlobalModel, client: int, max_new_tokens: int | None = None
) -> dict[str, float]:
    """Loss and accuracy of a model on a client's held-out part, all in one batch."""
    assert done.problem.held_out is not None
    process, inputs = WorkerProcess(done.problem.spec, done.problem.inputs, done.problem.method), done.problem.inputs
    sums = evaluate_rows(
        process.worker.network(model.model),
        model.adapter,
        data=inputs.train,
        responses=inputs.responses,
        rows=done.problem.held_out.shard(client),
        reader=inputs.reader,
        max_new_tokens=max_new_tokens,
        answer_pattern=done.problem.spec.data.answer_pattern,
    )
    return totals([sums])


def last_round(done: runs.Finished) -> pd.DataFrame:
    """Rows of the last round's evaluation, by client."""
    table = done.personal
    return table[table["round"] == table["round"].max()].set_index("client_id")


def test_mean_spread_and_the_worst_tenth():
    """Losses 1 to 11 in any order: mean 6, deviation sqrt(10), and of 11 the worst two, 10 and 11. Of accuracies the lowest."""
    values = np.arange(11.0)[::-1] + 1
    found = summary("x", values, high_is_bad=True)
    assert found == {"x": 6.0, "x_std": math.sqrt(10.0), "x_worst": 10.5}
    assert summary("x", values, high_is_bad=False)["x_worst"] == 1.5
    assert summary("x", np.array([3.0]), high_is_bad=True) == {"x": 3.0, "x_std": 0.0, "x_worst": 3.0}


@pytest.mark.parametrize("size", [64, 8, 3, 1])
def test_a_client_of_fedsa_lora_has_the_shared_a_and_its_own_b(size: int):
    """As each client evaluated by itself, whether clients are stacked or their examples cut into pieces."""
    done = runs.run(tiny.spec({**LAST, "evaluation.batch_size": size}, method="fedsa-lora"))
    found = last_round(done)
    assert set(found.index) == set(done.private) == set(done.clients["client_id"])
    whole = done.problem.method.context.whole_model
    for client, own in done.private.items():
        expected = quality(done, GlobalModel(whole, {**done.state.tensors, **own}), client)
        assert found.loc[client, "eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found["eval_loss"].nunique() == len(found)
    row = done.rounds.iloc[-1]
    assert row["num_personal"] == len(found)
    assert row["eval_personal_loss"] == pytest.approx(found["eval_loss"].mean(), rel=1e-12)
    assert row["eval_personal_loss_worst"] == found["eval_loss"].max()
    assert done.rounds["eval_personal_loss"].isna().tolist() == [True, True, False]
    assert found["eval_accuracy"].isna().all()


def test_a_client_of_fedit_has_the_global_model():
    done = runs.run(tiny.spec(EVERY))
    for client, row in last_round(done).iterrows():
        expected = quality(done, done.deployed, int(client))
        assert row["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert done.rounds["num_personal"].tolist() == done.personal.groupby("round").size().tolist()


def test_who_has_taken_part_so_far_is_evaluated():
    """And nobody else: who was never sampled was sent no model."""
    done = runs.run(tiny.spec(EVERY, method="fedsa-lora"))
    so_far: set[int] = set()
    for round_number in (1, 2, 3):
        so_far |= set(done.clients["client_id"][done.clients["round"] == round_number])
        assert set(done.personal["client_id"][done.personal["round"] == round_number]) == so_far


def test_a_client_of_dofit_has_its_domains_model():
    done = runs.run(tiny.spec(LAST, method="dofit"))
    method = done.problem.method
    models = method.evaluated(done.state, lambda: iter(()))
    assert isinstance(models, Mapping)
    losses = {
        n: {c: quality(done, model, c)["eval_loss"] for c in last_round(done).index} for n, model in models.items()
    }
    for client, row in last_round(done).iterrows():
        assert min(abs(row["eval_loss"] - of[client]) for of in losses.values()) < 1e-5


def test_devft_evaluates_the_inner_methods_clients_on_its_stage():
    """In the last stage, of all blocks, A is the state's and B the client's own."""
    spec = tiny.spec({**LAST, "method.aggregation": "fedsa-lora"}, method="devft")
    done = runs.run(spec)
    whole = done.problem.method.context.whole_model
    shared = {n.removeprefix("stage."): t for n, t in done.state.tensors.items() if n.startswith("stage.")}
    assert all(is_lora_a(name) for name in shared)
    for client, own in done.private.items():
        expected = quality(done, GlobalModel(whole, {**shared, **own}), client)
        assert last_round(done).loc[client, "eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_answers_are_generated_for_each_client_with_its_own_model():
    spec = tiny.spec({**LAST, "evaluation.generate": True, "evaluation.max_new_tokens": 4}, method="fedsa-lora")
    done = runs.run(spec)
    whole = done.problem.method.context.whole_model
    for client, own in done.private.items():
        expected = quality(done, GlobalModel(whole, {**done.state.tensors, **own}), client, max_new_tokens=4)
        assert last_round(done).loc[client, "eval_accuracy"] == expected["eval_accuracy"]
    assert done.rounds["eval_personal_accuracy"].notna().tolist() == [False, False, True]


def test_a_run_that_is_stopped_goes_on_bit_for_bit():
    spec, folder = tiny.spec(EVERY, method="fedsa-lora"), Path(tempfile.mkdtemp(prefix="tiny-run-"))
    stopped = runs.run(spec, folder=folder, stop_after=1)
    assert stopped.personal["round"].unique().tolist() == [1]
    resumed = runs.run(spec, folder=folder)
    assert len(resumed.personal)
    runs.same_runs(resumed, runs.run(spec))


def test_a_run_that_goes_back_drops_the_rows_of_later_rounds():
    done = runs.run(tiny.spec(EVERY))
    before = done.personal
    done.run_dir.truncate(2)
    pd.testing.assert_frame_equal(done.personal, before[before["round"] <= 2], check_exact=True)


def test_without_it_nothing_is_held_out_or_written():
    done = runs.run(tiny.spec({"evaluation.generate": False}))
    assert done.problem.held_out is None
    assert done.problem.inputs.responses == []
    assert done.personal.empty
    assert done.rounds["num_personal"].isna().all()
    assert not (done.run_dir.path / "personal.parquet").exists()


def test_training_does_not_see_what_is_held_out():
    problem = runs.problem(tiny.spec(LAST))
    plain = runs.problem(tiny.spec({"evaluation.generate": False}))
    assert problem.held_out is not None
    for client in range(problem.fleet.num_clients):
        parts = [problem.partition.shard(client), problem.held_out.shard(client)]
        assert sorted(np.concatenate(parts).tolist()) == plain.partition.shard(client).tolist()


class Several(FedIT):
    """Evaluates two models and calls neither of them the main one."""

    source: ClassVar[str] = "for this test"

    def evaluated(self, state: State, private: PrivateStates) -> Mapping[str, GlobalModel]:
        one = super().evaluated(state, private)
        assert isinstance(one, GlobalModel)
        return {"a": one, "b": one}


def test_a_method_of_several_models_must_say_which_is_a_clients_own(monkeypatch: pytest.MonkeyPatch):
    from fleetune.methods import METHODS

    monkeypatch.setitem(METHODS, "fedit", Several)
    with pytest.raises(UserError, match="which of them is a client's own") as caught:
        runs.run(tiny.spec(LAST))
    assert caught.value.field == "evaluation.personal"


def test_a_method_may_give_every_client_a_model_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """A base of nothing but zeros in B leaves the untrained model: every client has the base's loss."""

    class Untrained(FedIT):
        source: ClassVar[str] = "for this test"

        def personal(
            self, state: State, client: Any, private: Tensors, models: Mapping[str, GlobalModel]
        ) -> GlobalModel:
            zero = {n: t if is_lora_a(n) else torch.zeros_like(t) for n, t in state.tensors.items()}
            return GlobalModel(self.context.whole_model, zero)

    from fleetune.methods import METHODS

    monkeypatch.setitem(METHODS, "fedit", Untrained)
    done = runs.run(tiny.spec(LAST))
    assert isinstance(done.problem.method, Method)
    base = GlobalModel(done.problem.method.context.whole_model, done.problem.method.start().tensors)
    for client, row in last_round(done).iterrows():
        assert row["eval_loss"] == pytest.approx(quality(done, base, int(client))["eval_loss"], rel=1e-5)
