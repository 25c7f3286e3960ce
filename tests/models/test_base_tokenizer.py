"""Tokenizers of other people's models: the one that AutoTokenizer gives, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fleetune.errors import UserError
from fleetune.models.load import load_tokenizer
from support import random_models as models
from support import tiny
from support.model_folders import Folder


@pytest.mark.parametrize("architecture", models.EXTRA)
def test_the_tokenizer_is_that_of_autotokenizer(folder: Folder, architecture: str):
    """Whatever class the folder names: Qwen's splits digits and spaces in its own way, whatever tokenizer.json says."""
    from transformers import AutoTokenizer

    path = folder(architecture)
    for file in Path(tiny.model_folder()).glob("*token*"):
        shutil.copy(file, path)
    ours, theirs = load_tokenizer(str(path)), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    texts = ["Ann has 1234 eggs.\n\nA:  #### 7", " 'tis\tso", "Straße 東京"]
    assert ours(texts).input_ids == theirs(texts).input_ids
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert [getattr(ours, name) for name in special] == [getattr(theirs, name) for name in special]


@pytest.mark.parametrize("content", ["", "{", '{"added_tokens": 1}'])
def test_a_damaged_tokenizer_is_refused(folder: Folder, content: str):
    path = folder()
    for file in Path(tiny.model_folder()).glob("*token*"):
        shutil.copy(file, path)
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load_tokenizer(str(path))
