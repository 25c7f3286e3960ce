"""Claims as a sweep file holds them: which cells they compare, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fleetune.claims.config import METRICS, read
from fleetune.claims.pairs import cells_of, compared, key_of
from fleetune.columns import TRIAL_COLUMNS, names
from fleetune.errors import UserError
from fleetune.spec import as_user_error
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.expansion import sweep_id, trials_of
from support import tiny

GRID = {"method.growth_rate": [2, 4, 8], "method.grouping": ["dglg", "even"]}
DGLG, EVEN = {"method.grouping": "dglg"}, {"method.grouping": "even"}
BETTER = {"better": DGLG, "than": EVEN, "in": "eval/accuracy", "source": "table 3"}
FALLS = {"falls": "eval_accuracy", "over": "method.growth_rate"}
COST = {**BETTER, "in": "sim_seconds"}
RATIO = {"of": DGLG, "to": EVEN, "in": "uplink_bytes", "is": 1.0, "within": 0.1}


def sweep_of(*claims: Any, grid: Any = GRID, seeds: Any = (0, 1), **fields: Any) -> SweepSpec:
    """A sweep of the tiny DevFT with these claims."""
    base = tiny.spec({"execution": "auto"}, method="devft").to_dict()
    values = {
        "name": "study",
        "base": base,
        "grid": grid,
        "seeds": seeds and list(seeds),
        "claims": list(claims),
        **fields,
    }
    return SweepSpec.model_validate({name: value for name, value in values.items() if value is not None})


def complaint(*claims: Any, **fields: Any) -> UserError:
    """The error of a sweep whose claims are wrong."""
    with pytest.raises(ValidationError) as caught:
        sweep_of(*claims, **fields)
    return as_user_error(caught.value, SweepSpec)


def groups(claim: Any, grid: Any) -> list[list[dict[str, Any]]]:
    """The cells that a claim compares, one list for each combination of all else."""
    cells = cells_of(grid)
    (read_claim,) = read([claim])
    return [[cells[place] for place in group] for group in compared(read_claim, cells, field="claims.0").groups]


# -- what is compared --------------------------------------------------------------------------------------------------
def test_cells_of_a_pair_agree_in_every_other_field():
    """Three growth rates, for each of them dglg beside even."""
    found = groups(BETTER, GRID)
    assert found == [[{"method.growth_rate": rate, **DGLG}, {"method.growth_rate": rate, **EVEN}] for rate in (2, 4, 8)]


def test_a_trend_goes_through_the_values_in_ascending_order():
    grid = {**GRID, "method.growth_rate": [8, 2, 4]}
    found = groups({**FALLS, "for": DGLG}, grid)
    assert [[cell["method.growth_rate"] for cell in group] for group in found] == [[2, 4, 8]]


def test_a_field_that_comes_with_one_side_alone_does_not_part_the_pair():
    """FedIT has no capacity, so devft with capacity 2 is compared with fedit at each learning rate."""
    grid = {
        "method": [{"name": "fedit"}, {"name": "devft", "initial_capacity": 2}],
        "local.learning_rate": [1e-3, 1e-2],
    }
    found = groups({"better": {"method.name": "devft"}, "than": {"method": {"name": "fedit"}}, "in": "eval_loss"}, grid)
    assert [[cell["local.learning_rate"] for cell in group] for group in found] == [[1e-3, 1e-3], [1e-2, 1e-2]]
    assert found[0][0] == {"method.name": "devft", "method.initial_capacity": 2, "local.learning_rate": 1e-3}


def test_a_cell_is_found_again_in_the_table():
    """Which holds 2 as 2.0, mixtures and lists as text, and null not at all; the seed does not count."""
    cell = {"a": 2, "b": "auto", "c": ["q", "v"], "d": None, "e": True}
    row = {"a": 2.0, "b": "auto", "c": '["q", "v"]', "e": True, "seed": 3}
    assert key_of(cell) == key_of(row)
    assert key_of({"a": "4"}) == key_of({"a": 4})
    assert key_of({"a": True}) != key_of({"a": 1})


def test_metrics_have_the_names_of_the_table_and_of_mlflow():
    """MLflow's value of one round is no trial's total, so that name is none of a claim's metrics."""
    assert set(names(TRIAL_COLUMNS, "metric", "total")) <= set(METRICS)
    assert METRICS["eval/accuracy"] == "eval_accuracy"
    assert METRICS["sim/seconds"] == "sim_seconds"
    assert METRICS["total/uplink_bytes"] == "uplink_bytes"
    assert "cost/uplink_bytes" not in METRICS


