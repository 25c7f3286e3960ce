"""One optimizer step for a full stack of clients: a few operations over one buffer (K, P), each row by itself.

Shape legend: K clients, P trained parameters of each, n clients that still train: the first n rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fleetune.scopes import OPTIMIZER, part
from fleetune.tensors import Stack, Tensors
from fleetune.training.config import LocalConfig


def clip_rows(grads: Tensor, max_norm: float) -> None:
    """Scale every client's gradient, a row of ``grads (n, P)``, down to norm ``max_norm`` if it is longer; in place."""
    norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    grads.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))


class StackedSGD:
    """theta_k <- theta_k - lr_k g_k."""

    def __init__(self, params: Tensor, learning_rates: Tensor):
        """``params (K, P)`` are changed in place by every step; ``learning_rates (K, 1)``."""
        self.params, self.learning_rates = params, learning_rates

    def step(self, grads: Tensor) -> None:
        """Update the first n rows with ``grads (n, P)``; the other clients are done. ``grads`` is overwritten."""
        num_active = len(grads)
        self.params[:num_active].sub_(grads.mul_(self.learning_rates[:num_active]))


class StackedAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with torch's defaults, row by row."""

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def __init__(self, params: Tensor, learning_rates: Tensor, weight_decay: float):
        """``params (K, P)`` are changed in place by every step; ``learning_rates (K, 1)``."""
        self.params, self.learning_rates, self.weight_decay = params, learning_rates, weight_decay
        with part(OPTIMIZER):
            self.mean = torch.zeros_like(params)  # (K, P) running mean of the gradients
            self.square = torch.zeros_like(params)  # (K, P) and of their squares
        self.num_steps = 0

    def step(self, grads: Tensor) -> None:
        """Update the first n rows with ``grads (n, P)``; the other clients are done. ``grads`` is overwritten.

        All rows have taken the same number of steps, as those that are done come last and never return: one count is enough.
        """
        n = len(grads)
        params, rates = self.params[:n], self.learning_rates[:n]
        mean, square = self.mean[:n], self.square[:n]
        self.num_steps += 1
        if self.weight_decay:
            params.mul_(1.0 - rates * self.weight_decay)
        mean.lerp_(grads, 1.0 - self.beta1)
        square.mul_(self.beta2).addcmul_(grads, grads, value=1.0 - self.beta2)
        correction = math.sqrt(1.0 - self.beta2**self.num_steps)
        # From here on the buffer of the gradients takes the results in between: no further (K, P) is allocated.
        denominator = torch.sqrt(square, out=grads).div_(correction).add_(self.eps)
        step_size = 1.0 / (1.0 - self.beta1**self.num_steps)
        params.sub_(torch.div(mean, denominator, out=denominator).mul_(rates * step_size))


Optimizer = StackedSGD | StackedAdamW
MakeOptimizer = Callable[[LocalConfig, Tensor, Tensor], Optimizer]
"""(local, params (K, P), learning rates (K, 1)) -> an optimizer over them, as `make_optimizer`."""


def make_optimizer(config: LocalConfig, params: Tensor, learning_rates: Tensor) -> Optimizer:
    """The optimizer that the job file names, over ``params (K, P)`` with ``learning_rates (K, 1)``."""
    if config.optimizer == "sgd":
        return StackedSGD(params, learning_rates)
    return StackedAdamW(params, learning_rates, config.weight_decay)


def moments(optimizer: Optimizer, form: Stack) -> Tensors:
    """The moments and step count of the first client, as tensors for the server's state; ``form`` has the parameters' names and
    shapes. SGD has none."""
    if isinstance(optimizer, StackedSGD):
        return {}
    out = {f"adam.mean.{n}": t[0] for n, t in form.views(optimizer.mean.cpu()).items()}
    out.update({f"adam.square.{n}": t[0] for n, t in form.views(optimizer.square.cpu()).items()})
    out["server.num_steps"] = torch.tensor(optimizer.num_steps)
    return out


def restore_moments(optimizer: Optimizer, stored: Tensors, num_steps: int, form: Stack) -> None:
    """Give a new optimizer the moments that `moments` returned. In the first round there are none, and it starts at zero."""
    if isinstance(optimizer, StackedSGD):
        return
    optimizer.num_steps = num_steps
    for kind, buffer in (("mean", optimizer.mean), ("square", optimizer.square)):
        for name, view in form.views(buffer).items():
            if f"adam.{kind}.{name}" in stored:
                view.copy_(stored[f"adam.{kind}.{name}"][None])
