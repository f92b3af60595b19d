"""The self-check: an injection that would change nothing is refused, with the site and the mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families.small import randomise
from injection.matrix import Trace, loss_of, same_state, state
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    Architecture,
    BatchSplit,
    BottleneckConfig,
    InertAdapterError,
    LeafSpec,
    LoRAConfig,
    MethodConfig,
    PrefixConfig,
    Route,
    Split,
    SSFConfig,
    SublayerSpec,
    TowerSpec,
)
from mmadapters.composition import Composition

WIDTH = 16


class Block(nn.Module):
    """A pre-norm block around `nn.MultiheadAttention`, with batch norm's buffers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class SkipsMlpInInference(Block):
    """In eval mode without gradients the feed-forward part is computed without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return super().forward(x)
        x = x + self.mix(self.ln_1(x))
        up, _, down = self.mlp
        hidden = F.gelu(F.linear(self.ln_2(x), up.weight, up.bias))
        return x + F.linear(hidden, down.weight, down.bias)


class IgnoresMlpInInference(SkipsMlpInInference):
    """As above, but the feed-forward part is called and its result thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        self.mlp(self.ln_2(x))
        return super().forward(x)


class SkipsMlpInTraining(Block):
    """In train mode the feed-forward part is left out."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.ln_1(x))
        return x if self.training else x + self.mlp(self.ln_2(x))


class IgnoresMlp(Block):
    """The feed-forward part is called and its result thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        self.mlp(self.ln_2(x))
        return x + self.mix(self.ln_1(x))


class DetachesMlp(Block):
    """No gradient comes back through the feed-forward part."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.ln_1(x))
        return x + self.mlp(self.ln_2(x)).detach()


class Encoder(nn.Module):
    """Two blocks between dropout and batch norm, whose state a check must not move."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList([Block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.dropout(x).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


def sites(**attention: str | LeafSpec) -> Architecture:
    """The blocks of `Encoder`, with the given leaves of attention."""
    leaves = attention or {
        **{role: f"attn.in_proj_weight[{index}/3]" for index, role in enumerate("qkv")},
        "o": "attn.out_proj.weight",
    }
    attn = SublayerSpec(
        output="attn", residual="ln_1", attention="attn", norm="ln_1", leaves=leaves
    )
    ffn = SublayerSpec(
        output="mlp", residual="ln_2", norm="ln_2", leaves={"up": "mlp.0", "down": "mlp.2"}
    )
    tower = TowerSpec(name="vision", blocks="blocks", sublayers={"attn": attn, "ffn": ffn})
    return Architecture(towers=(tower,))


def example() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))


INERT = {
    "a hook on the output map of nn.MultiheadAttention": (
        Block,
        sites(q="attn.in_proj_weight[0/3]", o="attn.out_proj"),
        LoRAConfig(rank=2, targets=("o",)),
        r"vision\.blocks\.0\.attn\.o would be inert: in eval mode without gradients.*never called",
    ),
    "a sublayer bypassed in inference": (
        SkipsMlpInInference,
        sites(),
        BottleneckConfig(size=4),
        r"vision\.blocks\.1\.ffn would be inert: in eval mode without gradients.*never called",
    ),
    "a linear map bypassed in inference": (
        SkipsMlpInInference,
        sites(),
        LoRAConfig(rank=2, targets=("down",)),
        r"vision\.blocks\.1\.ffn\.down would be inert: in eval mode without.*never called",
    ),
    "a sublayer bypassed in training": (
        SkipsMlpInTraining,
        sites(),
        BottleneckConfig(size=4),
        r"vision\.blocks\.1\.ffn would be inert: in train mode no gradient arrives",
    ),
    "a sublayer whose result is ignored in one of two blocks": (
        IgnoresMlp,
        sites(),
        BottleneckConfig(size=4),
        r"vision\.blocks\.1\.ffn would be inert: in eval mode .*(gradient arrives|output changes)",
    ),
    "a sublayer whose result is ignored, alone": (
        IgnoresMlp,
        sites(),
        BottleneckConfig(size=4, sites=("vision.blocks.1.ffn",)),
        r"vision\.blocks\.1\.ffn would be inert: in eval mode without gradients no output changes",
    ),
    "a sublayer that no gradient passes": (
        DetachesMlp,
        sites(),
        BottleneckConfig(size=4),
        r"vision\.blocks\.1\.ffn would be inert: in eval mode no gradient arrives",
    ),
}


