"""Image-text encoders of open_clip and transformers as two towers with one interface.

Adapters act in all that is read here, token states included: everything goes through the encoder's
own functions, and states are taken from its last block as it runs.

Shape legend: B images or texts, N image tokens, L text tokens, E width of the shared space,
D width of a tower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmadapters import AdapterModel
from mmadapters.sites.sitemap import Tower

from ..config.schema import BackboneConfig
from ..core.errors import first_line

_OPEN_CLIP = ("CLIP", "CustomTextCLIP", "CoCa")
_TRANSFORMERS = ("CLIPModel", "SiglipModel")
OF_OPEN_CLIP = 77  # tokens of a text, where its configs do not say otherwise


class ClipTowers:
    """Embeddings and token states of a CLIP, CustomTextCLIP or CoCa of open_clip, or of a CLIPModel
    or SiglipModel of transformers. Holds no parameters of its own.

    Attributes:
        width: E.
        image_width, text_width: D of the token states.
        logit_scale: the encoder's own parameter, the logarithm of the inverse temperature.
        logit_bias: SigLIP's bias of the logits, None without one.

    Raises:
        ValueError: the encoder is not one of these.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        self.encoder = encoder
        backbone: Any = encoder.backbone
        self._native = _is_open_clip(backbone)
        self.width: int = _width(backbone, self._native)
        self.image_width = encoder.sites.towers["vision"].width
        self.text_width = encoder.sites.towers["text"].width

    @property
    def logit_scale(self) -> Tensor:
        backbone: Any = self.encoder.backbone
        return backbone.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return getattr(self.encoder.backbone, "logit_bias", None)

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E), projected, not of unit length."""
        if self._native:
            return self.encoder.encode_image(pixels, normalize=False)
        return _features(self.encoder.get_image_features(pixel_values=pixels))

    def texts(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, E), projected, not of unit length."""
        if self._native:
            return self.encoder.encode_text(tokens, normalize=False)
        # No mask: CLIP's is causal, and SigLIP was trained to read its padding.
        return _features(self.encoder.get_text_features(input_ids=tokens))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D): the last block's states, normed, a class token first."""
        tower = self.encoder.sites.towers["vision"]
        states = _last_states(tower, lambda: self.images(pixels))
        visual = getattr(self.encoder.backbone, "visual", None)
        if getattr(visual, "attn_pool", None) is not None:
            return states  # the norm behind an attentional pooler is of what the pooler gives
        return _normed(tower, states)

    def text_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) int64 -> the last block's states (B, L, D), normed, and which are text (B, L).

        The mask is True up to the end token, start and end included.
        """
        tower = self.encoder.sites.towers["text"]
        states = _last_states(tower, lambda: self.texts(tokens))
        states = states[:, : tokens.shape[1]]  # without the class token that CoCa appends
        return _normed(tower, states), text_mask(self.encoder.backbone, tokens)


def text_mask(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """(B, L) token ids -> (B, L), True where they are text, by the rule of the encoder."""
    if not _is_open_clip(backbone):
        config: Any = backbone.config
        if config.model_type == "clip":
            # As in transformers: 2 stands in old configs, where the end has the highest id.
            end = config.text_config.eos_token_id
            return _up_to(tokens.argmax(dim=1) if end == 2 else _first(tokens == end), tokens)
        return _up_to(_last_run(tokens), tokens)
    text: Any = getattr(backbone, "text", None)
    if hasattr(text, "config"):
        return tokens != text.config.pad_token_id
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return tokens != text.pad_id
    holder, prefix = (backbone, "text_") if text is None else (text, "")
    pooling = getattr(holder, f"{prefix}pool_type", "argmax")
    if pooling == "argmax":
        return _up_to(tokens.argmax(dim=1), tokens)
    if pooling == "eos":
        return _up_to(_first(tokens == getattr(holder, f"{prefix}eos_id")), tokens)
    return _up_to(_last_run(tokens), tokens)


def _up_to(last: Tensor, tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device) <= last[:, None]


def _first(found: Tensor) -> Tensor:
    """(B, L) bool -> (B,): the first True, the last position where there is none."""
    length = found.shape[1]
    return torch.where(found.any(dim=1), found.int().argmax(dim=1), length - 1)


def _last_run(tokens: Tensor) -> Tensor:
    """(B,): where the run of equal ids at the end begins: one end token, then padding like it."""
    same = (tokens == tokens[:, -1:]).flip(1).int()
    return tokens.shape[1] - same.cumprod(dim=1).sum(dim=1)


def _is_open_clip(backbone: nn.Module) -> bool:
    classes = [
        (kind.__name__, kind.__module__.partition(".")[0]) for kind in type(backbone).__mro__
    ]
    if any((name, "open_clip") in classes for name in _OPEN_CLIP):
        return True
    if any((name, "transformers") in classes for name in _TRANSFORMERS):
        return False
    raise ValueError(
        f"{type(backbone).__name__} is no image-text encoder with two towers; take nano/clip, a "
        "model of open_clip, or a CLIPModel or SiglipModel of transformers (hf/clip, hf/siglip)"
    )


def _width(backbone: Any, native: bool) -> int:
    if not native:
        text = backbone.config.text_config
        return getattr(text, "projection_size", None) or backbone.config.projection_dim
    if hasattr(backbone, "text"):
        return backbone.text.output_dim
    projection = backbone.text_projection
    if projection is None:
        return backbone.ln_final.normalized_shape[0]
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


def _features(output: Any) -> Tensor:
    """transformers 4 gives the projected features, transformers 5 an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _last_states(tower: Tower, run: Callable[[], Any]) -> Tensor:
    """What the tower's last block gives while `run` runs, after adapters and without prompts."""
    found: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == thread:
            found.append(output if isinstance(output, Tensor) else output[0])

    handle = tower.blocks[-1].module.register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return found[-1]


