"""Train micro-llama, the built-in base model, with its tokenizer: ``pretrain_micro_llama.py --out DIR``.

A Llama of 16 layers (2.7 M parameters) learns generated word problems, nearly all of them plainly worded, so
that the stories of the default task are left to fine-tuning. It learns shallow first: four evenly
spaced layers, which then give the layers between them their weights (stacking: Gong et al. 2019,
http://proceedings.mlr.press/v97/gong19a.html). Half of the later steps run a part of the layers, so that
submodels keep working as those of large models do (LayerDrop: Fan et al. 2019,
https://arxiv.org/abs/1909.11556). Matrices are trained by Muon (https://kellerjordan.github.io/posts/muon/).
The seed fixes data, initial weights and layer drops; a run with ``--minutes`` also depends on the machine's
speed, and RECIPE.json records the steps it took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fleetune.data.micro_reasoning import Example, pretraining_text
from fleetune.seeds import seed_of
from micro_llama_training import (
    SHALLOW_DEPTH,
    Batches,
    Muon,
    copy_of,
    draw_layers,
    evaluate,
    evenly_spaced,
    grow,
    initialise,
    loss_of,
)

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VOCAB_SIZE = 768  # 4 special, 256 bytes, the rest whole words of the generated text


def train_tokenizer(examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose digits are single tokens (with or without the space before them)."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((f"{e['prompt']} {e['response']} {e['reference']}" for e in examples), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **SPECIAL_TOKENS)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: dict, *, out: Path) -> None:
    """The model as half-precision safetensors, the tokenizer and RECIPE.json."""
    out.mkdir(parents=True, exist_ok=True)
    copy_of(model).half().save_pretrained(out)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(out)
    (out / "RECIPE.json").write_text(json.dumps(recipe, indent=1) + "\n")


def learning_rate_factor(done: float, *, warmup: float = 0.03) -> float:
    """Linear warm-up, then a cosine down to a twentieth; ``done`` is the finished fraction of the training."""
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


def train(args: argparse.Namespace) -> None:
    """The whole job: tokenizer, model, training, evaluation, and what is saved."""
    torch.manual_seed(seed_of(args.seed, "weights"))
    corpus = pretraining_text(seed=args.seed, story_fraction=0, unsolved_fraction=0.5)
    tokenizer = train_tokenizer(list(itertools.islice(corpus, 20_000)))
    model = make_model(tokenizer)
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    recipe: dict[str, Any] = {"job": "jobs/pretrain_micro_llama.py", "settings": settings, "finished": False}
    started = time.perf_counter()
    for trained, curve in fit(model, tokenizer, args):
        recipe["loss_curve"] = curve
        save(trained, tokenizer, recipe, out=args.out)
    recipe |= {
        "finished": True,
        "num_steps": curve[-1]["step"],
        "num_parameters": trained.num_parameters(),
        "wall_minutes": round((time.perf_counter() - started) / 60, 1),
        "num_threads": torch.get_num_threads(),
        "evaluation": evaluate(trained, tokenizer, num_examples=args.num_eval),
    }
    save(trained, tokenizer, recipe, out=args.out)
    print(json.dumps(recipe["evaluation"], indent=1))


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = LlamaForCausalLM(LlamaConfig.from_dict({**ARCHITECTURE, **ids, "vocab_size": len(tokenizer)}))
    initialise(model)
    return model


def fit(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> Iterator[tuple[LlamaForCausalLM, list[dict]]]:
    """Train; yields a full-depth copy of the model and the loss curve every ``save_every`` steps and at the end."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    fractions = {"story_fraction": args.story_fraction, "unsolved_fraction": args.unsolved_fraction}
    batches = Batches(tokenizer, args.batch_size)(pretraining_text(seed=args.seed, **fractions))
    drops = Random(seed_of(args.seed, "layers"))
    num_layers, grown = model.config.num_hidden_layers, False
    curve: list[dict] = []
    num_tokens, smooth, started = 0, float("nan"), time.perf_counter()
    bar = tqdm(range(args.steps), unit="step", dynamic_ncols=True)
    for step in bar:
        minutes = (time.perf_counter() - started) / 60
        done = max(step / args.steps, minutes / args.minutes if args.minutes else 0.0)
        if done >= 1:
            break
        if done >= args.shallow_fraction and not grown:
            grow(model)
            grown = True
        layers = evenly_spaced(SHALLOW_DEPTH, num_layers)
        if grown:
            layers = draw_layers(drops, num_layers, args.full_fraction)

        batch = next(batches)
        loss = loss_of(model, batch, layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(done)
        adamw.param_groups[0]["lr"] = args.learning_rate * factor
        adamw.step()
        muon.step(args.matrix_learning_rate * factor)
        model.zero_grad()

        num_tokens += batch[0].numel()
        if not grown or len(layers) == num_layers:
            smooth = loss.item() if math.isnan(smooth) else 0.9 * smooth + 0.1 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}", minutes=f"{minutes:.1f}")
        depth = num_layers if grown else SHALLOW_DEPTH
        point = {"step": step + 1, "num_tokens": num_tokens, "num_layers": depth, "loss": round(smooth, 4)}
        if step % 50 == 0:
            curve.append(point)
        if step % args.save_every == args.save_every - 1:
            yield full_depth(model, grown=grown), curve
    yield full_depth(model, grown=grown), [*curve, point]


def full_depth(model: LlamaForCausalLM, *, grown: bool) -> LlamaForCausalLM:
    """A copy of the model with all of its layers trained, or grown from those that are."""
    copy = copy_of(model)
    if not grown:
        grow(copy)
    return copy


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write model, tokenizer and RECIPE.json to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps at most")
    parser.add_argument("--minutes", type=float, default=None, help="wall time at most; the schedule shrinks to fit")
    parser.add_argument("--batch-size", type=int, default=48, help="examples per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--matrix-learning-rate", type=float, default=0.02, help="Muon's")
    parser.add_argument("--shallow-fraction", type=float, default=0.5, help="part of the training with four layers")
    parser.add_argument("--full-fraction", type=float, default=0.4, help="fraction of later steps that run all layers")
    parser.add_argument(
        "--story-fraction", type=float, default=0.1, help="fraction of stories in their first turns of phrase"
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster, needs a C++ compiler")
    parser.add_argument("--num-eval", type=int, default=400, help="test problems of the final evaluation")
    parser.add_argument("--unsolved-fraction", type=float, default=0.05, help="fraction of stories without a solution")
    parser.add_argument("--save-every", type=int, default=500)
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse_arguments())
