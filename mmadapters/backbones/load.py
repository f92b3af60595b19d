"""`load_backbone`: an encoder of timm, transformers, open_clip or torchaudio by one name.

Libraries are imported when a name asks for them. Without `pretrained=True` nothing is downloaded:
the architecture comes from the library, the weights are random or come from a local file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..suggest import nearest
from . import huggingface, nano, open_clip, timm, torchaudio
from .request import Request
from .weights import read_weights

__all__ = ["load_backbone", "read_weights"]

# The loader of each library, by the prefix of its names.
_LOADERS: dict[str, Callable[[Request], nn.Module]] = {
    "timm": timm.load,
    "hf": huggingface.load,
    "open_clip": open_clip.load,
    "torchaudio": torchaudio.load,
    "nano": nano.load,
}


def load_backbone(
    name: str,
    *,
    pretrained: bool | str = False,
    weights: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Loads an encoder in float32 and eval mode, as the real class of its library.

    | name                          | what is built                                              |
    |-------------------------------|------------------------------------------------------------|
    | `timm/vit_small_patch16_224`  | `timm.create_model`                                        |
    | `hf/vit`, `hf/wav2vec2`, …    | the model of a type of transformers, from its default      |
    |                               | config; `hf/blip-vqa`, `hf/blip-retrieval`,                |
    |                               | `hf/blip-caption`, `hf/whisper-encoder`, `hf/t5-encoder`,  |
    |                               | `hf/wav2vec2-ctc`, `hf/hubert-ctc`, `hf/wavlm-ctc` name    |
    |                               | a class of it                                              |
    | `hf/google/vit-base-patch16…` | the config of a hub name or of a local directory           |
    | `open_clip/ViT-B-32`          | `open_clip.create_model`                                   |
    | `torchaudio/WAV2VEC2_BASE`    | a bundle of `torchaudio.pipelines`                         |
    | `torchaudio/wav2vec2_base`    | a factory function of `torchaudio.models`                  |
    | `nano/vit`                    | an encoder that ships with this package, with its weights  |

    Args:
        name: library and model, joined by a slash.
        pretrained: download the library's own weights. For open_clip a string is a tag of weights
            (True takes the first tag that open_clip lists).
        weights: the path of a local .safetensors or state-dict file to load instead. It must have
            all that the blocks depend on; a warning names a head or a pooler that it lacks or that
            the model has no place for. Files of timm in other layouts or for other image sizes go
            through timm's own converter.
        kwargs: arguments of the library's constructor or config that replace its defaults
            (`img_size=98`, `num_hidden_layers=4`); `target_lang="fra"` gives a model of MMS the
            adapters of a language, from `adapter.fra.safetensors` beside its weights.

    Examples:
        >>> load_backbone("timm/vit_tiny_patch16_224", pretrained=True)
        >>> load_backbone("hf/wav2vec2", hidden_size=256, num_hidden_layers=4)
        >>> load_backbone("open_clip/ViT-B-32", pretrained="laion2b_s34b_b79k")
        >>> load_backbone("torchaudio/wav2vec2_base", weights="encoder.safetensors", aux_num_out=29)

    Raises:
        ValueError: the library, the model or an override is unknown (the message names the nearest
            valid one); or the weight file cannot be read, holds more than tensors, or does not fit
            the model.
        RuntimeError: the weights or the config must be downloaded and no hub can be reached.
    """
    library, _, model_name = name.partition("/")
    if library not in _LOADERS or not model_name:
        libraries = ", ".join(f"{prefix}/…" for prefix in _LOADERS)
        raise ValueError(
            f"{name!r} does not begin with a library{nearest(library, _LOADERS)}; "
            f"names are {libraries}"
        )
    if pretrained and weights is not None:
        raise ValueError("give either pretrained=True or weights=, not both")
    request = Request(
        library=library,
        model=model_name,
        pretrained=pretrained,
        state=None if weights is None else read_weights(weights),
        path=str(weights),
        overrides=kwargs,
    )
    return _LOADERS[library](request).eval()
