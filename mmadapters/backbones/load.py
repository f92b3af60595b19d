"""`load_backbone`: an encoder of timm, transformers, open_clip or torchaudio by one name.

Libraries are imported when a name asks for them. Without `pretrained=True` nothing is downloaded:
the architecture comes from the library, the weights are random or from a local file. Weight files
are data: safetensors, or what `torch.load(weights_only=True)` accepts; nothing in them is executed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..suggest import nearest

# Names of transformers' models whose type alone does not say which class is meant.
_HEADS = {
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


def load_backbone(
    name: str,
    *,
    pretrained: bool | str = False,
    weights: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """An encoder in float32 and eval mode, as the real class of its library.

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
        pretrained: download the library's own weights; open_clip's tag may be given as a string
            (True takes the first tag that open_clip lists).
        weights: a local .safetensors or state-dict file instead, loaded strictly; timm's files in
            other layouts or of other image sizes go through timm's own converter.
        kwargs: what the library's constructor or config takes over its defaults (`img_size=98`,
            `num_hidden_layers=4`).

    Examples:
        >>> load_backbone("timm/vit_tiny_patch16_224", pretrained=True)
        >>> load_backbone("hf/wav2vec2", hidden_size=256, num_hidden_layers=4)
        >>> load_backbone("open_clip/ViT-B-32", pretrained="laion2b_s34b_b79k")
        >>> load_backbone("torchaudio/wav2vec2_base", weights="encoder.safetensors", aux_num_out=29)

    Raises:
        ValueError: an unknown library, model or override, with the nearest valid one; a weight file
            that cannot be read, holds more than tensors, or does not fit the model.
        RuntimeError: the weights or the config must be downloaded and no hub can be reached.
    """
    library, _, model_name = name.partition("/")
    if library not in _LIBRARIES or not model_name:
        libraries = ", ".join(f"{prefix}/…" for prefix in _LIBRARIES)
        raise ValueError(
            f"{name!r} does not begin with a library{nearest(library, _LIBRARIES)}; "
            f"names are {libraries}"
        )
    if pretrained and weights is not None:
        raise ValueError("give either pretrained=True or weights=, not both")
    state = None if weights is None else read_weights(weights)
    model = _LIBRARIES[library](model_name, pretrained, kwargs, state, str(weights))
    return model.eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or state-dict file, on the CPU; never executes what is in it.

    A training checkpoint's `state_dict` or `model` entry is taken out of it.

    Raises:
        ValueError: the file is missing, damaged, holds other things than tensors, or holds NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weight file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # Each format has its own errors for a damaged file, torch's alone come from four modules.
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not a file of tensors that can be read safely (safetensors, or a "
            f"state dict without other objects): {type(error).__name__}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not _is_state(state):
        raise ValueError(f"{str(path)!r} holds no state dict: names with one tensor each")
    broken = [k for k, t in state.items() if t.is_floating_point() and t.isnan().any()]
    if broken:
        raise ValueError(f"{str(path)!r} holds NaN in {_some(broken)}")
    return dict(state)


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, Mapping)
        and bool(state)
        and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items())
    )


def _fit(model: nn.Module, state: Mapping[str, Tensor], name: str, path: str) -> None:
    """Loads a state dict of which nothing may be missing or left over, copying into the model."""
    own = model.state_dict(keep_vars=True)
    # One tensor under two names is stored once.
    there = {id(own[key]) for key in state if key in own}
    missing = [key for key, tensor in own.items() if key not in state and id(tensor) not in there]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} where the model has {tuple(own[key].shape)}"
        for key in state
        if key in own and own[key].shape != state[key].shape
    ]
    _refuse(name, path, missing, unexpected, shapes)
    model.load_state_dict(state, strict=False)


def _refuse(
    name: str, path: str, missing: list[str], unexpected: list[str], shapes: list[str]
) -> None:
    """Raises for the first few names of all that does not fit."""
    problems = [
        f"{len(keys)} {what} ({_some(keys)})"
        for keys, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"{path!r} does not fit {name}: {'; '.join(problems)}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _download(make: Callable[[], nn.Module], name: str) -> Any:
    """`make()`, or one sentence about what could not be downloaded.

    Raises:
        RuntimeError: no hub was reached.
        ValueError: a hub was reached and has no such model.
    """
    try:
        return make()
    except Exception as error:
        causes = list(_causes(error))
        if any(_answered(cause) for cause in causes):
            raise ValueError(f"the hub has no {name!r} that can be read: {_line(error)}") from error
        if any(_unreachable(cause) for cause in causes):
            raise RuntimeError(
                f"{name!r} must be downloaded and the hub could not be reached; connect to the "
                "network, or give a local file: load_backbone(..., weights='file.safetensors')"
            ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answered(error: BaseException) -> bool:
    """Whether the error is an HTTP status, of urllib or of huggingface_hub."""
    return hasattr(error, "code") or getattr(error, "response", None) is not None


def _unreachable(error: BaseException) -> bool:
    library = type(error).__module__.partition(".")[0]
    clients = ("httpcore", "httpx", "huggingface_hub", "requests", "urllib3", "urllib", "socket")
    return isinstance(error, ConnectionError) or library.startswith(clients)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _timm(
    name: str, pretrained: bool | str, kwargs: dict, state: dict | None, path: str
) -> nn.Module:
    import timm

    full = f"timm/{name}"
    remote = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    known = remote or timm.is_model(name)
    if known and not remote and "." in name:
        known = name in timm.list_pretrained(f"{name.partition('.')[0]}*")
    if not known:
        models = [*timm.list_models(), *timm.list_pretrained()]
        raise ValueError(f"timm has no model {name!r}{nearest(name, models)}")

    def make() -> nn.Module:
        return timm.create_model(name, pretrained=bool(pretrained), **kwargs)

    model = _download(make, full) if pretrained or remote else make()
    if state is not None:
        _fit(model, _timm_layout(model, state), full, path)
    return model


def _timm_layout(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original repositories' names to timm's, position embeddings to the model's size."""
    module = importlib.import_module(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state
    takes_model = len(inspect.signature(convert).parameters) > 1
    return convert(state, model) if takes_model else convert(state)


def _huggingface(
    name: str, pretrained: bool | str, kwargs: dict, state: dict | None, path: str
) -> nn.Module:
    import transformers

    full = f"hf/{name}"
    implementation = {k: kwargs.pop(k) for k in ("attn_implementation",) if k in kwargs}
    kind, head = _HEADS.get(name, (name, None))
    if kind in transformers.CONFIG_MAPPING and not Path(name).is_dir():
        if pretrained:
            raise ValueError(
                f"{full!r} names an architecture without weights; give a hub name, such as "
                "hf/google/vit-base-patch16-224, or a local directory"
            )
        config = _config_of_type(kind, kwargs)
    else:
        config = _config_by_name(name, pretrained, kwargs)
        # BLIP's checkpoints are of one task each and AutoModel would leave its decoder behind.
        if config.model_type == "blip" and config.architectures:
            head = config.architectures[0]
    cls = _hf_class(config, head)
    if pretrained:
        return _download(
            lambda: cls.from_pretrained(name, config=config, dtype=torch.float32, **implementation),
            full,
        )
    if state is None:
        return cls._from_config(config, dtype=torch.float32, **implementation)
    return _hf_with_weights(cls, config, state, full, path, implementation)


def _config_of_type(kind: str, overrides: dict) -> Any:
    import transformers

    factory = transformers.CONFIG_MAPPING[kind]
    default = factory()
    _known_overrides(f"hf/{kind}", overrides, [*vars(default), *default.attribute_map])
    return factory(**overrides)


def _config_by_name(name: str, pretrained: bool | str, overrides: dict) -> Any:
    import transformers

    try:
        config, unused = _download(
            lambda: transformers.AutoConfig.from_pretrained(
                name, return_unused_kwargs=True, trust_remote_code=False, **overrides
            ),
            f"hf/{name}",
        )
    except RuntimeError as error:
        if "/" in name or pretrained:
            raise
        types = [*transformers.CONFIG_MAPPING, *_HEADS]
        raise ValueError(
            f"{name!r} is no model type of transformers{nearest(name, types)}; "
            f"to take it as a hub name: {error}"
        ) from error
    _known_overrides(f"hf/{name}", unused, [*vars(config), *config.attribute_map])
    return config


def _known_overrides(name: str, overrides: Iterable[str], known: Iterable[str]) -> None:
    known = [word for word in known if not word.startswith("_")]
    for word in overrides:
        if word not in known:
            raise ValueError(f"{name} has no setting {word!r}{nearest(word, known)}")


def _hf_class(config: Any, head: str | None) -> Any:
    import transformers

    if head is None:
        mapping = transformers.MODEL_MAPPING
        if type(config) not in mapping:
            raise ValueError(f"transformers has no encoder of type {config.model_type!r}")
        found = mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    if head == "WhisperEncoder":
        return importlib.import_module(_WHISPER).WhisperEncoder
    return getattr(transformers, head)


def _hf_with_weights(
    cls: Any, config: Any, state: dict, name: str, path: str, implementation: dict
) -> nn.Module:
    """Through transformers' own loader, which knows the names of its older versions."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    # What does not fit is an error below; the loader would print it as a table of advice.
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **implementation,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    # Names in 4.x, names with both shapes in 5.x.
    shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    _refuse(name, path, sorted(missing), sorted(unexpected), sorted(shapes))
    return model


def _open_clip(
    name: str, pretrained: bool | str, kwargs: dict, state: dict | None, path: str
) -> nn.Module:
    import open_clip

    full = f"open_clip/{name}"
    remote = name.startswith(("hf-hub:", "local-dir:"))
    if not remote and name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}{nearest(name, open_clip.list_models())}")
    tag = None
    if pretrained and not remote:
        tags = open_clip.list_pretrained_tags_by_model(name)
        tag = pretrained if isinstance(pretrained, str) else next(iter(tags), None)
        if tag not in tags:
            raise ValueError(
                f"open_clip has no weights {tag or ''!r} of {name}{nearest(tag or '', tags)}; "
                f"it has {_some(tags) or 'none'}"
            )

    def make() -> nn.Module:
        return open_clip.create_model(
            name,
            pretrained=tag,
            load_weights=bool(pretrained),
            # Text towers of transformers would be downloaded even without CLIP weights.
            pretrained_text=False,
            **kwargs,
        )

    model = _download(make, full)
    if state is not None:
        _fit(model, _open_clip_layout(model, state), full, path)
    return model


def _open_clip_layout(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training checkpoints and other repositories' names to those of the model, as open_clip does
    when it loads a file; its own function for this would let nothing say what does not fit."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import (
        convert_to_custom_text_state_dict,
        resize_pos_embed,
        resize_text_pos_embed,
    )

    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    return state


def _torchaudio(
    name: str, pretrained: bool | str, kwargs: dict, state: dict | None, path: str
) -> nn.Module:
    import torchaudio

    full = f"torchaudio/{name}"
    bundles = {
        word: bundle
        for word, bundle in vars(torchaudio.pipelines).items()
        if isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle)
    }
    factories = {
        word: factory
        for word, factory in vars(torchaudio.models).items()
        if inspect.isfunction(factory) and word.startswith(("wav2vec2_", "hubert_", "wavlm_"))
    }
    if name in bundles:
        return _torchaudio_bundle(bundles[name], pretrained, kwargs, state, full, path)
    if name not in factories:
        raise ValueError(
            f"torchaudio has no speech encoder {name!r}{nearest(name, [*bundles, *factories])}"
        )
    if pretrained:
        raise ValueError(
            f"{full!r} names an architecture without weights; give a bundle"
            f"{nearest(name.upper(), bundles)}"
        )
    known = inspect.signature(factories[name]).parameters
    _known_overrides(full, kwargs, known)
    model = factories[name](**kwargs)
    if state is not None:
        _fit(model, state, full, path)
    return model


def _torchaudio_bundle(
    bundle: Any, pretrained: bool | str, kwargs: dict, state: dict | None, name: str, path: str
) -> nn.Module:
    from torchaudio.pipelines._wav2vec2 import utils

    _known_overrides(name, kwargs, bundle._params)
    if pretrained and not kwargs:
        return _download(bundle.get_model, name)
    # A bundle says publicly how to download its model, but not how to build it.
    model = utils._get_model(bundle._model_type, {**bundle._params, **kwargs})
    if pretrained:
        state, path = _download(lambda: bundle._get_state_dict(None), name), bundle._path
    if state is not None:
        # Wrapped in a normalisation of the waveform, the model's names begin with `model.`.
        if all(key.startswith("model.") for key in state):
            state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
        _fit(model, state, name, path)
    if bundle._normalize_waveform:
        model = utils._extend_model(model, normalize_waveform=True)
    return model


def _nano(
    name: str, pretrained: bool | str, kwargs: dict, state: dict | None, path: str
) -> nn.Module:
    from ..zoo import NANO, load_nano

    full = f"nano/{name}"
    if full not in NANO:
        raise ValueError(f"no encoder {full!r} ships with the package{nearest(full, NANO)}")
    model = load_nano(full, **kwargs)
    if state is not None:
        _fit(model, state, full, path)
    return model


_Loader = Callable[[str, bool | str, dict, dict | None, str], nn.Module]
_LIBRARIES: dict[str, _Loader] = {
    "timm": _timm,
    "hf": _huggingface,
    "open_clip": _open_clip,
    "torchaudio": _torchaudio,
    "nano": _nano,
}
