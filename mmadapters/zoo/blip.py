"""`nano/blip-retrieval` and `nano/blip-caption`: BLIP of transformers in two classes, its check.

One file holds what both share: the vision blocks that differ from `nano/vit`'s, a text encoder, and
of the decoder what is not the encoder's. The tokenizer is `nano/clip`'s.

Shape legend: N images or texts, T image tokens, D width, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.tasks.data.synthetic import scenes
from mmadapters.tasks.zoo import photos
from mmadapters.tasks.zoo.figure import Figure

from . import clip
from .files import read_config, read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import BlipConfig, PreTrainedTokenizerFast

VIT, CLIP = (Path(__file__).parent / name for name in ("vit", "clip"))
CLASSES = {
    "retrieval": "BlipForImageTextRetrieval",
    "caption": "BlipForConditionalGeneration",
}
GALLERY = 1_000  # drawn scenes among which one is retrieved, and which are described
RERANKED = 16  # images of a text that are matched with it
WORDINGS = 5  # reference captions of a scene
MATCHING = ("text_encoder.", "vision_proj.", "text_proj.", "itm_head.")  # beside the vision tower


def load(directory: Path, library: str, *, kind: str, **kwargs: Any) -> nn.Module:
    """The encoder of a directory as the class of `kind` ("retrieval" or "caption")."""
    return build(read_config(directory)["architecture"], read_weights(directory), kind, **kwargs)


def load_tokenizer(directory: Path, library: str) -> PreTrainedTokenizerFast:
    """`nano/clip`'s; [DEC] and [ENC] follow its last id."""
    return clip.load_tokenizer(CLIP, library)  # type: ignore[return-value]


def build(
    architecture: dict[str, Any], weights: dict[str, Tensor], kind: str, **kwargs: Any
) -> nn.Module:
    """The class of `kind` with `weights` as a file holds them."""
    import transformers

    from .huggingface import from_tensors

    tensors = vision_tensors(read_weights(VIT))
    tensors |= {key: value for key, value in weights.items() if key in tensors}
    if kind == "retrieval":
        tensors |= {key: value for key, value in weights.items() if key.startswith(MATCHING)}
    else:
        tensors |= decoder_tensors(weights)
    cls = getattr(transformers, CLASSES[kind])
    return from_tensors(cls, config_of(architecture, **kwargs), tensors=tensors)


def config_of(architecture: dict[str, Any], **kwargs: Any) -> BlipConfig:
    """BLIP's config; [DEC] and [ENC] are the last two ids, [SEP] is the tokenizer's end."""
    from transformers import BlipConfig

    vocabulary = architecture["text_config"]["vocab_size"]
    special = {"bos_token_id": vocabulary - 2, "sep_token_id": vocabulary - 3, "pad_token_id": 0}
    special["eos_token_id"] = special["sep_token_id"]
    return BlipConfig(
        vision_config=architecture["vision_config"],
        text_config=architecture["text_config"] | special,
        projection_dim=architecture["embed_dim"],
        image_text_hidden_size=architecture["embed_dim"],
        **kwargs,
    )


