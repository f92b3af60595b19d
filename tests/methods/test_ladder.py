"""Ladder side-tuning against NumPy, and that no gradient enters the encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import tensors
from injection.matrix import FAMILIES, bare, bare_outputs, loss_of, run
from injection.test_graph import results_before
from methods.reference import (
    Array,
    assert_close,
    gelu,
    layer_norm,
    numbers,
    randomise,
    sigmoid,
    softmax,
)

from mmadapters import (
    AdapterModel,
    Average,
    BatchSplit,
    LAdapterConfig,
    LadderConfig,
    LoRAConfig,
    MethodConfig,
    Parallel,
    PromptConfig,
    Route,
    Split,
    init,
)

each_family = pytest.mark.parametrize(
    "name",
    [
        *("timm-vit", "timm-dinov2-reg", "timm-dinov2-swiglu", "timm-siglip", "timm-eva", "hf-vit"),
        *("hf-dinov2", "hf-clip", "open_clip-clip", "open_clip-custom_text", "hf-blip-vqa"),
    ],
)
LADDER = LadderConfig(size=8, heads=2, mlp_ratio=2)


def held(name: str, **adapters: MethodConfig) -> AdapterModel:
    """A model of a family with random adapters, all frozen."""
    model = init(bare(FAMILIES[name]))
    for number, (adapter, config) in enumerate(adapters.items()):
        model.add_adapter(adapter, config)
        randomise(model.adapter(adapter), number)
    return model


def side_block(p: dict[str, Array], x: Array, heads: int) -> Array:
    """One pre-norm transformer block, with a loop over heads."""

    def linear(name: str, h: Array) -> Array:
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    h = linear("qkv", layer_norm(x, p["norm_1.weight"], p["norm_1.bias"]))
    size = x.shape[-1]
    each = size // heads
    parts = []
    for head in range(heads):
        q, k, v = (
            h[..., part * size + head * each : part * size + (head + 1) * each] for part in range(3)
        )
        parts.append(softmax(q @ k.swapaxes(-1, -2) / each**0.5) @ v)
    x = x + linear("proj", np.concatenate(parts, axis=-1))
    h = gelu(linear("fc1", layer_norm(x, p["norm_2.weight"], p["norm_2.bias"])))
    return x + linear("fc2", h)


def wide(inputs: Any) -> Any:
    """The inputs of a model in float64."""
    if isinstance(inputs, torch.Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {name: wide(value) for name, value in inputs.items()}
    return tuple(map(wide, inputs))


@each_family
def test_last_block_gives_what_the_formula_says(name: str) -> None:
    model = held(name, a=LADDER).double()
    tower = model.sites.towers["vision"]
    seen: list[Array] = []

    def keep(x: torch.Tensor) -> None:
        seen.append((x if tower.batch_first else x.transpose(0, 1)).double().numpy())

    first, last = tower.blocks[0].module, tower.blocks[-1].module
    first.register_forward_pre_hook(
        lambda _, args, kwargs: keep(tensors([*args, *kwargs.values()])[0]), with_kwargs=True
    )
    for block in tower.blocks:
        block.module.register_forward_hook(lambda _, args, out: keep(tensors(out)[0]))
    args, kwargs = (wide(given) for given in FAMILIES[name].inputs())
    with torch.no_grad():
        model(*args, **kwargs)
        plain, seen[:] = list(seen), []
        with model.using("a"):
            model(*args, **kwargs)
    assert last is not first
    assert all(map(np.array_equal, plain[:-1], seen[:-1]))

    p = {key.split("/", 1)[1]: value for key, value in numbers(model).items()}
    h = plain[0] @ p["entry.weight"].T + p["entry.bias"]
    for layer, state in enumerate(plain[1:]):
        own = state @ p[f"downs.{layer}.weight"].T + p[f"downs.{layer}.bias"]
        gate = sigmoid(p["gates"][layer] / 0.1)
        mine = {
            key.removeprefix(f"blocks.{layer}."): value
            for key, value in p.items()
            if key.startswith(f"blocks.{layer}.")
        }
        h = side_block(mine, gate * own + (1 - gate) * h, 2)
    expected = plain[-1] + h @ p["up.weight"].T + p["up.bias"]
    assert_close(seen[-1], expected)


@each_family
def test_no_gradient_enters_the_encoder(name: str) -> None:
    model = held(name, a=LADDER)
    model.train_adapter("a")
    last = model.sites.towers["vision"].blocks[-1].module
    before = results_before(model, last, FAMILIES[name].inputs())
    assert len(before) > 5
    assert not any(tracked for _, tracked in before)
    args, kwargs = FAMILIES[name].inputs()
    loss_of(tensors(model(*args, **kwargs))).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("#ladder" in key), key


def test_other_adapters_learn_nothing_through_the_side_network() -> None:
    """With the last block's output cut off, nothing reaches what acts below."""
    model = held("timm-vit", a=LADDER, low=LoRAConfig(rank=2, sites=("vision.blocks.0",)))
    model.train_adapter(["low", "a"])
    outputs: list[torch.Tensor] = []
    (ladder,) = (module for _, module in model.adapter("a").entries())
    ladder.register_forward_hook(lambda _, args, out: outputs.append(out - args[0]))
    args, kwargs = FAMILIES["timm-vit"].inputs()
    model(*args, **kwargs)
    low = list(model.adapter("low").parameters())
    found = torch.autograd.grad(outputs[0].square().sum(), low, allow_unused=True)
    # out - last: its own gradient by `last` is exactly zero, what is left comes from the states.
    assert all(gradient is None or not gradient.any() for gradient in found)
    loss_of(tensors(model(*args, **kwargs))).backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in low)


