"""`model.store`, the state that all verbs share, is one with its model and adds nothing to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from families.small import output, randomise, small_vit
from torch import nn

from mmadapters import AdapterModel, Fuse, SeqBnConfig, init


def adapted() -> AdapterModel:
    model = init(small_vit())
    for name in ("a", "b"):
        model.add_adapter(name, SeqBnConfig())
        randomise(model.adapter(name))
    model.add_adapter_fusion(["a", "b"])
    model.set_active_adapters("a")
    return model


def test_parameters_and_tensors_are_those_of_the_encoder_the_adapters_and_the_fusions() -> None:
    model = adapted()
    ids = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    assert len(ids) == len(set(ids))
    children = [name for name, _ in model.named_children()]
    assert children == ["backbone", "adapters", "fusions"]
    assert {key.split(".")[0] for key in model.state_dict()} == set(children)
    assert model.store.adapters is model.adapters
    assert model.store.fusions is model.fusions
    assert model.store.backbone is model.backbone


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep", "pickle"],
)
@torch.no_grad()
def test_a_copy_has_a_store_of_its_own(copied: Callable[[AdapterModel], AdapterModel]) -> None:
    model = adapted()
    before = output(model)
    other = copied(model)
    assert other.store is not model.store
    assert other.store.model is other
    assert other.store.adapters is other.adapters
    assert other.store.fusions is other.fusions
    assert other.store.backbone is other.backbone
    assert other.active_adapters == model.active_adapters
    assert torch.equal(output(other), before)
    other.delete_adapter_fusion(Fuse("a", "b"))
    other.delete_adapter("a")
    other.add_adapter("c", SeqBnConfig())
    assert model.adapter_names == ("a", "b")
    assert torch.equal(output(model), before)
    assert isinstance(other.detach(), nn.Module)
    assert torch.equal(output(model), before)
