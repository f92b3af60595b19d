"""Encoders of transformers."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..suggest import nearest
from .download import download
from .languages import speak
from .request import Request
from .weights import check_fit

# Names that stand for a class of transformers, where a model's type alone does not say which.
_CLASSES = {
    "blip-caption": ("blip", "BlipForConditionalGeneration"),
    "blip-retrieval": ("blip", "BlipForImageTextRetrieval"),
    "blip-vqa": ("blip", "BlipForQuestionAnswering"),
    "hubert-ctc": ("hubert", "HubertForCTC"),
    "t5-encoder": ("t5", "T5EncoderModel"),
    "wav2vec2-ctc": ("wav2vec2", "Wav2Vec2ForCTC"),
    "wavlm-ctc": ("wavlm", "WavLMForCTC"),
    "whisper-encoder": ("whisper", "WhisperEncoder"),
}
_WHISPER = "transformers.models.whisper.modeling_whisper"


def load(request: Request) -> nn.Module:
    """Makes a model of transformers; see `load_backbone`.

    The override `target_lang` gives a model of MMS the adapters of that language.
    """
    overrides = dict(request.overrides)
    language = overrides.pop("target_lang", None)
    model = _make(dataclasses.replace(request, overrides=overrides))
    if language is not None:
        speak(model, request.model, language)
    return model


def _make(request: Request) -> nn.Module:
    import transformers

    name = request.model
    overrides = dict(request.overrides)
    # An argument of the model's constructor, not of its config.
    implementation = {k: overrides.pop(k) for k in ("attn_implementation",) if k in overrides}
    request = dataclasses.replace(request, overrides=overrides)
    model_type, class_name = _CLASSES.get(name, (name, None))
    if model_type in transformers.CONFIG_MAPPING and not Path(name).is_dir():
        if request.pretrained:
            raise ValueError(
                f"{request.name!r} names an architecture without weights; give a hub name, such as "
                "hf/google/vit-base-patch16-224, or a local directory"
            )
        config = _config_of_type(request, model_type)
    else:
        config = _config_by_name(request)
        # BLIP's checkpoints are of one task each, and AutoModel would leave its decoder out.
        if config.model_type == "blip" and config.architectures:
            class_name = config.architectures[0]
    cls = _class_of(config, class_name)
    if request.pretrained:
        return download(
            lambda: cls.from_pretrained(name, config=config, dtype=torch.float32, **implementation),
            request.name,
        )
    if request.state is None:
        return cls._from_config(config, dtype=torch.float32, **implementation)
    return _with_weights(cls, config, request, implementation)


def _config_of_type(request: Request, model_type: str) -> Any:
    import transformers

    factory = transformers.CONFIG_MAPPING[model_type]
    default = factory()
    known = [*vars(default), *default.attribute_map]
    dataclasses.replace(request, model=model_type).check_overrides(request.overrides, known)
    return factory(**request.overrides)


def _config_by_name(request: Request) -> Any:
    """Reads the config of a hub name or of a local directory."""
    import transformers

    name = request.model
    try:
        config, unused = download(
            lambda: transformers.AutoConfig.from_pretrained(
                name, return_unused_kwargs=True, trust_remote_code=False, **request.overrides
            ),
            request.name,
        )
    except RuntimeError as error:
        if "/" in name or request.pretrained:
            raise
        types = [*transformers.CONFIG_MAPPING, *_CLASSES]
        raise ValueError(
            f"{name!r} is no model type of transformers{nearest(name, types)}; "
            f"to take it as a hub name: {error}"
        ) from error
    request.check_overrides(unused, [*vars(config), *config.attribute_map])
    return config


def _class_of(config: Any, class_name: str | None) -> Any:
    import transformers

    if class_name is None:
        mapping = transformers.MODEL_MAPPING
        if type(config) not in mapping:
            raise ValueError(f"transformers has no encoder of type {config.model_type!r}")
        cls = mapping[type(config)]
        return cls[0] if isinstance(cls, tuple) else cls
    if class_name == "WhisperEncoder":
        return importlib.import_module(_WHISPER).WhisperEncoder
    return getattr(transformers, class_name)


def _with_weights(
    cls: Any, config: Any, request: Request, implementation: dict[str, Any]
) -> nn.Module:
    """Loads a local file with transformers' own loader, which knows the names of its older
    versions."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    # All that does not fit is told below; the loader would print it as a table of advice.
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=request.state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **implementation,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    # Names in 4.x, names with both shapes in 5.x.
    shapes = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    check_fit(
        model,
        request.name,
        request.source,
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        shapes={key: key for key in shapes},
    )
    return model