def test_every_second_block_and_patterns_of_sites() -> None:
    deep = init(bare(FAMILIES["timm-vit"]))
    depth = len(deep.sites.towers["vision"].blocks)
    assert depth >= 2
    for config, layers in (
        (LadderConfig(heads=1, every=2), list(range(depth - 1, -1, -2))[::-1]),
        (LadderConfig(heads=1, sites=("vision.blocks.0",)), [0]),
    ):
        deep.add_adapter("a", config)
        ((site, ladder),) = deep.adapter("a").entries()
        assert site == f"vision.blocks.{depth - 1}"
        assert ladder.layers == tuple(layers)  # type: ignore[union-attr]
        deep.delete_adapter("a")


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("order", ["prompt first", "ladder first"])
def test_prompts_are_not_read(deep: bool, order: str) -> None:
    configs = {"p": PromptConfig(length=3, deep=deep), "a": LADDER}
    names = list(configs) if order == "prompt first" else list(configs)[::-1]
    model = held("timm-vit", **{name: configs[name] for name in names})
    shapes: list[tuple[int, ...]] = []
    (ladder,) = (module for _, module in model.adapter("a").entries())
    assert isinstance(ladder.entry, torch.nn.Linear)  # type: ignore[union-attr]
    ladder.entry.register_forward_hook(lambda _, args, out: shapes.append(out.shape))  # type: ignore[union-attr]
    with model.using("a"):
        run(model, FAMILIES["timm-vit"])
    with model.using(names):
        run(model, FAMILIES["timm-vit"])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "config"),
    [("timm-vit", LADDER), ("hf-wav2vec2-stable", LAdapterConfig())],
    ids=["ladder", "l_adapter"],
)
def test_what_reads_all_blocks_is_dealt_out_by_sample(name: str, config: MethodConfig) -> None:
    model, family = held(name, a=config, b=config), FAMILIES[name]
    alone = {}
    for adapter in ("a", "b"):
        with model.using(adapter):
            alone[adapter] = run(model, family)[0]
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    for setup, rows in (
        (Route(["a", "b"]), [("a", 0), ("b", 1)]),
        (BatchSplit("b", "a", batch_sizes=(1, 1)), [("b", 0), ("a", 1)]),
    ):
        with model.using(setup):
            found = run(model, family)[0]
        expected = torch.stack([alone[adapter][row] for adapter, row in rows])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    model.average_adapter("mean", ["a", "a"])
    with model.using(Average("a", "mean")):
        torch.testing.assert_close(run(model, family)[0], alone["a"], atol=1e-5, rtol=1e-4)
    for refused in (Split("a", "b", splits=(2,)), Parallel("a", "b")):
        with pytest.raises(ValueError, match="acts on what a whole tower gives"):
            model.set_active_adapters(refused)


def test_state_of_one_pass_is_gone_in_the_next() -> None:
    model, family = held("timm-vit", a=LADDER), FAMILIES["timm-vit"]
    model.set_active_adapters("a")
    expected = run(model, family)[0]
    with torch.no_grad():
        model.backbone.blocks[0](model.backbone.patch_embed(family.inputs()[0][0]))
    assert torch.equal(run(model, family)[0], expected)
    model.set_active_adapters(None)
    assert torch.equal(run(model, family)[0], bare_outputs(family)[0])
    assert not model.store.runtime.local.states


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: LadderConfig(size=8, reduction_factor=2), "not as both"),
        (lambda: LadderConfig(heads=0), "heads must be a whole number of at least 1"),
        (lambda: LadderConfig(every=0), "every must be a whole number of at least 1"),
        (lambda: LadderConfig(temperature=0), "temperature must be above 0, not 0"),
        (lambda: LadderConfig(mlp_ratio=-1), "mlp_ratio must be above 0, not -1"),
        (lambda: LadderConfig(size=9, heads=2), "2 heads do not divide the side network's width"),
        (lambda: LadderConfig(sites=("*.ffn",)), r"name whole blocks, e.g. sites=\('vision"),
    ],
)
def test_bad_ladders_say_what_to_do(config, message: str) -> None:  # type: ignore[no-untyped-def]
    model = init(bare(FAMILIES["timm-vit"]))
    with pytest.raises(ValueError, match=message):
        model.add_adapter("a", config())
    assert model.adapter_names == ()
