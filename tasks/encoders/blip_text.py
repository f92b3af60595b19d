"""The texts of BLIP: special tokens, tokenizer and masks.

Shape legend: B texts, L tokens of a text, M answers, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from mmadapters.errors import first_line

from ..config.schema import BackboneConfig


@dataclass(frozen=True)
class BlipTokens:
    """The special tokens and limits of a BLIP's text models.

    Attributes:
        context_length: most tokens of a text.
        vocabulary: number of tokens of the vocabulary.
        pad: id of padding.
        start: id of [DEC], which begins a text that the decoder writes.
        end: id of [SEP], which ends a text.
        encode: id of [ENC], which begins a text that is read with an image; None if the vocabulary
            has no such token, so that [CLS] begins it.
    """

    context_length: int
    vocabulary: int
    pad: int
    start: int
    end: int
    encode: int | None

    @classmethod
    def of(cls, backbone: nn.Module) -> BlipTokens:
        """Reads the tokens from the encoder's config.

        BLIP appends [DEC] and [ENC] to BERT's tokens. It was trained with [ENC] in place of [CLS]
        before questions and before texts to match (salesforce/BLIP, models/blip_vqa.py). The
        config of transformers names only [DEC], as its `bos_token_id`.
        """
        text: Any = backbone.config.text_config  # type: ignore[union-attr]
        appended = text.bos_token_id + 2 == text.vocab_size
        return cls(
            context_length=text.max_position_embeddings,
            vocabulary=text.vocab_size,
            pad=text.pad_token_id,
            start=text.bos_token_id,
            end=text.sep_token_id,
            encode=text.vocab_size - 1 if appended else None,
        )

    def to_dict(self) -> dict[str, int | None]:
        """Returns the JSON-ready fields."""
        return asdict(self)


class BlipTokenizer:
    """Turns texts into token ids, padded to the longest text of the call.

    Args:
        source: a tokenizer of transformers. tokens: special tokens and limits of the encoder.
        length: most tokens of a text; longer texts are cut. None means the encoder's context
        length.
    """

    def __init__(self, source: Any, tokens: BlipTokens, *, length: int | None = None) -> None:
        self.source = source
        self.tokens = tokens
        self.length = min(length or tokens.context_length, tokens.context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns (B, L) int64: [CLS] text [SEP]."""
        ids = self.source(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids
        # The tokenizer's own padding token may have another id than the config's.
        if self.source.pad_token_id != self.tokens.pad:
            ids = ids.masked_fill(ids == self.source.pad_token_id, self.tokens.pad)
        return ids

    def with_image(self, texts: Sequence[str]) -> Tensor:
        """Returns (B, L) int64 of texts that are read with an image: [ENC] text [SEP]."""
        return self._starting_with(texts, self.tokens.encode)

    def answers(self, texts: Sequence[str]) -> Tensor:
        """Returns (M, T) int64 of texts that the decoder writes: [DEC] text [SEP]."""
        return self._starting_with(texts, self.tokens.start)

    def _starting_with(self, texts: Sequence[str], first: int | None) -> Tensor:
        ids = self(texts)
        if first is not None:
            ids[:, 0] = first
        return ids

    def count(self, text: str) -> int:
        """Returns the number of tokens of the uncut text, with start and end."""
        return len(self.source(text, verbose=False).input_ids)

    def decode(self, ids: Tensor) -> list[str]:
        """Decodes ids (M, T) of the decoder to texts without special tokens."""
        special = {self.tokens.pad, self.tokens.start, self.tokens.end, self.tokens.encode}
        plain = [[token for token in row if token not in special] for row in ids.tolist()]
        return [
            self.source.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=True)
            for row in plain
        ]


def blip_tokenizer(
    config: BackboneConfig, tokens: BlipTokens, *, length: int | None = None
) -> BlipTokenizer:
    """Loads the tokenizer of a backbone.

    It is that of `config.processor`, of the hub name or folder in the backbone's name, or of a nano
    encoder.

    Args:
        tokens: special tokens and limits of the encoder.
        length: see `BlipTokenizer`.

    Raises:
        ValueError: no tokenizer is known or can be loaded, or it does not fit the encoder.
    """
    from transformers import AutoTokenizer

    library, _, name = config.name.partition("/")
    if config.processor is None and library == "nano":
        from mmadapters.zoo import load_tokenizer

        return BlipTokenizer(load_tokenizer(config.name, library="hf"), tokens, length=length)
    if config.processor is None and (library != "hf" or "/" not in name):
        raise ValueError(
            f"the tokenizer of {config.name!r} is not known: set backbone.processor to the "
            "folder or hub name of one (Salesforce/blip-vqa-base)"
        )
    place = config.processor or name
    try:
        source = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(
            f"no tokenizer could be loaded from {place!r} (backbone.processor names another): "
            f"{reason}"
        ) from error
    if len(source) > tokens.vocabulary:
        raise ValueError(
            f"the tokenizer {place!r} has {len(source)} tokens and the encoder only "
            f"{tokens.vocabulary}: set backbone.processor to the one that it was trained with"
        )
    return BlipTokenizer(source, tokens, length=length)


def token_mask(tokens: Tensor, special: BlipTokens) -> Tensor:
    """Returns the mask (B, L) int64 of ids (B, L): 0 for padding, else 1."""
    return (tokens != special.pad).long()
