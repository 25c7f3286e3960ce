"""Clients of unequal rank: which part of the weight trained each row, and the average that comes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fleetune.engine.round.ranks import filled, trained_rows
from fleetune.engine.round.work import Work
from fleetune.engine.round.workload import Workload
from fleetune.methods.base import Payload

WEIGHTS = np.array([0.1, 0.2, 0.3, 0.2, 0.2])


def work(*, cut_b: bool = False) -> Work:
    """Clients 0, 1, 2 of group a, rank 2, of whom client 2 is cut to rank 1; clients 3 and 4 of group b, rank 4, of whom client 4
    may be cut to rank 2."""
    ranks, groups, source = [2, 4, 1], ["a", "b", "a"], [0, 1, 0]
    payload_of = [0, 0, 2, 1, 1]
    if cut_b:
        ranks, groups, source, payload_of = [*ranks, 2], [*groups, "b"], [*source, 1], [0, 0, 2, 1, 3]
    return Work(
        0,
        groups=list(groups),
        payloads=[Payload({}) for _ in ranks],
        workloads=[Workload(batch_size=1, rank=rank, depth=1, checkpointing=False) for rank in ranks],
        source=source,
        payload_of=np.array(payload_of),
        rows=[],
        checkpointing=np.zeros(5, bool),
    )


def test_rows_are_held_against_the_weight_of_their_own_group():
    """Of group a's 0.6 all trained row 0, and 0.1 + 0.2 trained row 1: 1 and 1/2. Nobody of group b is cut, so it is left out."""
    found = trained_rows(work(), WEIGHTS)
    assert {source: rows.tolist() for source, rows in found.items()} == {0: pytest.approx([1.0, 0.5])}


def test_two_groups_that_are_cut():
    """Of group b's 0.4 half is cut to the first two of four rows."""
    found = trained_rows(work(cut_b=True), WEIGHTS)
    assert {source: rows.tolist() for source, rows in found.items()} == {
        0: pytest.approx([1.0, 0.5]),
        1: pytest.approx([1.0, 1.0, 0.5, 0.5]),
    }


def test_clients_that_do_not_count_have_trained_nothing():
    """Client 1's update is late: 0.1 of group a's 0.4 trained row 1. If the client that is cut is late, no row lacks anybody."""
    late = np.where(np.arange(5) == 1, 0.0, WEIGHTS)
    assert trained_rows(work(), late)[0].tolist() == pytest.approx([1.0, 0.25])
    assert trained_rows(work(), np.where(np.arange(5) == 2, 0.0, WEIGHTS)) == {}


def test_a_groups_sums_come_out_as_its_weight_times_the_average_by_rows():
    """Group a sends A = (1, 1), (2, 2) and, cut, (4). Row 0: (0.1 + 0.4 + 1.2) / 0.6 = 17/6. Row 1: (0.1 + 0.4) / 0.3 = 5/3."""
    sent = {"x.lora_A": torch.full((2, 1), 9.0)}
    rows = trained_rows(work(), WEIGHTS)[0]
    full = {"x.lora_A": torch.tensor([[0.1 * 1 + 0.2 * 2], [0.1 * 1 + 0.2 * 2]])}
    cut = {"x.lora_A": torch.tensor([[0.3 * 4]])}
    total = (
        filled(full, sent, total_weight=0.3, trained=rows)["x.lora_A"]
        + filled(cut, sent, total_weight=0.3, trained=rows)["x.lora_A"]
    )
    assert (total / 0.6).flatten().tolist() == pytest.approx([17 / 6, 5 / 3])


def test_a_row_that_nobody_trained_stays_what_was_sent():
    """Both clients of a group are cut to rank 1 of 2: row 1 is the payload's."""
    sent = {"x.lora_B": torch.tensor([[5.0, 7.0]])}
    both = filled({"x.lora_B": torch.tensor([[2.0]])}, sent, total_weight=1.0, trained=np.array([1.0, 0.0]))
    assert both["x.lora_B"].tolist() == [[2.0, 7.0]]
