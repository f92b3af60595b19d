"""Loads converted tensors into a class of transformers, in every supported version of it."""

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

M = TypeVar("M", bound="PreTrainedModel")


def from_tensors(
    cls: type[M],
    config: "PretrainedConfig",
    *,
    tensors: "dict[str, Tensor]",
    **kwargs: Any,
) -> M:
    """Builds a model of `cls` with exactly these tensors, in eval mode.

    Args:
        tensors: named as in the published checkpoints. `from_pretrained` renames them for the
            installed version; 4.x and 5.x differ.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        RuntimeError: a parameter of the model has no tensor, or a tensor has no parameter.
    """
    from transformers.utils import logging

    bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = cls.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, **kwargs
        )
    finally:
        if bar_was_on:
            logging.enable_progress_bar()
    model, info = loaded
    if wrong := {key: sorted(names) for key, names in info.items() if names}:
        raise RuntimeError(f"the weights do not fit {cls.__name__}: {wrong}")
    return model.eval()
