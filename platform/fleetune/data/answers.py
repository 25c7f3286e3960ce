"""Turns generated tokens into text by the tokenizer's own rules, without the library around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class AnswerReader:
    """The part of a tokenizer that an evaluation needs. Workers unpickle it without importing transformers."""

    backend: Any
    """The ``tokenizers.Tokenizer`` inside of it."""
    end: int
    """Id of the token that ends an answer; -1 if there is none."""

    @classmethod
    def of(cls, tokenizer: Any) -> AnswerReader:
        """From a fast tokenizer of transformers; one without an end never ends an answer."""
        end = tokenizer.eos_token_id
        return cls(tokenizer.backend_tokenizer, -1 if end is None else int(end))

    def texts(self, ids: np.ndarray) -> list[str]:
        """Texts of token ids (n, S), special tokens left out."""
        return [self.backend.decode(row, skip_special_tokens=True) for row in ids.tolist()]
