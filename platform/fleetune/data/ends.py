"""The tokens that begin and end a text: exactly once, no matter if template, data or tokenizer writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fleetune.data.config import DataConfig
from fleetune.data.template import begins_with_a_column, column_names
from fleetune.errors import UserError


class Ends(NamedTuple):
    """The tokens that are put before and after a text that does not have them yet."""

    head: tuple[int, ...]
    """Token ids before a text: bos, or other tokens that the tokenizer puts there."""
    bos: tuple[int, str] | None
    """Id and text of the tokenizer's bos, which a text may hold itself."""
    eos: tuple[int, str] | None
    """Id and text of the tokenizer's eos."""
    add_eos: bool

    def head_of(self, prompt: str, ids: Sequence[int]) -> tuple[Sequence[int], int]:
        """(tokens to put before a text with these ids, number of tokens at the result's beginning that are its bos)."""
        marks = self.head or ((self.bos[0],) if self.bos else ())
        if marks and tuple(ids[: len(marks)]) == marks:
            return (), len(marks)
        if self.bos and prompt.lstrip().startswith(self.bos[1]):  # blanks before it may be tokens
            return (), 0
        return self.head, len(self.head)

    def tail_of(self, response: str) -> Sequence[int]:
        """The tokens to put after a text that ends in this response."""
        if self.eos is None or not self.add_eos or response.rstrip().endswith(self.eos[1]):
            return ()
        return (self.eos[0],)

    def is_end_alone(self, response: str) -> bool:
        """True if a response consists of its end and nothing else."""
        return self.eos is not None and not response.replace(self.eos[1], "").strip()

    def without_inner_bos(self, columns: Mapping[str, list[str]], template: str) -> Mapping[str, list[str]]:
        """The columns without the bos with which a cell begins that will stand inside of a text that has one in front.

        Data that was written for one text per column carries it. Where neither the tokenizer nor the job puts one in front
        it may be a mark of another kind, such as that of a turn, and stays.
        """
        if self.bos is None or not self.head:
            return columns
        named = column_names(template)
        inner = {*(named[1:] if begins_with_a_column(template) else named), "response"}
        bare = {name: [self._without_bos(text) for text in columns[name]] for name in inner if name in columns}
        return {**columns, **bare}

    def once(self, prompt: str) -> str:
        """The prompt with one bos where it begins with several, the template's and the data's."""
        rest = self._without_bos(prompt)
        return self.bos[1] + rest if self.bos and self._without_bos(prompt, at_most=1) != rest else prompt

    def _without_bos(self, text: str, *, at_most: int | None = None) -> str:
        """The text after any number of bos at its beginning, and blanks before each."""
        while self.bos and at_most != 0 and text.lstrip().startswith(self.bos[1]):
            text = text.lstrip().removeprefix(self.bos[1])
            at_most = None if at_most is None else at_most - 1
        return text


def ends_of(backend: Any, tokenizer: Any, config: DataConfig) -> Ends:
    """The ends by the job's settings. ``backend``: the ``tokenizers.Tokenizer`` with its own post-processor."""
    bos, eos = (_marked(backend, i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    if config.add_bos is True and bos is None:
        raise UserError("the model's tokenizer has no bos", field="data.add_bos", value=True, hint="set it to auto")
    if config.add_bos == "auto":
        head = _own_head(backend)
    else:
        head = (bos[0],) if config.add_bos and bos else ()
    return Ends(head, bos, eos, config.add_eos)


def _own_head(backend: Any) -> tuple[int, ...]:
    """The token ids that the tokenizer itself puts before a text."""
    encoding = backend.encode("a")
    size = next((i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added), 0)
    return tuple(encoding.ids[:size])


def _marked(backend: Any, token_id: int | None) -> tuple[int, str] | None:
    text = None if token_id is None else backend.id_to_token(token_id)
    return (token_id, text) if token_id is not None and text else None
