"""The CTC head and the vocabulary with which an encoder was published."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from mmadapters.backbones.languages import speak
from mmadapters.errors import first_line

from ..config.schema import BackboneConfig
from .text import DELIMITER, PAD, Vocabulary


def own_head(config: BackboneConfig, backbone: Any) -> nn.Linear:
    """Returns a trainable copy of the CTC head with which the encoder was published.

    Raises:
        ValueError: the encoder has no CTC head.
    """
    if config.name == "nano/wav2vec2":
        from mmadapters.zoo import NANO, wav2vec2

        head = wav2vec2.load_ctc(NANO[config.name].directory).lm_head
    else:
        inner = getattr(backbone, "model", backbone)
        head = getattr(backbone, "lm_head", None) or getattr(inner, "aux", None)
        if head is None and config.name.startswith("hf/") and config.pretrained:
            head = _hub_head(config.name.removeprefix("hf/"), _language(config))
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{config.name} has no CTC head of its own: set head.init to fresh, or name a model "
            "with one (nano/wav2vec2, a hub model for CTC, a torchaudio ASR bundle)"
        )
    copy = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    with torch.no_grad():
        copy.load_state_dict(head.state_dict())
    return copy


def _language(config: BackboneConfig) -> str | None:
    """Returns the language of MMS that the encoder speaks; None for other encoders."""
    return config.options.get("target_lang")


def _hub_head(name: str, language: str | None) -> nn.Linear | None:
    """Returns the head of a hub model or a folder, or None if its weights have none."""
    from transformers import AutoModelForCTC

    try:
        model, info = AutoModelForCTC.from_pretrained(name, output_loading_info=True)
    except ValueError:  # the architecture has no CTC head
        return None
    if language is not None:
        speak(model, name, language)
        return model.lm_head
    return None if any("lm_head" in key for key in info["missing_keys"]) else model.lm_head


def own_vocabulary(config: BackboneConfig, backbone: Any) -> Vocabulary:
    """Returns the characters of the head that `own_head` copies, with the blank.

    Raises:
        ValueError: the encoder does not name its characters.
    """
    if config.name == "nano/wav2vec2":
        from mmadapters.zoo import NANO

        table = json.loads((NANO[config.name].directory / "vocab.json").read_text("utf-8"))
        return Vocabulary(tuple(sorted(table, key=table.get)), table[PAD])
    library, _, name = config.name.partition("/")
    if library == "torchaudio":
        return _of_bundle(name)
    if library != "hf" or (config.processor is None and not config.pretrained):
        raise ValueError(
            f"{config.name} does not name the characters of its head: name a tokenizer in "
            "backbone.processor"
        )
    # Ids of the head that the tokenizer does not name are never part of a text.
    tokens = [f"<{i}>" for i in range(own_head(config, backbone).out_features)]
    special = set(range(len(tokens)))
    tokenizer = _tokenizer(config.processor or name, _language(config))
    spaced = hasattr(tokenizer, "phone_delimiter_token")
    if spaced:  # the attribute of a tokenizer of phonemes complains of a sign that is not set
        delimiter = tokenizer.init_kwargs.get("word_delimiter_token")
    else:
        delimiter = tokenizer.word_delimiter_token
    hidden = set(tokenizer.all_special_tokens) - {delimiter}
    # Tokens that were added for one language may have ids of characters of another, which count.
    for token, index in (*tokenizer.get_vocab().items(), *tokenizer.encoder.items()):
        # Tokens that were added after the head's characters (<s>, </s>) are not in the head.
        if index < len(tokens):
            tokens[index] = DELIMITER if token == delimiter else token
            if token not in hidden:
                special.discard(index)
    return Vocabulary(
        tuple(tokens), tokenizer.pad_token_id, special=tuple(sorted(special)), spaced=spaced
    )


def _tokenizer(name: str, language: str | None) -> Any:
    from transformers import AutoTokenizer

    options = {} if language is None else {"target_lang": language}
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except ImportError:  # one of phonemes wants a package that turns words into phonemes
            tokenizer = AutoTokenizer.from_pretrained(name, do_phonemize=False, **options)
    except KeyError as error:
        raise ValueError(f"backbone.processor: {name} has no characters of {error}") from error
    except (OSError, ValueError) as error:
        line = first_line(error)
        raise ValueError(f"backbone.processor: {name} has no tokenizer: {line}") from error
    if not hasattr(type(tokenizer), "word_delimiter_token"):
        raise ValueError(f"backbone.processor: the tokenizer of {name} is not one for CTC")
    return tokenizer


def _of_bundle(name: str) -> Vocabulary:
    import torchaudio

    bundle: Any = getattr(torchaudio.pipelines, name, None)
    if not hasattr(bundle, "get_labels"):
        raise ValueError(f"torchaudio/{name} has no labels: set head.init to fresh")
    blank, *others = bundle.get_labels()
    return Vocabulary((PAD if blank == "-" else blank, *others))
