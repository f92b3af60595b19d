"""`Request`: the arguments of `load_backbone`, as the loader of each library takes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..suggest import nearest
from .weights import fit


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `load_backbone`."""

    # The prefix of a library in names, such as "hf".
    library: str
    # The model's name behind that prefix and the slash.
    model: str
    # Whether to download the library's own weights; open_clip takes a tag of them too.
    pretrained: bool | str
    # The tensors of a local file to load instead, or None, and the file's path.
    state: dict[str, Tensor] | None
    path: str
    # Arguments of the library's constructor or config that replace its defaults.
    overrides: dict[str, Any]

    @property
    def name(self) -> str:
        """The name that `load_backbone` was given: library and model, joined by a slash."""
        return f"{self.library}/{self.model}"

    @property
    def source(self) -> str:
        """The path of the weight file, quoted for errors."""
        return repr(self.path)

    def fit(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Loads `state`, the tensors of the local file under the model's names, into the model.

        Raises:
            ValueError: they do not fit.
        """
        fit(model, state, name=self.name, source=self.source)

    def check_overrides(self, overrides: Iterable[str], known: Iterable[str]) -> None:
        """Raises ValueError for an override that is not among the `known` ones."""
        known = [word for word in known if not word.startswith("_")]
        for word in overrides:
            if word not in known:
                raise ValueError(f"{self.name} has no setting {word!r}{nearest(word, known)}")