def vision_tensors(vit: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of timm's ViT under the names of BLIP's vision tower; the function is the same."""
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    tensors = {}
    for key, value in vit.items():
        part, dot, leaf = (key, "", "") if key in names else key.rpartition(".")
        block = ""
        if part.startswith("blocks."):
            _, number, part = part.split(".", 2)
            block = f"encoder.layers.{number}."
        tensors[f"vision_model.{block}{names[part]}{dot}{leaf}"] = value
    return tensors


def decoder_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of the decoder: its own self-attention and output, the rest is the encoder's."""
    decoder = "text_decoder."
    tensors = {
        f"{decoder}bert.{key.removeprefix('text_encoder.')}": value
        for key, value in weights.items()
        if key.startswith("text_encoder.")
    }
    tensors |= {key: value for key, value in weights.items() if key.startswith(decoder)}
    head = f"{decoder}cls.predictions."
    tensors[f"{head}decoder.weight"] = weights["text_encoder.embeddings.word_embeddings.weight"]
    tensors[f"{head}decoder.bias"] = weights[f"{head}bias"]
    return tensors


def is_shared(name: str) -> bool:
    """Whether the decoder's BERT has this parameter from the encoder: all but self-attention."""
    return ".attention." not in name


def drawn(
    seeds: range, *, size: int, vocabulary: scenes.Vocabulary = scenes.PRETRAINING
) -> tuple[Tensor, list[list[str]]]:
    """The first `GALLERY` scenes of `seeds`: pictures (N, 3, S, S) uint8, and `WORDINGS` captions
    of each."""
    made = [scenes.make_scene(seed, vocabulary) for seed in seeds[:GALLERY]]
    captions = [scenes.wordings(scene, vocabulary, range(WORDINGS), of=WORDINGS) for scene in made]
    return scenes.render(made, vocabulary, size=size)[0], captions


def image_tokens(model: Any, pictures: Tensor, *, image: dict[str, Any]) -> Tensor:
    """(N, 3, S, S) uint8 -> (N, T, D)."""
    import torch

    with torch.inference_mode():
        return torch.cat(
            [
                model.vision_model(
                    pixel_values=photos.normalise(batch, image), return_dict=True
                ).last_hidden_state
                for batch in pictures.split(250)
            ]
        )


def recall(model: nn.Module, states: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Text→image R@1 among N images, by embeddings and after matching the best `RERANKED`.

    Args:
        states: (N, T, D) of `image_tokens`.
        captions: one of each image.
    """
    import torch

    import mmadapters
    from mmadapters.tasks.encoders.blip import BlipMatcher, BlipTokenizer
    from mmadapters.tasks.retrieval.metrics import candidates

    matcher = BlipMatcher(mmadapters.init(model))
    tokenizer = BlipTokenizer(clip.load_tokenizer(CLIP, "hf"), matcher.tokens)
    with torch.inference_mode():
        images = torch.nn.functional.normalize(matcher.images_of(states), dim=-1)
        texts = torch.nn.functional.normalize(matcher.texts(tokenizer(captions)), dim=-1)
        _, best = candidates(texts, images, RERANKED)
        tokens = tokenizer.with_image(captions)
        matched = torch.cat(
            [
                matcher.match(
                    states[some].flatten(0, 1), part.repeat_interleave(some.shape[1], dim=0)
                )[:, 1].view(some.shape)
                for some, part in zip(best.split(50), tokens.split(50), strict=True)
            ]
        )
    own = torch.arange(len(texts), device=best.device)
    first = best.gather(1, matched.argmax(dim=1, keepdim=True))[:, 0]
    return {
        "embeddings": (best[:, 0] == own).double().mean().item(),
        "matching": (first == own).double().mean().item(),
    }


def describe(model: nn.Module, states: Tensor) -> list[str]:
    """A caption of each image (N, T, D), written greedily."""
    import torch

    import mmadapters
    from mmadapters.tasks.encoders.blip import BlipTokenizer
    from mmadapters.tasks.encoders.blip_captioner import BlipCaptioner

    captioner = BlipCaptioner(mmadapters.init(model))
    tokenizer = BlipTokenizer(clip.load_tokenizer(CLIP, "hf"), captioner.tokens)
    start = torch.tensor([captioner.tokens.start])
    with torch.inference_mode():
        written = [
            tokenizer.decode(captioner.generate(part, start, max_tokens=45))
            for part in states.split(250)
        ]
    return [text.strip() for texts in written for text in texts]


def caption_score(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, of at most 10."""
    from mmadapters.tasks.captioning.cider import cider

    found = cider([text.split() for text in written], [[t.split() for t in r] for r in references])
    return float(found.mean())


def verify(directory: Path, data: Path | None, *, kind: str) -> list[Figure]:
    """Recall among the drawn test scenes ("retrieval"), or CIDEr of their captions ("caption")."""
    config = read_config(directory)
    model = load(directory, "hf", kind=kind)
    pictures, captions = drawn(scenes.TEST_SEEDS, size=config["image"]["size"])
    states = image_tokens(model, pictures, image=config["image"])
    if kind == "retrieval":
        measured = recall(model, states, [texts[0] for texts in captions])
        found = {"scene_recall": measured["embeddings"], "scene_matching": measured["matching"]}
    else:
        found = {"scene_cider": caption_score(describe(model, states), captions)}
    note = f"{len(pictures)} drawn scenes"
    return [Figure.of_card(config["figures"][key], value, note) for key, value in found.items()]
