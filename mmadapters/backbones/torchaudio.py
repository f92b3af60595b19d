"""Speech encoders of torchaudio."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..suggest import nearest
from .download import download
from .request import Request
from .weights import fit


def load(request: Request) -> nn.Module:
    """Makes the model of a bundle or of a factory function of torchaudio; see `load_backbone`."""
    import torchaudio

    name = request.model
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
        return _from_bundle(bundles[name], request)
    if name not in factories:
        raise ValueError(
            f"torchaudio has no speech encoder {name!r}{nearest(name, [*bundles, *factories])}"
        )
    if request.pretrained:
        raise ValueError(
            f"{request.name!r} names an architecture without weights; give a bundle"
            f"{nearest(name.upper(), bundles)}"
        )
    request.check_overrides(request.overrides, inspect.signature(factories[name]).parameters)
    model = factories[name](**request.overrides)
    if request.state is not None:
        request.fit(model, request.state)
    return model


def _from_bundle(bundle: Any, request: Request) -> nn.Module:
    from torchaudio.pipelines._wav2vec2 import utils

    request.check_overrides(request.overrides, bundle._params)
    if request.pretrained and not request.overrides:
        return download(bundle.get_model, request.name)
    # A bundle says publicly how to download its model, but not how to build it.
    model = utils._get_model(bundle._model_type, {**bundle._params, **request.overrides})
    if request.pretrained:
        state = download(lambda: bundle._get_state_dict(None), request.name)
        fit(model, _unwrapped(state), name=request.name, source="the bundle's weight file")
    elif request.state is not None:
        request.fit(model, _unwrapped(request.state))
    if bundle._normalize_waveform:
        model = utils._extend_model(model, normalize_waveform=True)
    return model


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes `model.` off the names, which a model has that normalises its waveform."""
    if all(key.startswith("model.") for key in state):
        return {key.removeprefix("model."): tensor for key, tensor in state.items()}
    return state