@pytest.mark.parametrize(("block", "where", "config", "message"), INERT.values(), ids=[*INERT])
def test_inert_adapter_is_refused_and_leaves_everything_as_it_was(
    block: Callable[[], nn.Module],
    where: Architecture,
    config: MethodConfig,
    message: str,
) -> None:
    backbone = Encoder(block)
    for parameter in backbone.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    model = mmadapters.init(backbone, sites=where, example_inputs=(example(),), train_trunk=True)
    model.add_adapter("held", BottleneckConfig(size=4, sites=("vision.blocks.0",)))
    model.train_adapter("held")
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    trace, weights = Trace.of(backbone), state(model)
    with torch.no_grad():
        expected = model.eval()(example())
    model.train()
    random = torch.get_rng_state()
    config.build(model.sites)  # A fresh adapter draws its weights; the check draws nothing more.
    drawn = torch.get_rng_state()
    torch.set_rng_state(random)

    with pytest.raises(InertAdapterError, match=message):
        model.add_adapter("a", config)

    assert model.adapter_names == ("held",)
    assert model.active_adapters is not None
    assert Trace.of(backbone) == trace
    assert same_state(model, weights)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is not None and p.grad.eq(7.0).all() for p in backbone.parameters())
    assert all(p.grad is None for p in model.adapter("held").parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in held if name.startswith("adapters.held.")
    }
    assert model.training
    with torch.no_grad():
        assert torch.equal(model.eval()(example()), expected)


def test_accepted_adapter_leaves_the_rest_as_it_was() -> None:
    backbone = Encoder()
    for parameter in backbone.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, weights = Trace.of(backbone.eval()), state(backbone)
    model = mmadapters.init(
        backbone, sites=sites(), example_inputs=(example(),), train_trunk=True
    ).train()
    random = torch.get_rng_state()
    model.add_adapter("a", SSFConfig())
    assert model.training
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), random)
    assert same_state(backbone, weights)
    assert all(p.grad is not None and p.grad.eq(7.0).all() for p in backbone.parameters())
    assert all(p.grad is None for p in model.adapter("a").parameters())
    assert all(p.eq(float(name.endswith("scale"))).all() for name, p in _named(model))
    assert Trace.of(model.detach().eval()) == before


def _named(model: mmadapters.AdapterModel) -> list[tuple[str, nn.Parameter]]:
    return list(model.adapter("a").named_parameters())


def test_check_without_an_input_says_how_to_give_one() -> None:
    model = mmadapters.init(Encoder(), sites=sites())
    with pytest.raises(ValueError, match="pass example_inputs"):
        model.add_adapter("a", BottleneckConfig(size=4))
    assert model.adapter_names == ()


def layers(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, dim_feedforward=24, batch_first=True, dropout=0.0, **options
    )
    return nn.TransformerEncoder(layer, 2).eval()


def by_hand(attention: dict[str, str], ffn: str = "linear2") -> Architecture:
    """`nn.TransformerEncoder`, post-norm: each norm reads the sum of residual and branch."""
    attn = SublayerSpec(
        output="self_attn",
        residual="self_attn",
        attention="self_attn",
        norm="norm1",
        post_norm=True,
        leaves=attention,
    )
    feed_forward = SublayerSpec(
        output=ffn,
        residual="linear1",
        norm="norm2",
        post_norm=True,
        leaves={"up": "linear1", "down": "linear2"},
    )
    tower = TowerSpec(name="text", blocks="layers", sublayers={"attn": attn, "ffn": feed_forward})
    return Architecture(towers=(tower,))


RAW = {
    **{role: f"self_attn.in_proj_weight[{index}/3]" for index, role in enumerate("qkv")},
    "o": "self_attn.out_proj.weight",
}


def test_naive_hook_in_a_torch_encoder_is_refused() -> None:
    where = by_hand({"q": RAW["q"], "o": "self_attn.out_proj"})
    model = mmadapters.init(layers(), sites=where, example_inputs=(example(),))
    with pytest.raises(InertAdapterError, match=r"text\.blocks\.0\.attn\.o .*never called"):
        model.add_adapter("a", LoRAConfig(rank=2, targets=("o",)))
    assert model.adapter_names == ()


