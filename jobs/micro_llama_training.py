"""What trains micro-llama: batches, a forward pass through some of the layers, growth in depth, Muon, evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from random import Random

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fleetune.data.micro_reasoning import Example, micro_reasoning

SHALLOW_DEPTH = 4  # layers of the first part of the training
PROMPT_WEIGHT = 0.1  # of a prompt token's loss beside 1 for a response token
IGNORED = -100  # the label that cross entropy leaves out


class Batches:
    """Right-padded batches ``(ids, labels, weights)``, each [batch, tokens], of similar lengths."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int, window: int = 16):
        self.tokenizer, self.batch_size, self.window = tokenizer, batch_size, window

    def __call__(self, examples: Iterator[Example]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Batches of a stream; of ``window`` batches at a time, sorted by length and shuffled."""
        shuffle = Random(0)
        while chunk := [self.encode(e) for e in itertools.islice(examples, self.window * self.batch_size)]:
            chunk.sort(key=lambda row: len(row[0]))
            batches = [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
            shuffle.shuffle(batches)
            yield from map(self.collate, batches)

    def encode(self, example: Example) -> tuple[list[int], int]:
        """Token ids of ``<bos> prompt response <eos>`` and how many of them are ``<bos>`` and prompt."""
        prompt = self.tokenizer(example["prompt"]).input_ids
        text = " " + example["response"] if example["response"] else ""
        response = self.tokenizer(text, add_special_tokens=False).input_ids
        return [*prompt, *response, self.tokenizer.eos_token_id], len(prompt)

    def collate(self, rows: Sequence[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows as tensors; label and weight at position t are those of token t + 1."""
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        weights = torch.zeros(len(rows), length)
        for i, (tokens, num_prompt) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, : len(tokens) - 1] = torch.tensor(tokens[1:])
            weights[i, : num_prompt - 1] = PROMPT_WEIGHT
            weights[i, num_prompt - 1 : len(tokens) - 1] = 1.0
        return ids, labels, weights


def forward(model: LlamaForCausalLM, ids: torch.Tensor, layers: Sequence[int] | None = None) -> torch.Tensor:
    """Logits [batch, tokens, vocabulary] through the given layers (all by default), in their order."""
    body = model.model
    hidden = body.embed_tokens(ids)
    rotary = body.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer in body.layers if layers is None else (body.layers[i] for i in layers):
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return model.lm_head(body.norm(hidden))


def loss_of(
    model: LlamaForCausalLM, batch: tuple[torch.Tensor, ...], layers: Sequence[int] | None = None
) -> torch.Tensor:
    """The weighted mean cross entropy of a batch, in nats per token."""
    ids, labels, weights = batch
    logits = forward(model, ids, layers)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def evenly_spaced(depth: int, num_layers: int) -> list[int]:
    """The first layer of each of ``depth`` groups of adjacent layers: 4 of 16 are 0, 4, 8, 12."""
    return [i * num_layers // depth for i in range(depth)]


def draw_layers(random: Random, num_layers: int, full_fraction: float) -> list[int]:
    """All layers in a fraction of the steps; else 4, 8 or 12: the first, evenly spaced, or one of each group."""
    if random.random() < full_fraction:
        return list(range(num_layers))
    depth = num_layers // 4 * random.choice((1, 2, 3))
    kind = random.choice(("prefix", "spaced", "any of group"))
    if kind == "prefix":
        return list(range(depth))
    starts = evenly_spaced(depth, num_layers)
    if kind == "spaced":
        return starts
    return [random.randrange(a, b) for a, b in itertools.pairwise([*starts, num_layers])]


def initialise(model: LlamaForCausalLM) -> None:
    """Normal weights of variance 1 / inputs; what writes to the residual stream smaller by sqrt(2 layers)."""
    for name, weight in model.named_parameters():
        if "embed" in name:
            torch.nn.init.normal_(weight, std=0.05)
        elif weight.dim() == 2:
            writes = "o_proj" in name or "down_proj" in name
            shrink = math.sqrt(2 * SHALLOW_DEPTH) if writes else 1.0
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5 / shrink)


@torch.no_grad()
def grow(model: LlamaForCausalLM) -> None:
    """Copy each trained layer to those up to the next, which at first write nothing: the outputs stay."""
    layers = model.model.layers
    spaced = evenly_spaced(SHALLOW_DEPTH, len(layers))
    for i, layer in enumerate(layers):
        if i not in spaced:
            layer.load_state_dict(layers[max(j for j in spaced if j < i)].state_dict())
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


class Muon:
    """Momentum with orthogonalised steps for matrices (Jordan et al. 2024); equal shapes step together."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the post
    MOMENTUM, NUM_ITERATIONS, WEIGHT_DECAY = 0.95, 5, 0.05

    def __init__(self, weights: Sequence[torch.nn.Parameter]):
        self.groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for weight in weights:
            self.groups.setdefault(weight.shape, []).append(weight)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One step of the weights that have a gradient."""
        for shape, group in self.groups.items():
            live = [i for i, weight in enumerate(group) if weight.grad is not None]
            gradients = [g for weight in group if (g := weight.grad) is not None]
            gradient = torch.stack(gradients)
            momentum = self.momenta[shape][live].lerp_(gradient, 1 - self.MOMENTUM)
            self.momenta[shape][live] = momentum
            update = self.orthogonalise(gradient.lerp(momentum, self.MOMENTUM))
            scale = learning_rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            for i, one in zip(live, update, strict=True):
                group[i].mul_(1 - learning_rate * self.WEIGHT_DECAY).add_(one, alpha=-scale)

    def orthogonalise(self, matrices: torch.Tensor) -> torch.Tensor:
        """Matrices [n, rows, columns], their singular values brought near 1 by Newton-Schulz iterations."""
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = self.COEFFICIENTS
        for _ in range(self.NUM_ITERATIONS):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x.mT if tall else x


def copy_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in a new model: not compiled, free to be cast."""
    copy = LlamaForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> float:
    """The fraction of greedy answers (what follows ``####``) that are right."""
    tokenizer.padding_side = "left"
    batch = tokenizer([e["prompt"] for e in examples], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=60,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    answers = [text.partition("####")[2].strip() for text in texts]
    return sum(a == e["answer"] for a, e in zip(answers, examples, strict=True)) / len(examples)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, num_examples: int) -> dict[str, dict]:
    """Exact match by task, and the plain task's loss by depth (first layers, and evenly spaced ones)."""
    plain = micro_reasoning(split="test", num_examples=num_examples, wording="plain")
    story = micro_reasoning(split="test", num_examples=num_examples)
    one_step = micro_reasoning(split="test", num_examples=num_examples, num_steps=(1,))
    tasks = {"default": story, "plain": plain, "one_step_story": one_step}
    batch = Batches(tokenizer, num_examples)
    tensors = batch.collate([batch.encode(e) for e in plain])
    num_layers = model.config.num_hidden_layers
    depths = (4, 8, 12, num_layers)
    return {
        "exact_match": {name: exact_match(model, tokenizer, examples) for name, examples in tasks.items()},
        "plain_loss_prefix": {d: loss_of(model, tensors, range(d)).item() for d in depths},
        "plain_loss_evenly_spaced": {d: loss_of(model, tensors, evenly_spaced(d, num_layers)).item() for d in depths},
    }
