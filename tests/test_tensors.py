"""Named tensors: sums in order, stacks, one buffer on the wire, files that are whole."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetune import tensors
from fleetune.tensors import Stack, add_weighted, num_bytes, pack, select, weighted_sum
from support import runs


def some(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator),
        "c": torch.randn((), generator=generator),
    }


def test_bytes_are_elements_times_their_size():
    assert num_bytes({"a": torch.zeros(3, 5), "b": torch.zeros(4, dtype=torch.bfloat16)}) == 15 * 4 + 4 * 2


def test_a_weighted_sum_in_numbers():
    """0.25 * 4 + 0.75 * 8 = 7; names that only one has are taken with its weight."""
    total = weighted_sum([(0.25, {"x": torch.tensor([4.0])}), (0.75, {"x": torch.tensor([8.0]), "y": torch.ones(1)})])
    assert {name: t.tolist() for name, t in total.items()} == {"x": [7.0], "y": [0.75]}


def test_a_sum_of_one_is_the_same_bits_and_another_tensor():
    one = some()
    total = weighted_sum([(1.0, one)])
    runs.same_tensors(total, one)
    add_weighted(total, one, 1.0)
    runs.same_tensors(one, some())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64])
def test_packing_keeps_every_bit(dtype: torch.dtype):
    """Odd sizes, a scalar, an empty tensor; through pickle, as between processes."""
    given = {name: (100 * t).to(dtype) for name, t in some().items()} | {"empty": torch.zeros(0, 4, dtype=dtype)}
    packed = pack(given)
    assert packed.data.dtype == np.uint8
    for back in (packed.unpack(), pickle.loads(pickle.dumps(packed, protocol=5)).unpack()):
        runs.same_tensors(back, given)
        assert all(back[name].dtype == dtype for name in given)


def test_packing_copies():
    given = some()
    packed = pack(given)
    given["a"].zero_()
    runs.same_tensors(packed.unpack(), some())


def test_packing_mixed_types_and_views():
    given = {"flag": torch.tensor([True, False, True]), "turned": some()["a"].T, "half": torch.ones(3).half()}
    runs.same_tensors(pack(given).unpack(), given)


def test_a_stack_gives_each_client_its_own():
    clients = [some(k) for k in range(3)]
    stack = Stack.of(clients)
    assert len(stack) == 3
    assert stack.data.shape == (3, 3 * 5 + 7 + 1)
    for k in range(3):
        runs.same_tensors(stack.client(k), clients[k])
        assert stack.views()["a"][k].data_ptr() == stack.client(k)["a"].data_ptr()
    runs.same_tensors(stack.rows([2, 0]).client(0), clients[2])
    part = stack.columns(lambda name: name in "bc")
    assert list(part.shapes) == ["b", "c"]
    runs.same_tensors(part.client(1), select(clients[1], lambda name: name in "bc"))
    assert stack.columns(lambda name: False).shapes == {}


def test_a_stacks_sum_is_the_sum_of_its_clients():
    """Bit for bit what summing the clients' tensors one after the other gives."""
    clients, weights = [some(k) for k in range(3)], [0.2, 0.5, 0.3]
    expected = weighted_sum(zip(weights, clients, strict=True))
    runs.same_tensors(Stack.of(clients).weighted_sum(weights), expected)
    runs.same_tensors(Stack.of(clients[:1]).weighted_sum([1.0]), clients[0])


def test_a_file_gives_back_tensors_and_metadata(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    given = {**some(), "n": torch.tensor([2**40]), "turned": some()["a"].T}
    tensors.save(path, given, {"round": 3, "values": {"groups": [[0, 1], [2]]}})
    back, meta = tensors.load(path)
    runs.same_tensors(back, given)
    assert meta == {"round": 3, "values": {"groups": [[0, 1], [2]]}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    tensors.save(path, some(), {"round": 1})
    with pytest.raises(TypeError):
        tensors.save(path, some(1), {"round": object()})
    back, meta = tensors.load(path)
    runs.same_tensors(back, some())
    assert meta == {"round": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_equality_is_of_names_and_bits():
    assert tensors.equal(some(), some())
    assert not tensors.equal(some(), some(1))
    assert not tensors.equal(some(), select(some(), lambda name: name != "c"))