# -- claims and the sweep ----------------------------------------------------------------------------------------------
def test_claims_change_neither_the_sweep_s_directory_nor_its_trials():
    grid = {"method.grouping": ["dglg", "even"]}
    plain, claiming = sweep_of(grid=grid), sweep_of(BETTER, {"ratio": RATIO}, grid=grid)
    assert sweep_id(plain) == sweep_id(claiming)
    assert [t.spec.spec_hash for t in trials_of(plain)] == [t.spec.spec_hash for t in trials_of(claiming)]


def test_a_sweep_file_keeps_its_claims_as_they_were_written():
    """What is noted in sweep.yaml is a sweep file again."""
    claims = [
        BETTER,
        {**FALLS, "for": EVEN},
        {"peaks_at": {"method.growth_rate": 4}, "in": "eval/loss"},
        {"ratio": RATIO, "until": {"eval/loss": "common"}},
        {**COST, "until": {"eval_accuracy": 0.4}},
    ]
    values = sweep_of(*claims).model_dump(mode="json", exclude_none=True)
    assert values["claims"] == claims
    assert SweepSpec.model_validate(values) == sweep_of(*claims)


def test_claims_in_words():
    claims = [
        BETTER,
        {**FALLS, "for": EVEN},
        {"peaks_at": {"method.growth_rate": 4}, "in": "eval/loss"},
        {"ratio": RATIO},
    ]
    assert [claim.sentence() for claim in read(claims)] == [
        "grouping dglg is better than grouping even in eval/accuracy",
        "eval_accuracy falls over growth_rate (for grouping even)",
        "eval/loss peaks at growth_rate 4",
        "uplink_bytes of grouping dglg is 1 ± 0.1 times that of grouping even",
    ]


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("claim", "field", "told"),
    [
        ("better", "claims.0", "is no claim"),
        ({}, "claims.0", "exactly one of better, falls, rises, peaks_at, ratio"),
        ({"beter": DGLG, "than": EVEN}, "claims.0", "did you mean 'better'?"),
        ({**BETTER, **FALLS}, "claims.0", "is of several kinds: better, falls"),
        ({"better": DGLG, "in": "eval_loss"}, "claims.0.than", "Field required"),
        ({**BETTER, "sorce": "x"}, "claims.0.sorce", "did you mean 'source'?"),
        ({"ratio": {**RATIO, "witin": 1}}, "claims.0.ratio.witin", "did you mean 'within'?"),
        ({"ratio": {**RATIO, "is": 0}}, "claims.0.ratio.is", "greater than 0"),
        ({"ratio": {**RATIO, "within": -1}}, "claims.0.ratio.within", "greater than or equal to 0"),
        ({**BETTER, "better": {}}, "claims.0.better", "at least 1 item"),
        ({**BETTER, "in": "accuracy"}, "claims.0.in", "did you mean 'eval_accuracy'?"),
        ({"falls": "cost/uplink_bytes", "over": "method.growth_rate"}, "claims.0.falls", "did you mean 'uplink_bytes'?"),
        ({"ratio": {**RATIO, "in": "bytes"}}, "claims.0.ratio.in", "no such metric"),
        ({**BETTER, "until": {"eval_loss": 0.2}}, "claims.0.until", "sim_seconds, uplink_bytes"),
        ({**BETTER, "in": "peak_memory_bytes_max", "until": {"eval_loss": 0.2}}, "claims.0.until", "costs that add up"),
        ({**COST, "until": {"train_loss": 0.2}}, "claims.0.until", "no such quality"),
        ({**COST, "until": {"eval_loss": 0}}, "claims.0.until", "must be common, or a level above 0"),
        ({**COST, "until": {"eval_accuracy": 60}}, "claims.0.until", "at most 1"),
        ({**COST, "until": {"eval_loss": "usual"}}, "claims.0.until", "must be common"),
        ({**COST, "until": {"eval_loss": 0.2, "eval_accuracy": 0.4}}, "claims.0.until", "at most 1 item"),
        ({**FALLS, "over": "method.growthrate"}, "claims.0.over", "did you mean 'method.growth_rate'?"),
        ({**FALLS, "over": "method.grouping"}, "claims.0.over", "compare two of them with `better`"),
        ({**FALLS, "over": "seed"}, "claims.0.over", "what pairs are made by"),
        ({**FALLS, "for": {"method.growth_rate": 2}}, "claims.0.over", "has a single value"),
        ({**FALLS, "for": {"method.fusion": "sum"}}, "claims.0.for.method.fusion", "no such field in the grid"),
        ({**FALLS, "for": {"method.grouping": "x"}}, "claims.0.for.method.grouping", "the grid has dglg, even"),
        ({**BETTER, "better": {"method.name": "devft"}}, "claims.0.better.method.name", "no such field in the grid"),
        ({**BETTER, "than": {"method.grouping": "odd"}}, "claims.0.than.method.grouping", "the grid has dglg, even"),
        ({**BETTER, "than": {"seed": 1}}, "claims.0.than.seed", "what pairs are made by"),
        ({**BETTER, "than": DGLG}, "claims.0.than", "the same setting as the other side"),
        ({"ratio": {**RATIO, "to": DGLG}}, "claims.0.ratio.to", "the same setting as the other side"),
        ({**BETTER, "better": {**DGLG, "method.growth_rate": 2}}, "claims.0.than", "differ in method.growth_rate"),
        ({**BETTER, "for": DGLG}, "claims.0.than", "look at what `for` leaves of the grid"),
        ({"peaks_at": {"method.growth_rate": 3}, "in": "eval_loss"}, "claims.0.peaks_at.method.growth_rate", "2, 4, 8"),
        ({"peaks_at": {**DGLG, "method.growth_rate": 2}, "in": "eval_loss"}, "claims.0.peaks_at", "at most 1 item"),
    ],
)  # fmt: skip
def test_a_claim_that_the_grid_cannot_decide_is_refused(claim: Any, field: str, told: str):
    """With its place in the file, the value, the rule and the way out."""
    error = complaint(claim)
    assert error.field == field
    assert told in str(error)
    assert error.hint


