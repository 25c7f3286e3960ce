"""Loads the records of a run from the built-in dataset, a local file or the hub, and holds out examples for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from fleetune.data.config import DataConfig
from fleetune.data.files import Table, looks_like_a_file, read_file
from fleetune.data.records import Examples, Records, to_examples
from fleetune.digests import digest_of
from fleetune.errors import UserError, nearest, unknown_name
from fleetune.seeds import rng

log = logging.getLogger(__name__)

DATASETS = {"micro-reasoning": "generated word problems with worked chains, in several skills"}
"""The built-in datasets, with a line on each."""
DEFAULT_NUM_EXAMPLES = 4_000  # assumed: 200 for each of 20 clients
MAX_GENERATED = 1_000_000  # assumed: more take minutes, and repeat themselves
GENERATOR_SEED = 0  # the generated dataset is the same for every run seed, as a published one is

MAX_SHOWN = 12  # column names in a message
EVAL_SPLITS = ("test", "validation", "dev", "eval")


def load_records(config: DataConfig, *, seed: int) -> Records:
    """Read the dataset and its held-out examples. All random draws depend on ``seed``, the run's."""
    sources = _sources(config)
    train, held_out = sources["data.dataset"]
    if "data.eval_dataset" in sources:
        examples, test = sources["data.eval_dataset"]
        held_out = test or examples
    if held_out is None:
        train, held_out = _hold_out(train, config, seed=seed)
    train = _sample(train, config.num_examples, seed=seed, purpose="num_examples")
    held_out = _sample(held_out, config.num_eval_examples, seed=seed, purpose="num_eval_examples")
    if config.dataset not in DATASETS:
        _tell_unused(train, held_out)
        _tell_shared(train, held_out)
    return Records(name=config.dataset, train=train, eval=held_out, content=_digests(sources))


def read_content(config: DataConfig) -> dict[str, str]:
    """The digests of `Records.content` for the sources as they are now."""
    return _digests(_sources(config))


def _sources(config: DataConfig) -> dict[str, tuple[Examples, Examples | None]]:
    """Field that names a source -> its examples and those of its test split."""
    sources = {"data.dataset": _source(config.dataset, config, split=config.split, field="data.dataset")}
    if config.eval_dataset is not None:
        held_out = _source(config.eval_dataset, config, split=None, field="data.eval_dataset")
        sources["data.eval_dataset"] = held_out
    return sources


def _digests(sources: Mapping[str, tuple[Examples, Examples | None]]) -> dict[str, str]:
    return {field: digest_of(part.digest() for part in parts if part is not None) for field, parts in sources.items()}


def _tell_unused(train: Examples, held_out: Examples) -> None:
    """Warn of columns that no example uses: a context or a passage may be among them. Each column is named once."""
    reported: set[str] = set()
    for examples in (train, held_out):
        new = [name for name in examples.unused if name not in reported]
        if new:
            shown = ", ".join(name.strip() or repr(name) for name in new[:MAX_SHOWN]) + (
                f" and {len(new) - MAX_SHOWN} more" if len(new) > MAX_SHOWN else ""
            )
            log.warning("%s: columns left out: %s; data.template can hold any of them", examples.source, shown)
        reported.update(new)


def _tell_shared(train: Examples, held_out: Examples) -> None:
    """Warn if held-out examples are also learnt, word for word: they would measure memory."""
    learnt = set(zip(train["prompt"], train["response"], strict=True))
    num_shared = sum(pair in learnt for pair in zip(held_out["prompt"], held_out["response"], strict=True))
    if num_shared:
        log.warning("%d of %d held-out examples are among the training examples too", num_shared, len(held_out))


def _source(name: str, config: DataConfig, *, split: str | None, field: str) -> tuple[Examples, Examples | None]:
    """A dataset's examples and those of its test split; without ``split``, the test split or all there is."""
    if name in DATASETS:
        if split not in (None, "train"):
            raise unknown_name("split to train on", str(split), ["train"], field="data.split")
        table, test = _generate(config, split="test" if split is None else "train")
    elif looks_like_a_file(name) or Path(name).exists():
        table, test = read_file(name, field=field), None
    elif "/" not in name and nearest(name, DATASETS):
        raise unknown_name("dataset", name, DATASETS, field=field)
    else:
        table, test = _read_hub(name, split=split, field=field)
    examples = to_examples(table, config=config, field=field)
    return examples, None if test is None else to_examples(test, config=config, field=field)


def _generate(config: DataConfig, *, split: Literal["train", "test"]) -> tuple[Table, Table]:
    from fleetune.data.micro_reasoning import micro_reasoning
    from fleetune.data.micro_skills import composition_task

    for name in ("num_examples", "num_eval_examples"):
        if (getattr(config, name) or 0) > MAX_GENERATED:
            rule = f"exceeds the {MAX_GENERATED} examples that are generated at most"
            raise UserError(rule, field=f"data.{name}", value=getattr(config, name), hint="lower it")

    def table(side: Literal["train", "test"], num_examples: int) -> Table:
        if config.skills:
            rows = composition_task(config.skills, split=side, num_examples=num_examples, seed=GENERATOR_SEED)
        else:
            rows = micro_reasoning(split=side, num_examples=num_examples, seed=GENERATOR_SEED)
        return Table.from_rows(f"micro-reasoning {side}", [dict(row) for row in rows])

    return table(split, config.num_examples or DEFAULT_NUM_EXAMPLES), table("test", config.num_eval_examples)


def _read_hub(name: str, *, split: str | None, field: str) -> tuple[Table, Table | None]:
    """A hub dataset's split and its test split; without ``split``, the test split or else the first."""
    from datasets import load_dataset

    hub_id, _, hub_config = name.partition(":")
    try:
        splits = load_dataset(hub_id, hub_config or None)
    except Exception as error:  # the hub client raises its own, requests', OSErrors and ValueErrors alike
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        rule = "neither a built-in dataset, nor a local file, nor a hub dataset that can be loaded here"
        hint = f"built in: {', '.join(DATASETS)}; local files need no hub; the hub said {reason}"
        raise UserError(rule, field=field, value=name, hint=hint) from error
    test = next((s for s in EVAL_SPLITS if s in splits and s != split), None)
    split = split or test or next(iter(splits))
    if split not in splits:
        raise unknown_name("split", split, splits, field="data.split")
    table = Table(name=f"{name} {split}", columns=splits[split].to_dict())
    return table, Table(name=f"{name} {test}", columns=splits[test].to_dict()) if test else None


def _hold_out(examples: Examples, config: DataConfig, *, seed: int) -> tuple[Examples, Examples]:
    """Part the examples at random into training and held-out; neither is empty."""
    if len(examples) < 2:
        hint = "name held-out examples as data.eval_dataset"
        raise UserError("one example is too few to hold any out", field="data.dataset", hint=hint)
    wanted = min(round(len(examples) * config.eval_fraction), config.num_eval_examples)
    num_held_out = min(max(wanted, 1), len(examples) - 1)
    order = rng(seed, "hold_out").permutation(len(examples))
    return examples.take(np.sort(order[num_held_out:])), examples.take(np.sort(order[:num_held_out]))


def _sample(examples: Examples, num_examples: int | None, *, seed: int, purpose: str) -> Examples:
    """At most ``num_examples`` of them, drawn at random, in the source's order."""
    if num_examples is None or num_examples >= len(examples):
        return examples
    rows = rng(seed, purpose).choice(len(examples), size=num_examples, replace=False)
    return examples.take(np.sort(rows))