def _normed(tower: Tower, states: Tensor) -> Tensor:
    return states if tower.norm is None else tower.norm.module(states)


class Tokenizer:
    """Texts -> token ids (N, L) int64, cut and padded to the encoder's context length L.

    Args:
        source: what gives the ids: `open_clip.tokenizer.SimpleTokenizer` or `HFTokenizer`, or a
            tokenizer of transformers.
    """

    def __init__(self, source: Any, context_length: int) -> None:
        self.source = source
        self.context_length = context_length
        self._hf = hasattr(source, "pad_token_id")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        texts = list(texts)
        if not self._hf:
            return self.source(texts, context_length=self.context_length)
        return self.source(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        ).input_ids

    def count(self, text: str) -> int:
        """How many tokens the whole text has, start and end included; beyond L it is cut."""
        if self._hf:
            return len(self.source(text, verbose=False).input_ids)
        inner = getattr(self.source, "tokenizer", None)
        if inner is None:
            return len(self.source.encode(text)) + 2
        return len(inner(self.source.clean_fn(text), verbose=False).input_ids)


def tokenizer(config: BackboneConfig, backbone: nn.Module) -> Tokenizer:
    """The tokenizer of an image-text encoder: `config.processor`, or what its name says.

    Raises:
        ValueError: none is known or found, or it has more tokens than the encoder.
    """
    return load_tokenizer(config, **text_limits(backbone))


def text_limits(backbone: nn.Module) -> dict[str, int]:
    """`context_length` and `vocabulary` of an image-text encoder, JSON-ready."""
    if not _is_open_clip(backbone):
        config: Any = backbone.config
        text = config.text_config
        return {"context_length": text.max_position_embeddings, "vocabulary": text.vocab_size}
    holder: Any = getattr(backbone, "text", backbone)
    length = holder.context_length
    if hasattr(holder, "config"):
        length = min(length, OF_OPEN_CLIP)  # BERT could read 512, but was trained here with fewer
    return {"context_length": length, "vocabulary": holder.vocab_size}


def load_tokenizer(config: BackboneConfig, *, context_length: int, vocabulary: int) -> Tokenizer:
    """`tokenizer` where the encoder itself is not at hand, from its `text_limits`."""
    library, _, name = config.name.partition("/")
    if config.processor is not None:
        source = _from_transformers(config.processor)
    elif library == "nano":
        from mmadapters.zoo import load_tokenizer as of_zoo

        source = of_zoo(config.name)
    elif library == "open_clip":
        source = _from_open_clip(name)
    elif library == "hf" and "/" in name:
        source = _from_transformers(name)
    else:
        raise ValueError(
            f"nothing says which tokenizer {config.name!r} reads: set backbone.processor to the "
            "folder or hub name of one"
        )
    size = _size(source)
    if size > vocabulary:
        raise ValueError(
            f"the tokenizer {config.processor or config.name!r} has {size} tokens and the encoder "
            f"only {vocabulary}: set backbone.processor to the one that it was trained with"
        )
    return Tokenizer(source, context_length)


def _size(source: Any) -> int:
    inner = getattr(source, "tokenizer", source)
    return len(inner) if hasattr(inner, "__len__") else inner.vocab_size


def _from_transformers(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{_no_tokenizer(name)}: {first_line(error)}") from error


def _from_open_clip(name: str) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{_no_tokenizer(name)}: {first_line(error)}") from error


def _no_tokenizer(name: str) -> str:
    return f"no tokenizer could be loaded from {name!r} (backbone.processor names another)"
