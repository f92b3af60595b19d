"""`AdapterModel`: a frozen encoder, its adapters, and the verbs that make, train and keep them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from .. import methods
from ..adapters import storage
from ..adapters.adapter import Adapter
from ..adapters.arithmetic import combined
from ..adapters.summary import AdapterRow, summary_table
from ..composition import Composition, Fuse, Setup, parse
from ..methods import FusionConfig, MethodConfig
from ..sites.spec import Architecture
from . import bundles, merge, pretrained, saving
from . import fusion as fusions
from . import sharing as groups
from .encoder import AdaptedEncoder
from .sharing import Sharing


def init(
    backbone: nn.Module,
    *,
    sites: Architecture | None = None,
    example_inputs: tuple | Mapping[str, Any] | None = None,
    train_trunk: bool = False,
) -> AdapterModel:
    """Freezes `backbone`, puts it in eval mode and wraps it. Its outputs stay the same.

    Args:
        sites: where the blocks are, for an encoder that mmadapters does not know.
        example_inputs: a small input (args as a tuple, or keywords as a dict) for the self-check;
            for known encoders one is made.
        train_trunk: let `model.train()` put the encoder in train mode too (its dropout, LayerDrop,
            SpecAugment). By default the frozen trunk stays in eval mode.

    Raises:
        ValueError: the encoder is unknown and no `sites` are given, or they do not fit.
    """
    return AdapterModel(
        backbone, sites=sites, example_inputs=example_inputs, train_trunk=train_trunk
    )


class AdapterModel(AdaptedEncoder):
    """A frozen encoder that adapters act on. Calls, attributes and methods go to the encoder.

    Adapters live here, not inside the encoder: its `state_dict` keeps its keys and values.
    `model(x)` has the encoder's own signature and return type; other methods (`model.generate`,
    `model.encode_image`, `model.forward_features`) are the encoder's, with adapters acting.

    A note on bits: with gradients enabled `nn.MultiheadAttention` takes another path for trainable
    weights than for frozen ones, and the results differ in the last bits. A fresh adapter is
    bit-equal to the encoder under `torch.no_grad()` and before `train_adapter` makes it trainable.
    """

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return self.store.adapter_names

    def adapter(self, name: str) -> Adapter:
        """Returns the modules of one adapter.

        Raises:
            ValueError: no adapter has that name; the message names the nearest.
        """
        return self.store.adapter(name)

    def add_adapter(self, name: str, config: MethodConfig | str) -> None:
        """Inserts a fresh adapter, neither active nor trainable, and checks that it can act.

        Args:
            name: letters, digits, `_`, `-`, `+`, `@` and spaces.
            config: a config of `mmadapters.methods`, or a method's name for its defaults.

        Raises:
            ValueError: the name or config is not valid, or the encoder has no place for the method.
            InertAdapterError: at one of its sites the adapter would change nothing.
        """
        if isinstance(config, str):
            config = methods.method_named(config)()
        self.store.insert(name, self.store.build(name, config))

    def add_adapters(
        self,
        names: Iterable[str] | Mapping[str, MethodConfig | str],
        config: MethodConfig | str | None = None,
        *,
        sharing: Sharing | None = None,
        share_with: str | None = None,
    ) -> None:
        """Inserts fresh adapters that share parameters, one for each task (VL-Adapter, Sung et al.
        2022); see `mmadapters.model.sharing`.

        Each is an adapter like any other: it acts, is trained and is saved alone, with all its
        tensors. Training one also moves the parameters that the others share with it.

        Args:
            names: the names of adapters that all have `config`, or a mapping of names to configs.
            sharing: "single" (one adapter under several names), "multiple" (nothing is shared, the
                default), "half_down" or "half_up" (the down- or the up-projections).
            share_with: an adapter of this model whose group they join. It gives the config and the
                sharing where these are left out. Parameters that were trained already are shared as
                they are, so that with "single" and "half_up" the new adapters do not start as the
                identity.

        Raises:
            ValueError: as `add_adapter`; or the methods have no such halves, or differ in the
                parameters to be shared. Nothing is added then.
        """
        groups.add(self.store, names, config, sharing=sharing, share_with=share_with)

    def share_adapters(self, names: Iterable[str], sharing: Sharing) -> None:
        """Lets adapters of this model share the parameters that have the same bits in all of them.

        This shares a group again after its files were loaded. Call it before an optimiser is made:
        the parameters of all but the first are replaced.

        Raises:
            ValueError: the parameters to be shared differ, or an adapter shares with others
                already.
        """
        groups.share(self.store, names, sharing)

    def train_adapter(self, setup: Setup, *, drop: int | tuple[int, int] = 0) -> None:
        """Makes adapters active and trainable, freezes all others, and enters train mode.

        Parameters that they share with other adapters are trained too, which changes the others.

        Args:
            drop: train without the adapters of so many of the lowest blocks; or, given as
                (least, most), of a number that every forward pass in train mode draws anew. Such an
                adapter works with any number dropped (robust AdapterDrop, Rücklé et al. 2021).
        """
        composition = parse(setup)
        self.store.activate_for_training(composition, drop)
        self.adapters.requires_grad_(False)
        for name in composition.names() if composition is not None else ():
            self.adapter(name).requires_grad_(True)
        self.fusions.requires_grad_(False)
        self.train()

    @property
    def fusion_names(self) -> tuple[str, ...]:
        """The names of the AdapterFusions, made of their members': `a,b` or `a,b>c`."""
        return self.store.fusion_names

    def add_adapter_fusion(
        self, members: Fuse | Iterable[str], config: FusionConfig | None = None
    ) -> str:
        """Adds an attention over several adapters at every site where one of them acts.

        It is neither active nor trainable yet. Fresh, it averages the outputs of its members, as
        its queries and keys start near zero. Returns its name.

        Raises:
            ValueError: an adapter is not here or is not a bottleneck adapter, or there is such a
                fusion already.
        """
        fused = members if isinstance(members, Fuse) else Fuse(*members)
        if fused.name in self.fusion_names:
            raise ValueError(f"there is an AdapterFusion of {fused.name!r} already")
        self.store.insert_fusion(fusions.build(self.store, fused, config or FusionConfig()))
        return fused.name

    def train_adapter_fusion(
        self, members: Fuse | Iterable[str], *, drop: int | tuple[int, int] = 0
    ) -> None:
        """Makes a fusion active and it alone trainable: its members stay as they are.

        Add `fusion_penalty()` to the loss.
        """
        fused = members if isinstance(members, Fuse) else Fuse(*members)
        fusion = self.store.fusion_of(fused)
        self.store.activate_for_training(fused, drop)
        self.adapters.requires_grad_(False)
        self.fusions.requires_grad_(False)
        fusion.requires_grad_(True)
        self.train()

    def fusion_penalty(self) -> Tensor:
        """Returns how far the value matrices of trainable fusions are from the identity, a scalar.

        It is 0.01 x ||V - I||^2 summed over sites, where 0.01 is each config's `regularization`.
        """
        return fusions.penalty(self.store)

    def recorded_fusion(
        self,
    ) -> contextlib.AbstractContextManager[Mapping[str, Mapping[str, Tensor]]]:
        """Records the attention weights of fusions inside the block, in this thread.

        Yields a mapping by fusion and site of the weights (members,), the mean over all tokens.
        """
        return fusions.recorded(self.store)

    def delete_adapter_fusion(self, name: str | Fuse) -> None:
        """Removes a fusion but not its members. If it acts, nothing acts then.

        Raises:
            ValueError: no fusion has that name.
        """
        self.store.remove_fusion(name.name if isinstance(name, Fuse) else name)

    def save_adapter_fusion(self, directory: str | os.PathLike, name: str | Fuse) -> None:
        """Writes a fusion with references to its members: their names and hashes.

        Raises:
            ValueError: no fusion has that name, or the directory holds something else.
        """
        fusions.save(self.store, directory, name.name if isinstance(name, Fuse) else name)

    def load_adapter_fusion(self, directory: str | os.PathLike) -> str:
        """Adds the fusion of a directory, not yet active, and returns its name.

        Its members must be here, under the names and with the values that they had.

        Raises:
            FileNotFoundError, ValueError: see `storage.read`; or a member is missing or has other
                values, or the fusion is for another encoder.
        """
        return fusions.load(self.store, directory)

    def save_composition(
        self,
        directory: str | os.PathLike,
        setup: Setup,
        *,
        head: nn.Module | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a composition with all its adapters and fusions, a task's head and metadata.

        Raises:
            ValueError: an adapter is not here, or the directory holds something else.
        """
        bundles.save(self.store, directory, setup=setup, head=head, metadata=metadata)

    def load_composition(
        self, directory: str | os.PathLike, *, allow_different_weights: bool = False
    ) -> tuple[Composition, storage.Stored]:
        """Adds the adapters and fusions of a directory, under the names that they have there.

        Returns the composition, not yet active, and the contents of the directory.

        Raises:
            FileNotFoundError, ValueError: see `load_adapter`; or a name is taken already.
        """
        return bundles.load(self.store, directory, allow_different_weights=allow_different_weights)

    def average_adapter(
        self,
        name: str,
        members: Iterable[str],
        weights: Iterable[float] | None = None,
        *,
        how: Literal["linear", "concat", "svd"] = "linear",
        rank: int | None = None,
    ) -> None:
        """Adds an adapter whose parameters are sum_i w_i of the members', not active.

        Args:
            weights: equal shares by default; they need not add up to 1, so that task vectors can
                be added and subtracted (Ilharco et al. 2023): `(1, 1, -1)`.
            how: "linear" adds parameters of equal structure; "concat" and "svd" add the products
                B A of LoRAs of any ranks, exactly with the sum of the ranks, or as closely as
                `rank` allows.

        Raises:
            ValueError: the adapters differ in structure; the message has the first difference.
        """
        names = list(members)
        if isinstance(members, str) or not names:
            raise ValueError(f"members is a list of adapters, not {members!r}")
        given = [1 / len(names)] * len(names) if weights is None else list(weights)
        config, tensors = combined(
            [self.adapter(member) for member in names], names, given, how=how, rank=rank
        )
        average = f"the average of {', '.join(names)}"
        adapter = self.store.filled(name, config, tensors=tensors, source=average)
        self.store.insert(name, adapter)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter and the hooks that only it needed. If it acts, nothing acts then.

        Raises:
            ValueError: no adapter has that name, it is merged, or it is a member of a fusion.
        """
        self.store.remove(name)

    def merge_adapter(self, name: str) -> None:
        """Folds an adapter into the encoder's weights, so that the same outputs cost nothing more.

        The adapter no longer acts by itself. `reset_adapter` undoes it to the bit. A bottleneck
        becomes channels of a feed-forward part if it stands beside it, reads the same input and has
        the same activation: the encoder is a wider one then (timm: another `mlp_ratio`).

        Raises:
            ValueError: the method cannot be merged, for the reason that the message gives; or no
                parameter can hold a bias; or a feed-forward part that is to get channels is of
                another kind, or other adapters change its maps.
        """
        merge.merge(self.store, name)

    def reset_adapter(self, name: str) -> None:
        """Undoes `merge_adapter`: the encoder gets back the very bits that it had.

        Raises:
            ValueError: the adapter is not merged, or another was merged after it.
        """
        merge.reset(self.store, name)

    def adapter_summary(self) -> list[AdapterRow]:
        """Prints a table of the adapters and returns its rows."""
        base = sum(parameter.numel() for parameter in self.backbone.parameters())
        composition = self.active_adapters
        active = set(composition.names()) if composition is not None else set()
        merged = {known.name for known in self.store.merged}
        rows = []
        for name, shares in groups.sharers(self.store).items():
            adapter = self.adapter(name)
            count = sum(parameter.numel() for parameter in adapter.parameters())
            rows.append(
                AdapterRow(
                    name=name,
                    method=adapter.config.method,
                    sites=len({site for site, _ in adapter.entries()}),
                    parameters=count,
                    share=100 * count / base,
                    active=name in active,
                    trainable=any(p.requires_grad for p in adapter.parameters()),
                    merged=name in merged,
                    shares=shares,
                )
            )
        total = sum(parameter.numel() for parameter in self.adapters.parameters())
        print(summary_table(type(self.backbone).__name__, base, rows, total=total))
        return rows

    def identity(self) -> dict[str, Any]:
        """Returns the encoder's identity, `{library, architecture, towers}`.

        It is computed once, before anything is merged into the encoder.
        """
        return self.store.identity()

    def save_adapter(
        self,
        directory: str | os.PathLike,
        name: str,
        *,
        head: nn.Module | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one adapter, with a task's head and JSON-ready metadata, into a directory.

        Raises:
            ValueError: no adapter has that name, or the directory holds something else.
        """
        saving.save(self.store, directory, name=name, head=head, metadata=metadata)

    def load_adapter(
        self,
        directory: str | os.PathLike,
        name: str | None = None,
        *,
        allow_different_weights: bool = False,
    ) -> storage.Stored:
        """Adds the adapter of a directory, under its own or another name, not yet active.

        Everything is checked before anything changes. Returns the contents of the directory, with
        the head and the metadata. A directory of `save_pretrained` stands for its only adapter.

        Raises:
            FileNotFoundError, ValueError: see `storage.read`; or the adapter is for another
                encoder, or its tensors do not fit.
        """
        if pretrained.is_saved(directory):
            directory = pretrained.only_adapter(directory)
        return saving.load(
            self.store,
            directory,
            name=name,
            allow_different_weights=allow_different_weights,
        )

    def save_pretrained(
        self, directory: str | os.PathLike, *, is_main_process: bool = True, **options: Any
    ) -> None:
        """Writes all adapters, fusions, trained parts of the encoder, what acts, and a card.

        Args:
            is_main_process: False writes nothing.
            options: what libraries pass to their own method; it has no effect.

        Raises:
            ValueError: there is nothing to save, an adapter is merged, or the directory holds
                something else.
        """
        if is_main_process:
            pretrained.save(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        backbone: nn.Module,
        *,
        allow_different_weights: bool = False,
    ) -> AdapterModel:
        """Makes the model of a directory of `save_pretrained`, with the same adapters acting.

        Raises:
            FileNotFoundError, ValueError: see `load_adapter`; or a trained part of the encoder has
                no place in it.
        """
        model = cls(backbone)
        try:
            pretrained.load(model, directory, allow_different_weights=allow_different_weights)
        except BaseException:
            model.detach()
            raise
        return model
