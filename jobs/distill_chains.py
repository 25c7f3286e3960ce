"""Writes training data with a teacher's chains: a question, the chain that the teacher wrote, and the original solution.

    python jobs/distill_chains.py --data gsm8k/train.jsonl --teacher path/to/model --out chains.jsonl
    python jobs/distill_chains.py --data micro-reasoning --teacher micro-llama --out chains.jsonl
    python jobs/distill_chains.py --data gsm8k/example_model_solutions.jsonl --published 175b_verification \\
        --reference ground_truth --answer-pattern '(?:####|A:)\\s*([-+]?[\\d,.]*\\d)' --out chains.jsonl

The teacher is a folder with a transformers model and its tokenizer, or micro-llama. With ``--published COLUMN`` the chains are
those in a column of the data: texts, or objects with ``solution``. A chain is kept if its answer, what ``--answer-pattern`` finds
first, is that of the original solution. Each line of the output has ``prompt``, ``response`` (the chain) and ``reference`` (the
original solution): what a job of lesft reads. Exit status 2 if no chain is right, or if something is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleetune import files
from fleetune.data.config import DataConfig
from fleetune.data.sources import load_records
from fleetune.data.template import extract_answer, render_prompts
from fleetune.errors import UserError

MAX_LISTED = 3  # wrong chains that the error shows


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    try:
        kept, total = distil(arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{kept} of {total} chains have the right answer and were written")
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="built-in name or local file, as data.dataset of a job")
    parser.add_argument("--out", required=True, type=Path, help="the JSONL file to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", help="micro-llama, or a folder with a transformers model and its tokenizer")
    source.add_argument("--published", help="column of the data that holds chains")
    parser.add_argument("--prompt", help="column of the question (default: as data.columns.prompt)")
    parser.add_argument("--reference", help="column of the original solution (default: the usual names of a response)")
    parser.add_argument("--template", default="{prompt}", help="the teacher's prompt, as data.template")
    parser.add_argument("--separator", default=" ", help="text between prompt and chain, as data.separator")
    parser.add_argument("--answer-pattern", default=DataConfig().answer_pattern, help="as data.answer_pattern")
    parser.add_argument("--num-examples", type=int, help="questions, drawn at random; all by default")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args(argv)


def distil(options: argparse.Namespace) -> tuple[int, int]:
    """Write the right chains; returns how many there are, and of how many. Raises UserError if none is right."""
    config = DataConfig.model_validate(
        {
            "dataset": options.data,
            "columns": {"prompt": options.prompt, "response": options.reference},
            "template": options.template,
            "num_examples": options.num_examples,
            "num_eval_examples": 1,
            "answer_pattern": options.answer_pattern,
        }
    )
    examples = load_records(config, seed=0).train
    solutions = examples["response"]
    prompts = render_prompts(config.template, examples.columns)
    if options.published is None:
        chains = list(written(prompts, options))
    elif options.published in examples.columns:
        chains = [published(text) for text in examples[options.published]]
    else:
        hint = f"columns: {', '.join(examples.columns)}"
        raise UserError("no such column", field="--published", value=options.published, hint=hint)
    right = [
        is_right(chain, solution, config.answer_pattern) for chain, solution in zip(chains, solutions, strict=True)
    ]
    if not any(right):
        shown = " | ".join(repr(chain[:80]) for chain in chains[:MAX_LISTED])
        raise UserError(
            f"none of {len(chains)} chains has the right answer; they begin {shown}",
            field="--teacher" if options.published is None else "--published",
            value=options.teacher or options.published,
            hint="take another teacher or template, or an --answer-pattern that finds the answer in chains and solutions",
        )
    rows = zip(prompts, chains, solutions, right, strict=True)
    lines = [
        json.dumps({"prompt": p, "response": c.strip(), "reference": s}, ensure_ascii=False)
        for p, c, s, ok in rows
        if ok
    ]
    files.write(options.out, ("\n".join(lines) + "\n").encode())
    return len(lines), len(chains)


def is_right(chain: str, solution: str, pattern: str) -> bool:
    """True if both have an answer, and it is the same."""
    answer = extract_answer(chain, pattern)
    return answer is not None and answer == extract_answer(solution, pattern)


def published(text: str) -> str:
    """A chain out of a cell: the cell's text, or the ``solution`` of an object."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return str(value["solution"]) if isinstance(value, dict) and "solution" in value else text


def written(prompts: list[str], options: argparse.Namespace) -> Iterator[str]:
    """The chains that the teacher writes, greedily, batch by batch."""
    import torch

    model, tokenizer = teacher(options.teacher)
    for start in range(0, len(prompts), options.batch_size):
        texts = [prompt + options.separator.rstrip(" ") for prompt in prompts[start : start + options.batch_size]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(
                **batch, max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        yield from tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def teacher(name: str) -> tuple[Any, Any]:
    """Model and tokenizer. Raises UserError if there is no such model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fleetune.models.folder import ASSETS

    folder = ASSETS / name if name == "micro-llama" else Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        hint = f"name micro-llama, or a folder with config.json, weights and tokenizer.json ({reason})"
        raise UserError("holds no model that can be loaded", field="--teacher", value=name, hint=hint) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


if __name__ == "__main__":
    raise SystemExit(main())
