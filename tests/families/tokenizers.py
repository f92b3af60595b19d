"""Tokenizers of whole words, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[DEC]", "[SEP]", "[CLS]", "[UNK]")


def word_tokenizer(folder: Path, words: Sequence[str]) -> Path:
    """Ids 0 to 4 are `SPECIAL`, as the small BLIP's config has them, then come the words.

    A text is [CLS] words [SEP]; words are what stands between spaces and punctuation.
    """
    ids = {token: number for number, token in enumerate([*SPECIAL, *words])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        unk_token="[UNK]",
    ).save_pretrained(folder)
    return folder
