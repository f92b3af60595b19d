"""Calls in which `Parallel` repeats all inputs, not only what enters the first adapted block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..override import Override
from ..state import State

# Methods that decode step by step, or return what is between the blocks.
METHODS = ("generate", "forward_intermediates", "get_intermediate_layers", "extract_features")
# Inputs that the blocks are given, so that they are repeated where the blocks begin.
_OF_BLOCKS = {
    *("x", "image", "text", "waveforms"),
    *("pixel_values", "input_values", "input_features", "input_ids", "inputs_embeds"),
    *("attention_mask", "attn_mask", "token_type_ids", "position_ids", "head_mask"),
}
# Tensors without a row for each sample.
_OF_ALL = {
    *("head_mask", "decoder_head_mask", "cross_attn_head_mask", "attn_mask"),
    *("cache_position", "prompt_ids", "num_items_in_batch"),
}
_READ_INSIDE = ("output_hidden_states", "output_attentions", "use_weighted_layer_sum")
_OF_EARLIER_CALLS = ("encoder_outputs", "past_key_values")


@dataclass(eq=False)
class WholeCall(Override):
    """Repeats all inputs of a call, so that everything in it has a row for each member and sample.

    Attributes:
        names: the parameters of the method, in order.
        masked: what follows the blocks reads the attention mask, too.
        always: all calls are repeated as a whole, also those that give inputs of the blocks alone.

    Raises, when it runs:
        ValueError: states of an earlier call are given, or a loss that compares rows is asked for.
    """

    rank: ClassVar[int] = 3

    state: State
    names: tuple[str, ...]
    masked: bool = False
    always: bool = False

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the method, which libraries read."""
        return inspect.signature(getattr(type(self.module), self.method).__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.state.plan()
        if plan.copies == 1:
            return self.run(*args, **kwargs)
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if not self.always and not self._reads_more(named):
            return self.run(*args, **kwargs)
        self._check(named)
        inputs = _repeated(named, plan.copies)
        args = tuple(inputs.pop(name) for name, _ in zip(self.names, args, strict=False))
        local = self.state.local
        rows = {len(value) for value in (*args, *inputs.values()) if _has_rows(value)}
        above, local.rows = local.rows, rows.pop() if len(rows) == 1 else 0
        try:
            with self.state.pinned(plan.for_copies):
                return self.run(*args, **inputs)
        finally:
            local.rows = above

    def _reads_more(self, named: Mapping[str, Any]) -> bool:
        """Says whether a call gives or reads more than the inputs and the last states of blocks."""
        config = getattr(self.module, "config", None)
        return (
            any(isinstance(v, Tensor) and name not in _OF_BLOCKS for name, v in named.items())
            or (self.masked and named.get("attention_mask") is not None)
            or any(named.get(name, getattr(config, name, False)) for name in _READ_INSIDE)
            or bool(named.get("return_loss"))
        )

    def _check(self, named: Mapping[str, Any]) -> None:
        for name in _OF_EARLIER_CALLS:
            if named.get(name) is not None:
                raise ValueError(
                    "Parallel repeats the batch from the inputs to the outputs of one call, and "
                    f"{name} come from another call: leave them out (generate keeps its own), or "
                    "repeat the inputs and use BatchSplit"
                )
        if named.get("return_loss"):
            raise ValueError(
                "Parallel cannot give a contrastive loss, which would compare the rows of one "
                "adapter with those of another: leave return_loss out, and take the loss of each "
                "adapter's rows"
            )


def _repeated(named: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """Returns the inputs with all rows `copies` times, one copy of the batch after another."""
    batch = {len(value) for name, value in named.items() if _has_rows(value)}

    def repeated(name: str, value: Any) -> Any:
        if name == "language" and isinstance(value, (list, tuple)):
            return [*value] * copies
        if not isinstance(value, Tensor) or name in _OF_ALL or not value.dim():
            return value
        if value.dim() == 1 and len(value) not in batch:
            return value
        if name.endswith("position_ids") and len(value) == 1:
            return value
        return value.repeat(copies, *(1,) * (value.dim() - 1))

    return {name: repeated(name, value) for name, value in named.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def whole_calls(backbone: nn.Module, state: State) -> Iterator[WholeCall]:
    """Puts a `WholeCall` on each method of the encoder and its parts that may need it."""
    names = _parameters(backbone, "forward")
    # A second stream, or maps made of the states of several blocks.
    always = any(name.startswith("decoder") for name in names) or _is_backbone(backbone)
    # Heads for speech pool the states, or count them, under the mask.
    masked = "input_values" in names and hasattr(backbone, str(_prefix(backbone)))
    yield _put(WholeCall(backbone, state, names, masked=masked, always=always))
    for module in backbone.modules():
        for method in METHODS:
            if callable(getattr(type(module), method, None)):
                names = _parameters(module, method)
                yield _put(WholeCall(module, state, names, always=True, method=method))


def _prefix(model: nn.Module) -> str | None:
    """Returns the name under which a model of transformers with a head holds the one without."""
    return getattr(model, "base_model_prefix", None)


def _is_backbone(model: nn.Module) -> bool:
    """Says whether a model of transformers returns maps of features from several blocks."""
    return hasattr(model, "out_features") and hasattr(model, "channels")


def _parameters(module: nn.Module, method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(type(module), method)).parameters)[1:]


def _put(call: WholeCall) -> WholeCall:
    call.put()
    return call
