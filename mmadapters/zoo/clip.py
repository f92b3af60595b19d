"""`nano/clip`: `open_clip.CLIP`, the same weights as HF's `CLIPModel`, its tokenizer, its check.

Shape legend: N images or texts, L tokens of a text, E width of the shared space, C classes.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.tasks.data.synthetic import scenes
from mmadapters.tasks.zoo import photos as _photos
from mmadapters.tasks.zoo.figure import Figure

from ..files import write_text
from .files import read_config, read_weights

if TYPE_CHECKING:
    from open_clip import CLIP
    from torch import Tensor, nn
    from transformers import CLIPModel, PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
PAD, START, END = "<pad>", "<start>", "<end>"
TEMPLATES = (
    "a photo of a {}",
    "a small photo of a {}",
    "a blurry photo of the {}",
    "a close-up photo of a {}",
    "a picture of the {}",
    "{}",
)
GALLERY = 1_000  # drawn scenes among which one is retrieved; seeds are the first of TEST_SEEDS


def load(directory: Path, library: str, **kwargs: Any) -> "nn.Module":
    """The encoder of a directory as the class of `library` ("open_clip" or "hf")."""
    architecture = read_config(directory)["architecture"]
    weights = read_weights(directory)
    if library == "hf":
        return _to_hf(weights, architecture, **kwargs)
    model = build(**architecture | kwargs)
    model.load_state_dict(weights)
    return model.eval()


def build(**architecture: Any) -> "CLIP":
    """open_clip's network with random weights.

    GELU and LayerNorm's epsilon are HF's; the end token has the highest id, so that open_clip's
    pooling (argmax) and HF's (first end token) read the same position.
    """
    import open_clip

    return open_clip.CLIP(quick_gelu=False, **architecture)


def load_tokenizer(directory: Path, library: str) -> Callable[..., Any]:
    """`PreTrainedTokenizerFast` ("hf") or open_clip's callable over the same file."""
    if library == "hf":
        return _hf_tokenizer(directory)
    from open_clip.tokenizer import HFTokenizer

    length = read_config(directory)["tokenizer"]["context_length"]
    return HFTokenizer(str(directory), context_length=length)


