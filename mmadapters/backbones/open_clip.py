"""Encoders of open_clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..suggest import nearest
from .download import download
from .request import Request
from .weights import first_few


def load(request: Request) -> nn.Module:
    """Makes a model with `open_clip.create_model`; see `load_backbone`."""
    import open_clip

    name = request.model
    remote = name.startswith(("hf-hub:", "local-dir:"))
    if not remote and name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}{nearest(name, open_clip.list_models())}")
    tag = None
    if request.pretrained and not remote:
        tags = open_clip.list_pretrained_tags_by_model(name)
        given = request.pretrained
        tag = given if isinstance(given, str) else next(iter(tags), None)
        if tag not in tags:
            raise ValueError(
                f"open_clip has no weights {tag or ''!r} of {name}{nearest(tag or '', tags)}; "
                f"it has {first_few(tags) or 'none'}"
            )

    def make() -> nn.Module:
        return open_clip.create_model(
            name,
            pretrained=tag,
            load_weights=bool(request.pretrained),
            # Text towers of transformers would be downloaded even without CLIP weights.
            pretrained_text=False,
            **request.overrides,
        )

    model = download(make, request.name)
    if request.state is not None:
        request.fit(model, _in_layout_of(model, request.state))
    return model


def _in_layout_of(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors of training checkpoints and of other repositories the model's names.

    It does what open_clip does when it loads a file. open_clip's own function for this does not say
    what does not fit.
    """
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
