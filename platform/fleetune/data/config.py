"""The fields of a job file for the data: training and evaluation examples, and how they are spread over the clients."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fleetune.config import Config, Place
from fleetune.data.template import column_names

MAX_EXAMPLES = 100_000_000  # assumed: more are not dealt out in one process


class ColumnMapping(Config):
    """Which columns of the source hold what. Left out, the usual names are looked for."""

    prompt: str | None = None
    """Column of the question. Default: the first of prompt, question, instruction (with input), …"""
    response: str | None = None
    """Column of the text to be learnt. Default: the first of response, completion, output, answer, …"""
    category: str | None = None
    """Column by which clients can differ. Default: category, skill, topic, … where there is one."""
    reference: str | None = None
    """Column of the ground-truth solution, for methods with a reference path (lesft). Default: reference, ground_truth."""


class PartitionConfig(Config):
    """How the training examples are dealt to the clients. Every example goes to exactly one client."""

    kind: Literal["iid", "dirichlet", "shards", "by_key", "quantity"] = "iid"
    """iid: equal sizes at random. dirichlet: label skew. shards: each client sees a few categories.
    by_key: every key's examples stay on one client. quantity: same mixture, unequal sizes."""
    alpha: float = Field(default=0.5, ge=1e-6, le=1e6)
    """Concentration of the Dirichlet draws (dirichlet, quantity): small is skewed, large is even."""
    shards_per_client: int = Field(default=2, gt=0, le=1_000_000)
    """Pieces of the category-sorted examples that each client gets (shards); 2 in McMahan et al. 2017."""
    key: str = "category"
    """Column that dirichlet, shards and by_key go by; any column of the source."""
    min_examples: int = Field(default=0, ge=0, le=MAX_EXAMPLES)
    """Examples that every client has at least, filled up from the largest. 0 allows empty clients."""

    @model_validator(mode="after")
    def _keys_stay_whole(self) -> PartitionConfig:
        if self.kind == "by_key" and self.min_examples:
            raise ValueError("kind=by_key keeps keys whole, so min_examples must be 0")
        return self


class DataConfig(Config):
    """The dataset, its prompt template, its length limit and its partition."""

    dataset: Place = "micro-reasoning"
    """Built-in name, local .jsonl, .json, .csv, .tsv or .parquet file, or hub id (`owner/name[:config]`)."""
    split: str = "train"
    """Split to train on (built-in and hub datasets)."""
    skills: tuple[Literal["notation", "arithmetic", "program"], ...] = ()
    """Skills that every problem of micro-reasoning needs: one, as adapters learn it, or several at once, as a task for composed
    adapters. Empty: the default task, word problems as stories."""
    columns: ColumnMapping = ColumnMapping()
    """Which columns hold the prompt, the response and the category."""
    template: str = "{prompt}"
    """The prompt's text, with the source's columns in braces; `{{` is a brace."""
    reference_template: str = "{reference}\n{prompt}"
    """The reference path's prompt (lesft): `{reference}` is the solution, `{prompt}` the prompt as `template` writes it. Its
    end should be the prompt's, so that the response follows on both paths in the same way."""
    separator: str = Field(default=" ", max_length=1000)
    """Text between prompt and response. It is learnt and generated with the response."""
    add_bos: bool | Literal["auto"] = "auto"
    """Begin every text with the tokenizer's bos, once: auto as the tokenizer does by itself, true always, false never."""
    add_eos: bool = True
    """End every text with the tokenizer's eos, once; false: only where the text has it."""
    eval_dataset: Place | None = None
    """Held-out examples from another source (as `dataset`). Default: the source's own test split."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the training examples to hold out where there is no test split."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of each client's examples that it does not train on and that its own model is evaluated on
    (evaluation.personal): one example at least, and all but one at most. A client with a single example holds out none."""
    num_examples: int | None = Field(default=None, gt=0, le=MAX_EXAMPLES)
    """Training examples to use, drawn at random; all by default (micro-reasoning: 4,000)."""
    num_eval_examples: int = Field(default=256, gt=0, le=MAX_EXAMPLES)
    """Held-out examples to use at most, drawn at random."""
    max_tokens: int = Field(default=128, ge=4, le=1_048_576)
    """Longest example, prompt and response together. Longer prompts lose their beginning."""
    max_reference_tokens: int | None = Field(default=None, ge=4, le=1_048_576)
    """Longest reference path (lesft), which is never cut: a longer one is refused. Default: twice max_tokens, or the model's
    positions if these are fewer."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens that are learnt: those of the response and its end, or all."""
    answer_pattern: str = r"####\s*([-+]?\$?[\d,]*\.?\d+)"
    """Regular expression for the answer in a response; its first group counts. Default: number after ####."""
    scored_by: Literal["auto", "text", "execution"] = "auto"
    """How a generated answer is compared: as text or number; or as a program, an expression after >>> whose value is computed.
    auto: execution for micro-reasoning's skill program, else text."""
    partition: PartitionConfig = PartitionConfig()
    """How the examples are dealt to the clients."""

    @property
    def is_executed(self) -> bool:
        """True if answers are programs, whose values are compared."""
        return "program" in self.skills if self.scored_by == "auto" else self.scored_by == "execution"

    @model_validator(mode="after")
    def _skills_are_of_the_generated_task(self) -> DataConfig:
        if self.skills and self.dataset != "micro-reasoning":
            raise ValueError(f"skills={list(self.skills)} are those of micro-reasoning, and dataset is {self.dataset}")
        if len(set(self.skills)) < len(self.skills):
            raise ValueError(f"skills={list(self.skills)} names a skill twice")
        return self

    @field_validator("template")
    @classmethod
    def _template_parses(cls, template: str) -> str:
        if not column_names(template):
            raise ValueError("the template names no column; write at least {prompt}")
        return template

    @field_validator("reference_template")
    @classmethod
    def _reference_is_named(cls, template: str) -> str:
        if "reference" not in column_names(template):
            raise ValueError(
                "the template does not name {reference}, so that the reference path would hold no solution"
            )
        return template

    @field_validator("template", "reference_template", "separator")
    @classmethod
    def _all_are_characters(cls, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no character") from None
        return text

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:  # x{99999999999} overflows
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern
