"""Loading converted tensors into a class of transformers, whatever its version calls the layers."""

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
    """A model of `cls` holding exactly `tensors`, named as in the published checkpoints.

    `from_pretrained` renames them for the version that is installed; 4.x and 5.x differ.

    Raises:
        RuntimeError: a parameter of the model is not among the tensors, or the reverse.
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
