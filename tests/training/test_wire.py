"""What arrives of a tensor that crosses the cut, and what it weighs."""

from __future__ import annotations

import math

import torch

from fleetune.training.wire import GRADIENT_SCALE, received, wire_bytes


def test_the_computations_own_form_is_the_tensor_itself():
    x = torch.randn(2, 3, 4)
    assert received(x, "same") is x
    assert wire_bytes(x, "same") == 2 * 3 * 4 * 4
    assert wire_bytes(x.bfloat16(), "same") == 2 * 3 * 4 * 2


def test_half_precision_keeps_eleven_bits():
    """1 + 2^-11 lies between 1 and fp16's next number 1 + 2^-10 and goes to the even one, 1; 1e6 to the largest, 65504."""
    x = torch.tensor([[1 + 2**-11, -3.0, 1e6, math.nan]])
    out = received(x, "fp16")
    assert out[0, :3].tolist() == [1.0, -3.0, 65504.0]
    assert out[0, 3].isnan()
    assert wire_bytes(x, "fp16") == 8


def test_small_gradients_survive_half_precision():
    """2^-25 is below half of fp16's smallest number 2^-24 and would be 0; times 1024 it is 2^-15, which is one."""
    x = torch.tensor([2.0**-25])
    assert received(x, "fp16").item() == 0
    assert received(x, "fp16", scale=GRADIENT_SCALE).item() == 2.0**-25


def test_integers_go_with_a_scale_of_their_token():
    """Token (127, 63.4, -1.6) has the scale 1: (127, 63, -2). Token (0.254, 0.0009, 0) has 0.002, and 0.0009 rounds to 0."""
    x = torch.tensor([[127.0, 63.4, -1.6], [0.254, 0.0009, 0.0], [0.0, 0.0, 0.0]])
    want = torch.tensor([[127.0, 63.0, -2.0], [0.254, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(received(x, "int8"), want)
    assert wire_bytes(x, "int8") == 3 * (3 + 4)
    assert received(torch.tensor([[math.nan, 1.0]]), "int8").isnan().all()
