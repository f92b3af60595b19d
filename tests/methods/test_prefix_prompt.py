"""Prefix and prompt tuning against explicit attention and explicit token lists."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from methods.reference import (
    ATTN_SITES,
    DEPTH,
    Array,
    ReferenceViT,
    adapted,
    assert_acts,
    assert_close,
    heads,
    images,
    numbers,
    output,
    randomise,
    softmax,
    tiny_vit,
    unheads,
)
from timm.layers.attention import Attention
from torch import Tensor, nn

from mmadapters import (
    Architecture,
    PrefixConfig,
    PromptConfig,
    Stack,
    SublayerSpec,
    TowerSpec,
    init,
)
from mmadapters.sites.tables import describe


class WithPrefix(ReferenceViT):
    """softmax(q [P_k; k]^T / sqrt(d)) [P_v; v]"""

    def prefix(self, site: str) -> tuple[Array, Array]:
        return self.p[f"{site}/keys"], self.p[f"{site}/values"]

    def keys_values(self, site: str, n: Array, k: Array, v: Array) -> tuple[Array, Array]:
        keys, values = (np.broadcast_to(p, (len(k), *p.shape)) for p in self.prefix(site))
        return np.concatenate([keys, k], axis=1), np.concatenate([values, v], axis=1)


class WithReparametrisedPrefix(WithPrefix):
    def prefix(self, site: str) -> tuple[Array, Array]:
        p = {name: self.p[f"{site}/{name}"] for name in ("embedding", "inner.weight", "inner.bias")}
        hidden = np.tanh(p["embedding"] @ p["inner.weight"].T + p["inner.bias"])
        both = hidden @ self.p[f"{site}/outer.weight"].T + self.p[f"{site}/outer.bias"]
        keys, values = np.split(both, 2, axis=1)
        return keys, values


class WithPrompts(ReferenceViT):
    """Deep: own tokens for each block, removed behind it."""

    def block(self, site: str, x: Array) -> Array:
        tokens = self.p[f"{site}/tokens"]
        tokens = np.broadcast_to(tokens, (len(x), *tokens.shape))
        return super().block(site, np.concatenate([x, tokens], axis=1))[:, : x.shape[1]]


class WithShallowPrompts(ReferenceViT):
    """Tokens enter the first block and leave behind the last."""

    def block(self, site: str, x: Array) -> Array:
        tokens = self.p["vision.blocks.0/tokens"]
        if site == "vision.blocks.0":
            tokens = np.broadcast_to(tokens, (len(x), *tokens.shape))
            x = np.concatenate([x, tokens], axis=1)
        x = super().block(site, x)
        last = site == f"vision.blocks.{DEPTH - 1}"
        return x[:, : -self.p["vision.blocks.0/tokens"].shape[0]] if last else x


@pytest.mark.parametrize(
    ("config", "written_out"),
    [
        (PrefixConfig(length=3), WithPrefix),
        (PrefixConfig(length=1), WithPrefix),
        (PrefixConfig(length=4, reparametrise=6), WithReparametrisedPrefix),
        (PromptConfig(length=3), WithPrompts),
        (PromptConfig(length=2, deep=False), WithShallowPrompts),
    ],
    ids=str,
)
def test_adapted_model_is_the_written_out_one(config: Any, written_out: type) -> None:
    model = adapted(config)
    randomise(model.adapter("a"), std=1.0)
    assert_close(output(model), written_out(model.backbone, numbers(model))())
    assert_acts(model)


def test_two_prefixes_stand_in_the_order_of_the_stack() -> None:
    model = adapted(PrefixConfig(length=2), PrefixConfig(length=3))
    a, b = numbers(model, "a"), numbers(model, "b")

    class Both(WithPrefix):
        def prefix(self, site: str) -> tuple[Array, Array]:
            keys, values = (
                np.concatenate([a[f"{site}/{kind}"], b[f"{site}/{kind}"]])
                for kind in ("keys", "values")
            )
            return keys, values

    assert_close(output(model), Both(model.backbone)())


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_deep_and_shallow_prompts_act_together_in_any_order(order: str) -> None:
    model = adapted(PromptConfig(length=2, deep=False), PromptConfig(length=2))
    randomise(model.adapter("a"), 1, std=1.0)
    randomise(model.adapter("b"), 2, std=1.0)
    model.set_active_adapters(Stack(*order))
    deep = numbers(model, "b")

    class Both(WithShallowPrompts):
        def block(self, site: str, x: Array) -> Array:
            tokens, shallow = deep[f"{site}/tokens"], self.p["vision.blocks.0/tokens"]
            tokens, shallow = (np.broadcast_to(t, (len(x), *t.shape)) for t in (tokens, shallow))
            if site == "vision.blocks.0":
                x = np.concatenate([x, shallow], axis=1)
            x = ReferenceViT.block(self, site, np.concatenate([x, tokens], axis=1))[:, :-2]
            return x[:, :-2] if site == f"vision.blocks.{DEPTH - 1}" else x

    assert_close(output(model), Both(model.backbone, numbers(model, "a"))())


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_leave_the_number_of_tokens_as_it_was(deep: bool) -> None:
    model = adapted(PromptConfig(deep=deep))
    assert model.forward_features(images()).shape == (2, 5, 32)


def masked_reference(
    attention: nn.Module, n: Array, keys: Array, values: Array, hidden: Array
) -> Array:
    """timm's attention over a prefix; `hidden` (B or 1, 1, N, N) is added to the scores of k."""
    qkv = n @ attention.qkv.weight.detach().numpy().T + attention.qkv.bias.detach().numpy()
    q, k, v = (heads(part) for part in np.split(qkv, 3, axis=-1))
    both = [heads(np.broadcast_to(p, (len(n), *p.shape))) for p in (keys, values)]
    scale = math.sqrt(q.shape[-1])
    scores = np.concatenate(
        [q @ both[0].swapaxes(-1, -2) / scale, q @ k.swapaxes(-1, -2) / scale + hidden], axis=-1
    )
    out = unheads(softmax(scores) @ np.concatenate([both[1], v], axis=2))
    return out @ attention.proj.weight.detach().numpy().T + attention.proj.bias.detach().numpy()