def write_tokenizer_config(directory: Path, *, context_length: int) -> None:
    """Say what `tokenizer.json` is to `AutoTokenizer`, through which open_clip loads it."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "pad_token": PAD,
        "bos_token": START,
        "eos_token": END,
    }
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _hf_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / TOKENIZER),
        model_max_length=read_config(directory)["tokenizer"]["context_length"],
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
    )


def _to_hf(
    weights: "dict[str, Tensor]", architecture: dict[str, Any], **kwargs: Any
) -> "CLIPModel":
    from transformers import CLIPConfig, CLIPModel

    from .huggingface import from_tensors

    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    width = vision["width"]
    config = CLIPConfig(
        vision_config=common
        | {
            "hidden_size": width,
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": width // vision["head_width"],
            "intermediate_size": 4 * width,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config=common
        | {
            "hidden_size": text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "intermediate_size": 4 * text["width"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "pad_token_id": 0,
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
        },
        projection_dim=architecture["embed_dim"],
        **kwargs,
    )
    tensors = {
        "logit_scale": weights["logit_scale"],
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "text_projection.weight": weights["text_projection"].T.contiguous(),
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
        "visual_projection.weight": weights["visual.proj"].T.contiguous(),
    }
    for ours, theirs in _HF_NORMS.items():
        _copy(weights, tensors, ours, theirs)
    _tower_to_hf(weights, tensors, "visual.transformer", "vision_model", vision["layers"])
    _tower_to_hf(weights, tensors, "transformer", "text_model", text["layers"])
    return from_tensors(CLIPModel, config, tensors=tensors)


_HF_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # HF's spelling
    "visual.ln_post": "vision_model.post_layernorm",
}
_HF_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _tower_to_hf(
    weights: "dict[str, Tensor]", into: "dict[str, Tensor]", tower: str, model: str, layers: int
) -> None:
    for index in range(layers):
        ours, theirs = f"{tower}.resblocks.{index}", f"{model}.encoder.layers.{index}"
        for ours_part, theirs_part in _HF_PARTS.items():
            _copy(weights, into, f"{ours}.{ours_part}", f"{theirs}.{theirs_part}")
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                into[f"{theirs}.self_attn.{name}.{kind}"] = part


def _copy(weights: "dict[str, Tensor]", into: "dict[str, Tensor]", ours: str, theirs: str) -> None:
    for kind in ("weight", "bias"):
        into[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]


def encode_images(model: "CLIP", images: "Tensor", *, image: dict[str, Any]) -> "Tensor":
    """Unit vectors (N, E) of (N, 3, S, S) uint8 images."""
    import torch

    with torch.inference_mode():
        batches = (_photos.normalise(batch, image) for batch in images.split(500))
        return torch.cat([model.encode_image(batch, normalize=True) for batch in batches])


def class_vectors(
    model: "CLIP", tokenize: Callable[[list[str]], "Tensor"], names: Sequence[str]
) -> "Tensor":
    """Unit vectors (C, E) of the class names, averaged over `TEMPLATES`."""
    import torch
    from torch.nn import functional as F

    with torch.inference_mode():
        vectors = [
            model.encode_text(tokenize([template.format(name) for name in names]), normalize=True)
            for template in TEMPLATES
        ]
    return F.normalize(torch.stack(vectors).mean(dim=0), dim=-1)


def scene_recall(
    model: "CLIP",
    tokenize: Callable[[list[str]], "Tensor"],
    *,
    image: dict[str, Any],
    seeds: range = scenes.TEST_SEEDS,
    vocabulary: scenes.Vocabulary = scenes.PRETRAINING,
) -> dict[str, float]:
    """Text→image R@1 and R@5 among the first `GALLERY` drawn scenes of `seeds`, a caption each."""
    import torch

    device = model.logit_scale.device
    drawn = [scenes.make_scene(seed, vocabulary) for seed in seeds[:GALLERY]]
    captions = [scenes.describe(scene, vocabulary) for scene in drawn]
    pictures, _ = scenes.render(drawn, vocabulary, size=image["size"], device=device)
    with torch.inference_mode():
        texts = model.encode_text(tokenize(captions), normalize=True)  # (N, E)
    scores = texts @ encode_images(model, pictures, image=image).T
    rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
    return {f"R@{k}": (rank < k).double().mean().item() for k in (1, 5)}


def zero_shot(
    model: "CLIP",
    tokenize: Callable[[list[str]], "Tensor"],
    *,
    photos: "tuple[Tensor, Tensor]",
    names: Sequence[str],
    image: dict[str, Any],
) -> float:
    """Top-1 of (images, labels) over the class names alone."""
    images, labels = photos
    logits = encode_images(model, images, image=image) @ class_vectors(model, tokenize, names).T
    return (logits.argmax(dim=1) == labels).double().mean().item()


def verify(directory: Path, data: Path | None) -> list[Figure]:
    """Recall among the drawn test scenes, and zero-shot accuracy where the photographs are."""
    config = read_config(directory)
    model, tokenize = load(directory, "open_clip"), load_tokenizer(directory, "open_clip")
    figures = config["figures"]
    recall = scene_recall(model, tokenize, image=config["image"])["R@1"]
    folder = _photos.find_photos(data)
    top1, note = None, f"no folder {_photos.FOLDER} with photographs in the data folder"
    if folder is not None:
        photos = _photos.read_photos(folder, "validation")
        names = _photos.class_names(folder)
        top1 = zero_shot(model, tokenize, photos=photos, names=names, image=config["image"])
        note = f"{len(photos[1])} photographs"
    return [
        Figure.of_card(figures["scene_recall"], recall, f"{GALLERY} drawn scenes"),
        Figure.of_card(figures["zero_shot"], top1, note),
    ]
