"""Encoders of timm."""

from __future__ import annotations

import importlib
import inspect

from torch import Tensor, nn

from ..suggest import nearest
from .download import download
from .request import Request


def load(request: Request) -> nn.Module:
    """Makes an encoder with `timm.create_model`; see `load_backbone`."""
    import timm

    name = request.model
    remote = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    known = remote or timm.is_model(name)
    if known and not remote and "." in name:
        known = name in timm.list_pretrained(f"{name.partition('.')[0]}*")
    if not known:
        models = [*timm.list_models(), *timm.list_pretrained()]
        raise ValueError(f"timm has no model {name!r}{nearest(name, models)}")

    def make() -> nn.Module:
        return timm.create_model(name, pretrained=bool(request.pretrained), **request.overrides)

    model = download(make, request.name) if request.pretrained or remote else make()
    if request.state is not None:
        request.fit(model, _in_layout_of(model, request.state))
    return model


def _in_layout_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors timm's names where a file has the names of the model's original repository,
    and resizes position embeddings to the model's image size."""
    module = importlib.import_module(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state
    takes_model = len(inspect.signature(convert).parameters) > 1
    return convert(state, model) if takes_model else convert(state)
