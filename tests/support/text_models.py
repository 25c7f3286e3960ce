"""Tokenizers of the kinds that models come with, trained on a few lines, each beside a random small Llama."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "Q: what is 2 + 2?\nA: it is 4",
    "Question: add 12 and 30\nAnswer: 42",
    "the sum of 7 and 8 is 15",
    "A:\n2 A: 3",
]
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
KINDS = ("byte-level", "sentencepiece", "metaspace", "lowercase")
"""As in Llama 3; in Llama 2, the blank in front put by the normalizer; in later ones, by the pre-tokenizer at the
beginning alone; with a normalizer that changes the text's length."""


@functools.cache
def backend_of(kind: str, *, adds_bos: bool = True) -> Tokenizer:
    """A tokenizer with byte-pair merges over ``TEXT``; do not change it."""
    special = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256) if kind in ("sentencepiece", "metaspace"))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=len(special) > 3, unk_token=UNK))
    alphabet: list[str] = []
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if kind == "sentencepiece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(blanks)
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(blanks)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "lowercase":
        parts = [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace("...", "…"),
        ]
        tokenizer.normalizer = normalizers.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    if adds_bos:
        ends = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
        trims = processors.ByteLevel(trim_offsets=True)
        tokenizer.post_processor = processors.Sequence([trims, ends]) if alphabet else ends
    return tokenizer


@functools.cache
def tokenizer_of(kind: str, *, adds_bos: bool = True) -> Any:
    """The same as a fast tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(backend_of(kind, adds_bos=adds_bos).to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token=UNK)


@functools.cache
def folder_of(kind: str) -> str:
    """A saved random Llama with this tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tempfile.mkdtemp(prefix=f"tiny-{kind}-")
    tokenizer = tokenizer_of(kind)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # at their initial size all tokens are nearly as likely
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
