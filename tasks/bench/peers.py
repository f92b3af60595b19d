"""An encoder adapted by peft or by AdapterHub's `adapters`, as a `contenders.Contender`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from mmadapters.sites.tables import describe

from .contenders import RANK, TARGETS, Contender, Work, randomise
from .encoders import Inputs


class Peft(Contender):
    """LoRA of peft on the same linear maps as ours; one map if the encoder fuses three."""

    model: Any

    def __init__(self, encoder: nn.Module, work: Work) -> None:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_linears(encoder))
        # By default, the adapters of a bf16 encoder are fp32, so every call would cast.
        options = {"autocast_adapter_dtype": False}
        self.model = peft.get_peft_model(encoder, config, "a0", **options)
        for name in work.names[1:]:
            self.model.add_adapter(name, config, **options)
        like = next(p for n, p in self.model.named_parameters() if "lora_" not in n)
        self.model.to(like.device, like.dtype)
        randomise([p for n, p in self.model.named_parameters() if "lora_" in n])
        self.model.set_adapter("a0")
        self.mixed = list(work.mixed)
        if work.method == "lora merged":
            self.model = self.model.merge_and_unload()
        self.model.eval()

    def forward(self, inputs: Inputs) -> Any:
        if not self.mixed:
            return inputs(self.model)
        return self.model(*inputs.args, **inputs.kwargs, adapter_names=self.mixed)

    def switch(self, name: str) -> None:
        self.model.set_adapter(name)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, selected_adapters=["a0"])

    def load(self, folder: Path) -> None:
        self.model.load_adapter(folder / "a0", "loaded", autocast_adapter_dtype=False)

    def unload(self) -> None:
        self.model.delete_adapter("loaded")


def _linears(encoder: nn.Module) -> list[str]:
    """Returns the names of the modules that compute queries, keys and values."""
    names = {module: name for name, module in encoder.named_modules()}
    leaves = [
        sublayer.leaves[role]
        for sublayer in describe(encoder)[0].sublayers()
        for role in TARGETS
        if role in sublayer.leaves
    ]
    return list(dict.fromkeys(names[leaf.module] for leaf in leaves))


class AdapterHub(Contender):
    """Bottlenecks of AdapterHub with the same sizes, activations and places as ours."""

    model: Any

    def __init__(self, encoder: nn.Module, work: Work) -> None:
        import adapters

        like = next(encoder.parameters())
        widths = {
            block.module: tower.width
            for tower in describe(encoder)[0].towers.values()
            for block in tower.blocks
        }
        adapters.init(encoder)
        self.model = encoder
        # The peer divides and rounds down; the half keeps it from losing a channel.
        factors = {
            str(index): widths[layer] / (work.size + 0.5)
            for index, layer in self.model.iter_layers()
        }
        if work.method == "double_seq_bn":
            config = adapters.DoubleSeqBnConfig(reduction_factor=factors, non_linearity="gelu")
        else:
            config = adapters.SeqBnConfig(reduction_factor=factors)
        for name in work.names:
            self.model.add_adapter(name, config=config)
        self.model.to(like.device, like.dtype)
        randomise([p for n, p in self.model.named_parameters() if ".adapters." in n])
        self.model.train_adapter("a0")
        if work.mixed:
            self.model.set_active_adapters(_batch_split(work.mixed))
        self.model.eval()

    def switch(self, name: str) -> None:
        self.model.set_active_adapters(name)

    def save(self, folder: Path) -> None:
        self.model.save_adapter(str(folder), "a0")

    def load(self, folder: Path) -> None:
        self.model.load_adapter(str(folder), load_as="loaded")

    def unload(self) -> None:
        self.model.delete_adapter("loaded")


def _batch_split(rows: tuple[str, ...]) -> Any:
    from adapters.composition import BatchSplit

    runs = [(name, len(list(group))) for name, group in groupby(sorted(rows))]
    return BatchSplit(*(name for name, _ in runs), batch_sizes=[count for _, count in runs])