MASKS = {
    "boolean": lambda n: {"attn_mask": torch.rand(2, 1, n, n) > 0.4},
    "additive": lambda n: {"attn_mask": torch.randn(2, 1, n, n, dtype=torch.float64)},
}
if "is_causal" in inspect.signature(Attention.forward).parameters:  # In newer versions of timm.
    MASKS["causal"] = lambda n: {"is_causal": True}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_hide_tokens_and_never_the_prefix(kind: str) -> None:
    model = adapted(PrefixConfig(length=3))
    randomise(model.adapter("a"), std=1.0)
    attention = model.backbone.blocks[0].attn
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    options = MASKS[kind](6)
    mask = options.get("attn_mask", torch.ones(6, 6, dtype=torch.bool).tril())
    hidden = mask.numpy() if mask.dtype != torch.bool else np.where(mask.numpy(), 0, -np.inf)
    p = numbers(model)
    keys, values = (p[f"{ATTN_SITES[0]}/{name}"] for name in ("keys", "values"))
    with torch.no_grad():
        acting = attention(x, **options).numpy()
    assert_close(acting, masked_reference(attention, x.numpy(), keys, values, hidden), 1e-12)


class Block(nn.Module):
    """A pre-norm block around `nn.MultiheadAttention`, which computes attention by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mask: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.attn(n, n, n, **self.mask)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


MULTIHEAD = Architecture(
    towers=(
        TowerSpec(
            name="audio",
            blocks="blocks",
            sublayers={
                "attn": SublayerSpec(
                    output="attn",
                    residual="norm",
                    attention="attn",
                    leaves={
                        "q": "attn.in_proj_weight[0/3]",
                        "k": "attn.in_proj_weight[1/3]",
                        "v": "attn.in_proj_weight[2/3]",
                        "o": "attn.out_proj.weight",
                    },
                )
            },
        ),
    )
)
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
MULTIHEAD_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "without-weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "boolean": {"attn_mask": torch.eye(6).roll(1, 0).bool()},
    "additive-per-head": {"attn_mask": torch.linspace(-3, 3, 144).double().view(4, 6, 6)},
    "causal": {"attn_mask": torch.ones(6, 6).triu(1).bool(), "is_causal": True},
    "both": {"attn_mask": torch.eye(6).roll(1, 0).bool(), "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("kind", MULTIHEAD_MASKS)
def test_prefix_in_multihead_attention_obeys_every_mask(kind: str) -> None:
    encoder = Encoder().double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    model = init(encoder, sites=MULTIHEAD, example_inputs=(x,))
    model.add_adapter("a", PrefixConfig(length=3))
    randomise(model.adapter("a"), std=1.0)
    model.set_active_adapters("a")
    block, mask = encoder.blocks[0], MULTIHEAD_MASKS[kind]
    block.mask = mask

    state = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
    p = numbers(model)
    hidden = np.zeros((2, 1, 6, 6))
    if "attn_mask" in mask:
        given = mask["attn_mask"].numpy()
        as_added = given if given.dtype != bool else np.where(given, -np.inf, 0)
        hidden = hidden + (as_added.reshape(2, 2, 6, 6) if given.ndim == 3 else as_added)
    if "key_padding_mask" in mask:
        hidden = hidden + np.where(PADDING.numpy(), -np.inf, 0)[:, None, None]
    with torch.no_grad():
        n = block.norm(x).numpy()
        acting = model(x).numpy()
        weights = block.attn(block.norm(x), block.norm(x), block.norm(x), **mask)[1]
    attn = "blocks.0.attn"
    qkv = n @ state[f"{attn}.in_proj_weight"].T + state[f"{attn}.in_proj_bias"]
    q, k, v = np.split(qkv, 3, axis=-1)
    site = "audio.blocks.0.attn"
    keys, values = (np.broadcast_to(p[f"{site}/{name}"], (2, 3, 32)) for name in ("keys", "values"))
    q, k, v, keys, values = (heads(part) for part in (q, k, v, keys, values))
    scores = np.concatenate([q @ keys.swapaxes(-1, -2), q @ k.swapaxes(-1, -2)], axis=-1) / 4
    attention = softmax(scores + np.pad(hidden, ((0, 0), (0, 0), (0, 0), (3, 0))))
    out = unheads(attention @ np.concatenate([values, v], axis=2))
    out = out @ state[f"{attn}.out_proj.weight"].T + state[f"{attn}.out_proj.bias"]
    assert_close(acting, x.numpy() + out, 1e-12)
    if mask.get("need_weights", True):
        assert_close(weights.numpy(), attention.mean(axis=1), 1e-12)
    else:
        assert weights is None


@pytest.mark.parametrize(
    "config", [PrefixConfig(length=2), PrefixConfig(length=2, reparametrise=3)]
)
def test_gradients_of_prefixes_are_right(config: PrefixConfig) -> None:
    model = adapted(config)
    names = [name for name, _ in model.named_parameters() if name.startswith("adapters.")]
    given = [p.detach().clone().requires_grad_() for p in model.adapter("a").parameters()]

    def output_of(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (images()[:1],)
        )

    assert torch.autograd.gradcheck(output_of, given, fast_mode=True)


@pytest.mark.parametrize("deep", [True, False])
def test_gradients_of_prompts_are_right(deep: bool) -> None:
    model = adapted(PromptConfig(length=2, deep=deep))
    names = [name for name, _ in model.named_parameters() if name.startswith("adapters.")]
    given = [p.detach().clone().requires_grad_() for p in model.adapter("a").parameters()]

    def output_of(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (images()[:1],)
        )

    assert torch.autograd.gradcheck(output_of, given, fast_mode=True)


def test_modules_stand_where_their_kind_says() -> None:
    sites = describe(tiny_vit())[0]
    assert set(PrefixConfig().build(sites)) == set(ATTN_SITES)
    assert set(PromptConfig().build(sites)) == {"vision.blocks.0", "vision.blocks.1"}
    assert set(PromptConfig(deep=False).build(sites)) == {"vision.blocks.0"}
    assert set(PromptConfig(sites=("*.1",)).build(sites)) == {"vision.blocks.1"}


@pytest.mark.parametrize("cls", [PrefixConfig, PromptConfig])
@pytest.mark.parametrize("length", [0, -3, 2.5, "10", True, None], ids=repr)
def test_length_must_be_a_whole_number(cls: type, length: Any) -> None:
    with pytest.raises(ValueError, match="length must be a whole number of at least 1"):
        cls(length=length)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8"], ids=repr)
def test_width_of_the_reparametrisation_must_be_a_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="reparametrise must be a whole number of at least 1"):
        PrefixConfig(reparametrise=value)


def test_attention_that_computes_softmax_itself_cannot_take_a_prefix() -> None:
    vit = tiny_vit()
    for block in vit.blocks:
        block.attn.fused_attn = False
    model = init(vit)
    message = "prefix tuning cannot enter vision.blocks.0.attn of VisionTransformer"
    with pytest.raises(ValueError, match=message) as caught:
        model.add_adapter("a", PrefixConfig())
    assert "timm ViT" in str(caught.value)
    assert model.adapter_names == ()


def test_tower_that_fixes_its_length_cannot_take_prompts() -> None:
    fixed = Architecture(
        towers=tuple(
            TowerSpec(**{**vars(tower), "prompts": "its mask has a fixed length"})
            for tower in MULTIHEAD.towers
        )
    )
    model = init(Encoder(), sites=fixed, example_inputs=(torch.randn(1, 6, 32),))
    with pytest.raises(ValueError, match="tower 'audio' of Encoder: its mask has a fixed length"):
        model.add_adapter("a", PromptConfig())
    assert model.adapter_names == ()