class FastOnly(nn.Module):
    """Calls torch's fused layer itself in inference, as `nn.TransformerEncoderLayer` does where
    it sees no hook, and the layer's own forward otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers().layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.is_grad_enabled():
                x = layer(x)
                continue
            attn = layer.self_attn
            x = torch._transformer_encoder_layer_fwd(
                x,
                attn.embed_dim,
                attn.num_heads,
                attn.in_proj_weight,
                attn.in_proj_bias,
                attn.out_proj.weight,
                attn.out_proj.bias,
                False,
                False,
                layer.norm1.eps,
                layer.norm1.weight,
                layer.norm1.bias,
                layer.norm2.weight,
                layer.norm2.bias,
                layer.linear1.weight,
                layer.linear1.bias,
                layer.linear2.weight,
                layer.linear2.bias,
            )
        return x


@pytest.mark.parametrize(
    ("config", "site"),
    [
        (BottleneckConfig(size=4), r"text\.blocks\.0\.attn"),
        (LoRAConfig(rank=2, targets=("up",)), r"text\.blocks\.0\.ffn\.up"),
    ],
    ids=["bottleneck", "lora"],
)
def test_layer_bypassed_by_the_fast_path_is_refused(config: MethodConfig, site: str) -> None:
    model = mmadapters.init(FastOnly(), sites=by_hand(RAW), example_inputs=(example(),))
    with torch.no_grad():
        expected = model(example())
    with pytest.raises(InertAdapterError, match=f"{site} would be inert: in eval mode without"):
        model.add_adapter("a", config)
    with torch.no_grad():
        assert torch.equal(model(example()), expected)


@pytest.mark.parametrize("train_trunk", [False, True], ids=["trunk-in-eval", "trunk-in-train"])
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2, targets=("q", "k", "v", "o", "up", "down")),
        BottleneckConfig(size=4),
        SSFConfig(),
    ],
    ids=lambda config: config.method,
)
def test_torch_encoder_described_by_hand_is_adapted_in_train_and_eval(
    config: MethodConfig, train_trunk: bool
) -> None:
    encoder = layers()
    x = example()
    with torch.no_grad():
        bare = encoder(x)
    model = mmadapters.init(
        encoder, sites=by_hand(RAW), example_inputs=(x,), train_trunk=train_trunk
    )
    model.add_adapter("a", config)
    model.set_active_adapters("a")
    with torch.no_grad():
        # torch leaves its fused layer where there is a hook: equal but for the last bits.
        torch.testing.assert_close(model(x), bare, atol=1e-6, rtol=0)
        with model.using(None):
            torch.testing.assert_close(model(x), bare, atol=1e-6, rtol=0)
    model.train_adapter("a")
    optimizer = torch.optim.SGD(model.adapter("a").parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of([model(x)]).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in model.adapter("a").parameters())
    trained = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, atol=1e-6, rtol=1e-5)
    assert (trained - bare).abs().max() > 1e-4
    with torch.no_grad():
        assert torch.equal(model.detach()(x), bare)


def test_deleting_an_adapter_leaves_no_other_one_inert_in_a_torch_encoder() -> None:
    x = example()
    model = mmadapters.init(layers(), sites=by_hand(RAW), example_inputs=(x,))
    model.add_adapter("hooks", BottleneckConfig(size=4))
    model.add_adapter("prefix", PrefixConfig(length=2))
    model.set_active_adapters("prefix")
    with torch.no_grad():
        expected = model(x)
        model.delete_adapter("hooks")
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "setup",
    [Route(["a", "b"]), Split("a", "b", splits=(2,)), BatchSplit("a", "b", batch_sizes=(1, 1))],
    ids=lambda setup: type(setup).__name__,
)
def test_changes_that_equal_no_weight_act_in_the_inference_of_a_torch_encoder(
    setup: Composition,
) -> None:
    """torch's fused layer reads weights past the attention, and these compositions have none."""
    x = torch.randn(2, 5, WIDTH)
    model = mmadapters.init(layers(), sites=by_hand(RAW), example_inputs=(x,))
    for name in ("a", "b"):
        model.add_adapter(name, LoRAConfig(rank=2, targets=("q", "v", "o")))
        randomise(model.adapter(name))
    model.set_active_adapters(setup)
    with torch.no_grad():
        here = model(x)
        with model.using("a"):
            first = model(x)
        with model.using("b"):
            second = model(x)
    # With a gradient to compute torch leaves its fused layer by itself.
    torch.testing.assert_close(model(x.clone().requires_grad_()).detach(), here)
    if not isinstance(setup, Split):
        torch.testing.assert_close(here, torch.stack([first[0], second[1]]))
    assert (here - first).abs().max() > 1e-3
    model.delete_adapter("b")
    model.delete_adapter("a")
    assert not any(module._forward_pre_hooks for module in model.backbone.modules())


def test_change_that_half_precision_rounds_away_is_not_taken_for_none() -> None:
    encoder = Encoder().to(torch.bfloat16)
    with torch.no_grad():
        for block in encoder.blocks:
            block.mlp[2].weight.mul_(1e-4)
    weights = state(encoder)
    x = example()
    model = mmadapters.init(encoder, sites=sites(), example_inputs=(x.to(torch.bfloat16),))
    model.add_adapter("a", LoRAConfig(rank=1, targets=("up",)))
    assert model.adapter_names == ("a",)
    assert same_state(encoder, weights)
    with torch.no_grad():
        for parameter in model.adapter("a").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert not _changes(model, x.to(torch.bfloat16))
        assert _changes(model.float(), x)


def _changes(model: mmadapters.AdapterModel, x: Tensor) -> bool:
    with model.using("a"):
        after = model(x)
    return not torch.equal(after, model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_ignored_in_inference_alone_is_refused_in_every_precision(
    dtype: torch.dtype,
) -> None:
    encoder = Encoder(IgnoresMlpInInference).to(dtype)
    weights = state(encoder)
    model = mmadapters.init(encoder, sites=sites(), example_inputs=(example().to(dtype),))
    message = r"vision\.blocks\.1\.ffn would be inert: in eval mode without .*no output changes"
    with pytest.raises(InertAdapterError, match=message):
        model.add_adapter("a", BottleneckConfig(size=4, sites=("vision.blocks.1.ffn",)))
    assert model.adapter_names == ()
    assert same_state(encoder, weights)
