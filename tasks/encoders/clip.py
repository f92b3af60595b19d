"""Image-text encoders of open_clip and transformers as two towers with one interface.

Adapters are active in all outputs, also in token states: everything goes through the encoder's own
functions, and a hook reads the states of its last block.

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
from mmadapters.errors import first_line
from mmadapters.sites.sitemap import Tower

from ..config.schema import BackboneConfig

_OPEN_CLIP = ("CLIP", "CustomTextCLIP", "CoCa")
_TRANSFORMERS = ("CLIPModel", "SiglipModel")
OF_OPEN_CLIP = 77  # open_clip's default number of tokens of a text


class ClipTowers:
    """The two towers of an image-text encoder; has no parameters of its own.

    The encoder is a CLIP, CustomTextCLIP or CoCa of open_clip, or a CLIPModel or SiglipModel of
    transformers.

    Attributes:
        width: E.
        image_width, text_width: D of the token states of each tower.
        logit_scale: the encoder's parameter, the logarithm of the inverse temperature.
        logit_bias: SigLIP's bias of the logits; None for other encoders.

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
        """Returns the logarithm of the inverse temperature."""
        backbone: Any = self.encoder.backbone
        return backbone.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """Returns SigLIP's bias of the logits, or None."""
        return getattr(self.encoder.backbone, "logit_bias", None)

    def images(self, pixels: Tensor) -> Tensor:
        """Returns projected features (B, E), not of unit length, of pixels (B, 3, H, W)."""
        if self._native:
            return self.encoder.encode_image(pixels, normalize=False)
        return _features(self.encoder.get_image_features(pixel_values=pixels))

    def texts(self, tokens: Tensor) -> Tensor:
        """Returns projected features (B, E), not of unit length, of tokens (B, L) int64."""
        if self._native:
            return self.encoder.encode_text(tokens, normalize=False)
        # No mask is needed: CLIP's is causal, and SigLIP was trained to read its padding.
        return _features(self.encoder.get_text_features(input_ids=tokens))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Returns the last block's normed states (B, N, D), class token first, of pixels."""
        tower = self.encoder.sites.towers["vision"]
        states = _last_states(tower, lambda: self.images(pixels))
        visual = getattr(self.encoder.backbone, "visual", None)
        if getattr(visual, "attn_pool", None) is not None:
            return states  # with an attentional pooler, the norm is for the pooler's output
        return _normed(tower, states)

    def text_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the last block's normed states (B, L, D) of tokens (B, L) int64, and their mask.

        The mask (B, L) is True from the start token to the end token.
        """
        tower = self.encoder.sites.towers["text"]
        states = _last_states(tower, lambda: self.texts(tokens))
        states = states[:, : tokens.shape[1]]  # without the class token that CoCa appends
        return _normed(tower, states), text_mask(self.encoder.backbone, tokens)


def text_mask(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """Returns the mask (B, L) of token ids (B, L) by the encoder's rule: True for text."""
    if not _is_open_clip(backbone):
        config: Any = backbone.config
        if config.model_type == "clip":
            # As in transformers: old configs have 2 here; then the end token has the highest id.
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


def _first(marks: Tensor) -> Tensor:
    """Returns the position (B,) of the first True of (B, L) bool, or the last position."""
    length = marks.shape[1]
    return torch.where(marks.any(dim=1), marks.int().argmax(dim=1), length - 1)


def _last_run(tokens: Tensor) -> Tensor:
    """Returns the start (B,) of the equal ids at the end: one end token, then padding like it."""
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
    """Returns the features; transformers 4 returns them directly, transformers 5 in an output."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _last_states(tower: Tower, run: Callable[[], Any]) -> Tensor:
    """Runs `run` and returns the output of the tower's last block without prompts."""
    states: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == thread:
            states.append(output if isinstance(output, Tensor) else output[0])

    handle = tower.blocks[-1].module.register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return states[-1]


def _normed(tower: Tower, states: Tensor) -> Tensor:
    return states if tower.norm is None else tower.norm.module(states)


class Tokenizer:
    """Turns texts into token ids (N, L) int64, cut and padded to the context length L.

    Args:
        source: `open_clip.tokenizer.SimpleTokenizer` or `HFTokenizer`, or a tokenizer of
            transformers.
        context_length: L.
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
        """Returns the number of tokens of the uncut text, with start and end."""
        if self._hf:
            return len(self.source(text, verbose=False).input_ids)
        inner = getattr(self.source, "tokenizer", None)
        if inner is None:
            return len(self.source.encode(text)) + 2
        return len(inner(self.source.clean_fn(text), verbose=False).input_ids)


def tokenizer(config: BackboneConfig, backbone: nn.Module) -> Tokenizer:
    """Loads the tokenizer of an image-text encoder, from `config.processor` or its name.

    Raises:
        ValueError: no tokenizer is known or can be loaded, or it has more tokens than the encoder.
    """
    return load_tokenizer(config, **text_limits(backbone))


def text_limits(backbone: nn.Module) -> dict[str, int]:
    """Returns `context_length` and `vocabulary` of an image-text encoder, JSON-ready."""
    if not _is_open_clip(backbone):
        config: Any = backbone.config
        text = config.text_config
        return {"context_length": text.max_position_embeddings, "vocabulary": text.vocab_size}
    holder: Any = getattr(backbone, "text", backbone)
    length = holder.context_length
    if hasattr(holder, "config"):
        length = min(length, OF_OPEN_CLIP)  # BERT can read 512, but was trained with fewer here
    return {"context_length": length, "vocabulary": holder.vocab_size}


def load_tokenizer(config: BackboneConfig, *, context_length: int, vocabulary: int) -> Tokenizer:
    """Loads the tokenizer of an encoder that is not loaded, from its `text_limits`.

    Raises:
        ValueError: see `tokenizer`.
    """
    library, _, name = config.name.partition("/")
    if config.processor is not None:
        source = _from_transformers(config.processor)
    elif library == "nano":
        from mmadapters import zoo

        source = zoo.load_tokenizer(config.name)
    elif library == "open_clip":
        source = _from_open_clip(name)
    elif library == "hf" and "/" in name:
        source = _from_transformers(name)
    else:
        raise ValueError(
            f"the tokenizer of {config.name!r} is not known: set backbone.processor to the "
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
