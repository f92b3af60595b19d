"""The small encoders that ship with this package."""

from __future__ import annotations

from torch import nn

from ..suggest import nearest
from .request import Request


def load(request: Request) -> nn.Module:
    """Reads an encoder of `mmadapters.zoo`; see `load_backbone`."""
    from ..zoo import NANO, load_nano

    name = request.name
    if name not in NANO:
        raise ValueError(f"no encoder {name!r} ships with the package{nearest(name, NANO)}")
    model = load_nano(name, **request.overrides)
    if request.state is not None:
        request.fit(model, request.state)
    return model