def test_a_single_seed_is_refused():
    """One run alone does not tell an effect from chance; seeds may stand in the grid."""
    for seeds in ([0], [3, 3]):
        error = complaint(BETTER, seeds=seeds)
        assert (error.field, error.hint) == ("claims", "seeds: [0, 1, 2, 3, 4]")
    assert "two seeds" in complaint(BETTER, seeds=None).rule
    assert len(sweep_of(BETTER, grid={**GRID, "seed": [0, 1]}, seeds=None).claims) == 1


def test_sides_whose_other_fields_never_agree_are_refused():
    """The two methods come with different capacities, which no pair could agree in."""
    grid = {"method": [{"name": "devft", "initial_capacity": 2}, {"name": "progfed", "initial_capacity": 4}]}
    claim = {"better": {"method.name": "devft"}, "than": {"method.name": "progfed"}, "in": "eval_loss"}
    error = complaint(claim, grid=grid)
    assert (error.field, error.hint) == ("claims.0", "name method.initial_capacity on both sides")


def test_a_search_has_no_claims():
    search = {"num_trials": 2, "space": {"local.learning_rate": {"choice": [1, 2]}}}
    error = complaint(BETTER, grid=None, search=search)
    assert (error.field, error.rule) == ("claims", "need a grid, whose cells they compare")


def test_claims_are_a_list_of_bounded_length():
    assert complaint(claims={"better": DGLG}).field == "claims"
    assert "more than 100" in complaint(*[BETTER] * 101).rule
