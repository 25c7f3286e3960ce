"""The client work as the peers do it: transformers' Llama with PEFT's LoRA, a plain PyTorch step. Runs in their environments,
so nothing of fleetune is imported here; sizes are those of ``benchmarks/workload.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
import torch

BATCH_SIZE, NUM_STEPS, NUM_TOKENS, VOCAB_SIZE, LEARNING_RATE = 4, 4, 64, 512, 0.05
Adapter = dict[str, torch.Tensor]


def arguments(description: str) -> argparse.ArgumentParser:
    """What every peer's script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", choices=("lora", "noop"), default="lora")
    parser.add_argument("--clients", type=int, default=100, help="clients, all of them in every round")
    parser.add_argument("--rounds", type=int, default=4, help="rounds that are measured, beside the first")
    parser.add_argument("--elements", type=int, default=16384, help="fp32 numbers of the no-op's state")
    return parser


def build_model() -> Any:
    """A random Llama, 4 blocks of width 128, with LoRA r = 8 on q and v."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=344,
        max_position_embeddings=256,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


kept_model = functools.cache(build_model)  # one per process


def read_adapter(model: Any) -> Adapter:
    """A copy of the trainable tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def client_tokens(client_id: int) -> torch.Tensor:
    """A client's 16 examples, (16, 64)."""
    generator = torch.Generator().manual_seed(client_id)
    return torch.randint(VOCAB_SIZE, (NUM_STEPS * BATCH_SIZE, NUM_TOKENS), generator=generator)


def local_training(model: Any, adapter: Adapter, client_id: int) -> tuple[Adapter, float]:
    """Four SGD steps from ``adapter``; the adapter after them and the loss of the last."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter[name])
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    for batch in client_tokens(client_id).split(BATCH_SIZE):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return read_adapter(model), float(loss.detach())


class Clock:
    """Times from one finished round to the next."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def mark(self) -> None:
        """A round is over."""
        self.marks.append(time.perf_counter())

    def report(self, system: str, num_clients: int) -> None:
        """One JSON line: milliseconds per client-round, the first round left out."""
        seconds = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        row = {
            "system": system,
            "ms_per_client": 1e3 * statistics.median(seconds[1:]) / num_clients,
            "best_ms_per_client": 1e3 * min(seconds[1:]) / num_clients,
            "first_round_s": seconds[0],
        }
        print(json.dumps({"rows": [row]}), flush=True)
