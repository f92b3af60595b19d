"""Small BLIP models: 32×32 pictures in 16 patches, texts of 5 tokens."""

from typing import Any

import torch
import transformers
from torch import nn

from . import Family, seeded

VOCABULARY = 40


def config() -> transformers.BlipConfig:
    width = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        # The image encoder's default of 1e-10 would leave it without any effect.
        "initializer_range": 0.1,
    }
    text = {
        **width,
        "vocab_size": VOCABULARY,
        "encoder_hidden_size": 32,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    }
    return transformers.BlipConfig(
        text_config=text,
        vision_config={**width, "image_size": 32, "patch_size": 8},
        image_text_hidden_size=16,
        projection_dim=16,
    )


def pairs() -> tuple[tuple, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return (), {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(8, VOCABULARY, (2, 5), generator=generator),
    }


def questions() -> tuple[tuple, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    answers = torch.randint(8, VOCABULARY, (2, 3), generator=generator)
    _, inputs = pairs()
    # Without decoder_input_ids the labels would stand for them, and −100 is no token.
    return (), {**inputs, "decoder_input_ids": answers, "labels": answers}


def hf_blip_retrieval() -> nn.Module:
    return seeded(lambda: transformers.BlipForImageTextRetrieval(config()))


def hf_blip_vqa() -> nn.Module:
    return seeded(lambda: transformers.BlipForQuestionAnswering(config()))


def hf_blip_caption() -> nn.Module:
    return seeded(lambda: transformers.BlipForConditionalGeneration(config()))


FAMILIES = [
    Family("hf-blip-retrieval", hf_blip_retrieval, pairs, frozenset({"prompt"})),
    Family("hf-blip-vqa", hf_blip_vqa, questions, frozenset({"prompt"})),
    Family("hf-blip-caption", hf_blip_caption, pairs, frozenset({"prompt"})),
]
