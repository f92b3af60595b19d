"""Small text encoders."""

from typing import Any

import torch
import transformers
from torch import nn

from . import Family, seeded

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


def tokens() -> tuple[tuple, dict[str, Any]]:
    """Two texts of 6 tokens, the second padded by two."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(8, VOCABULARY, (2, 6), generator=generator)
    return (), {"input_ids": ids, "attention_mask": mask}


def hf_bert() -> nn.Module:
    return seeded(lambda: transformers.BertModel(transformers.BertConfig(**SMALL)))


def hf_roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SMALL)
    return seeded(lambda: transformers.RobertaForSequenceClassification(config))


def hf_t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )
    return seeded(lambda: transformers.T5EncoderModel(config))


FAMILIES = [
    Family("hf-bert", hf_bert, tokens, frozenset({"prefix"})),
    Family("hf-roberta", hf_roberta, tokens, frozenset({"prefix"})),
    Family("hf-t5", hf_t5, tokens),
]
