"""Languages of MMS (Pratap et al. 2023): small adapters in the blocks of one speech encoder.

A model of transformers with `adapter_attn_dim` has them. Its directory, or its repository on a hub,
has a file `adapter.LANGUAGE.safetensors` for each language, with a CTC head for its characters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..suggest import nearest
from .download import download
from .weights import first_few, read_weights

_LANGUAGE = re.compile(r"[A-Za-z0-9_-]+")
_HEAD = "lm_head."


def speak(model: nn.Module, source: str, language: str) -> None:
    """Gives a model of MMS the adapters of a language, and its CTC head if the model has one.

    `load_adapter` of transformers does this for models with a head, and would also read a pickle.

    Args:
        source: the directory or hub name of the model.
        language: the code in the name of the file, such as "fra".

    Raises:
        ValueError: the model has no language adapters, there is no safetensors file for the
            language, or the file does not fit. The model is unchanged then.
        RuntimeError: the file must be downloaded and no hub can be reached.
    """
    config: Any = model.config
    if getattr(config, "adapter_attn_dim", None) is None:
        raise ValueError(
            f"hf/{source} has no language adapters (adapter_attn_dim in its config): leave "
            "target_lang out"
        )
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        raise ValueError(f"target_lang is a code of a language such as 'fra', not {language!r}")
    path = _file(source, language)
    state = read_weights(path)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    places = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".adapter_layer." in f".{name}"
    }
    if any(name.startswith(prefix) for name in places):
        prefix = ""
    tensors = {key.removeprefix(prefix): t for key, t in state.items() if ".adapter_layer." in key}
    wrong = [
        *(name for name in places if name not in tensors),
        *(name for name in tensors if name not in places),
        *(n for n, t in tensors.items() if n in places and t.shape != places[n].shape),
    ]
    if wrong:
        raise ValueError(f"{str(path)!r} does not fit hf/{source}: {first_few(wrong)}")
    head = getattr(model, "lm_head", None)
    fresh = None if head is None else _head(head, state, path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    if fresh is not None:
        model.lm_head = fresh
        config.vocab_size = fresh.out_features
    model.target_lang = language  # type: ignore[assignment]


def _file(source: str, language: str) -> Path:
    """Returns the path of a language's file, downloaded if the source is no directory."""
    name = f"adapter.{language}.safetensors"
    if not Path(source).is_dir():
        from transformers.utils import cached_file

        if "/" not in source:
            raise ValueError(
                f"hf/{source} names an architecture without languages: give a hub name, such as "
                "hf/facebook/mms-1b-all, or a local directory"
            )
        return Path(download(lambda: cached_file(source, name), f"hf/{source} ({name})"))
    path = Path(source) / name
    if path.is_file():
        return path
    if path.with_suffix(".bin").is_file():
        raise ValueError(
            f"{source} has {path.with_suffix('.bin').name}, a pickle, which is never loaded: "
            f"convert it to {name}"
        )
    there = sorted(file.name.split(".")[1] for file in Path(source).glob("adapter.*.safetensors"))
    raise ValueError(
        f"{source} has no {name}{nearest(language, there)}; it has files for "
        f"{', '.join(there) or 'no language'}"
    )


def _head(old: nn.Linear, state: dict[str, Tensor], path: Path) -> nn.Linear:
    """Returns the head of a language, like an older one but for the number of characters."""
    tensors = {k.removeprefix(_HEAD): t for k, t in state.items() if k.startswith(_HEAD)}
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2 or weight.shape[1] != old.in_features:
        raise ValueError(f"{str(path)!r} has no head for states of width {old.in_features}")
    head = nn.Linear(
        old.in_features, len(weight), bias=old.bias is not None, dtype=old.weight.dtype
    )
    try:
        head.load_state_dict(tensors)
    except RuntimeError:
        raise ValueError(f"the head in {str(path)!r} does not fit: {first_few(tensors)}") from None
    return head.to(old.weight.device)
