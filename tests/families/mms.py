"""A small model of MMS on disk: a trunk, a file of adapters and head for each language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from . import seeded
from .speech import SMALL, STABLE

LETTERS = {"eng": "abcdefgh", "fra": "abcdefghijé", "deu": "abcäö"}


def characters(language: str) -> dict[str, int]:
    """The vocabulary of a language: its head has a unit for each."""
    return {"<pad>": 0, "|": 1, **{c: i for i, c in enumerate(LETTERS[language], 2)}}


def write_mms(folder: Path) -> Path:
    """Writes model, languages and tokenizer; the model itself speaks English."""
    options: dict[str, Any] = {**SMALL, **STABLE, "layerdrop": 0.0, "adapter_attn_dim": 4}
    options["vocab_size"] = len(characters("eng"))
    config = transformers.Wav2Vec2Config(**options)
    model = seeded(lambda: transformers.Wav2Vec2ForCTC(config))
    model.save_pretrained(folder)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(2)
    for language in LETTERS:
        size = len(characters(language))
        tensors = {
            name: torch.randn(parameter.shape, generator=generator)
            for name, parameter in model.named_parameters()
            if "adapter_layer" in name
        }
        tensors["lm_head.weight"] = torch.randn(size, 32, generator=generator)
        tensors["lm_head.bias"] = torch.randn(size, generator=generator)
        save_file(tensors, folder / f"adapter.{language}.safetensors")
    vocabulary = {language: characters(language) for language in LETTERS}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), bos_token=None, eos_token=None, target_lang="eng"
    )
    transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(), tokenizer
    ).save_pretrained(folder)
    return folder
