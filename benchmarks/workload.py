"""Random models and random tokens of a given size, and rounds of the real engine over them, timed one by one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fleetune.data.dataset import TokenizedDataset
from fleetune.engine.launch.backends import backend_for
from fleetune.models.base import BaseModel
from fleetune.models.folder import ASSETS
from fleetune.models.network import linear_sites
from fleetune.problem import EvalSet, Inputs, build_problem
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec, from_dict


@dataclass(frozen=True)
class Llama:
    """Size of a random Llama."""

    num_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 344
    num_heads: int = 4
    vocab_size: int = 512

    def build(self, seed: int = 0) -> BaseModel:
        """Random weights, drawn from ``seed``; the tokenizer is micro-llama's and is not used."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=256,
        )
        torch.manual_seed(seed)
        weights = {name: w.detach().clone() for name, w in LlamaForCausalLM(config).state_dict().items()}
        name = f"random-{self.num_layers}x{self.hidden_size}"
        return BaseModel(name, config.to_dict(), weights, "none", str(ASSETS / "micro-llama"))


def random_tokens(num_examples: int, num_tokens: int, vocab_size: int, *, seed: int = 0) -> TokenizedDataset:
    """Examples of equal length, all of whose tokens are learnt."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, num_examples * num_tokens, dtype=np.int32)
    return TokenizedDataset(
        tokens=tokens,
        offsets=np.arange(num_examples + 1, dtype=np.int64) * num_tokens,
        prompt_lengths=np.ones(num_examples, np.int32),
        rows=np.arange(num_examples),
        overlaps=np.zeros(num_examples, np.int32),
        loss_on="all",
        pad_token_id=0,
        num_truncated=0,
    )


SPEC: dict[str, Any] = {
    "name": "benchmark",
    "model": {"lora": {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]}},
    "data": {"loss_on": "all"},
    "fleet": {"num_clients": 100},
    "rounds": {"num_rounds": 4, "clients_per_round": 100},
    "local": {"steps": 4, "batch_size": 4, "learning_rate": 0.05, "optimizer": "sgd", "max_grad_norm": None},
    "method": {"name": "fedavg"},
    "evaluation": {"every": 1_000_000, "generate": False},
    "execution": {"kind": "ray", "workers": 2},
    "tracking": {"enabled": False},
}
"""The LoRA workload: 100 clients a round, 4 SGD steps of batch 4 on q and v with r = 8."""


def spec(overrides: Mapping[str, Any]) -> RunSpec:
    """The LoRA workload with dotted overrides."""
    return from_dict(SPEC, overrides)


def inputs(of: RunSpec, base: BaseModel, *, examples_per_client: int = 16, num_tokens: int = 64) -> Inputs:
    """Random data for every client of a spec."""
    num_examples, vocabulary = of.fleet.num_clients * examples_per_client, int(base.config["vocab_size"])
    held_out = random_tokens(8, num_tokens, vocabulary, seed=1)
    return Inputs(
        base=base,
        sites=linear_sites(base, of.model.lora),
        train=random_tokens(num_examples, num_tokens, vocabulary),
        keys=np.zeros(num_examples, np.int64),
        evaluation=EvalSet(held_out, [""] * len(held_out)),
        dataset_name="random tokens",
    )


@dataclass(frozen=True)
class Timed:
    """Seconds from one finished round to the next, records and checkpoint included, and the seconds before the first."""

    start_seconds: float
    first_round_seconds: float
    round_seconds: list[float]
    """Without the first round, and without the last, which is evaluated."""
    train_loss: float


def timed_rounds(of: RunSpec, data: Inputs, *, after: Callable[[int], None] | None = None) -> Timed:
    """Run the spec (three rounds or more) on the engine that it asks for. ``after(round_idx)`` is called after each round;
    what it does goes on beside the next round, so a run that is looked into is not one to take times from.
    """
    model = of.model.model_copy(update={"base": data.base.name})  # by its name an engine knows what it holds already
    of = of.model_copy(update={"model": model})
    started = time.perf_counter()
    marks: list[float] = []
    loss = float("nan")
    with (
        tempfile.TemporaryDirectory(prefix="fleetune-bench-") as folder,
        backend_for(of, address=None, debug=False) as backend,
    ):
        of = backend.resolve(of)
        problem = build_problem(of, data)
        run_dir = RunDirectory.create(folder, "run", of.model_dump(mode="json", warnings=False))
        for event in backend.events(problem, run_dir):
            marks.append(time.perf_counter())
            if event["kind"] == "round":
                loss = float(event["row"]["train_loss"])
                if after is not None:
                    after(event["round"] - 1)
    seconds = np.diff(marks[:-1]).tolist()  # marks: start, each round, end
    return Timed(marks[0] - started, seconds[0], seconds[1:-1], loss)
