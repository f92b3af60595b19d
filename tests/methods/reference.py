"""timm's VisionTransformer written out in NumPy, in float64: what adapted models are compared with.

A test subclasses `ReferenceViT` and overrides the one step that its method changes. Nothing here
uses mmadapters, but for the names of sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from families import seeded
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmadapters import AdapterModel, MethodConfig, init

Array = NDArray[np.float64]
WIDTH, HIDDEN, DEPTH, HEADS, SIZE, PATCH = 32, 64, 2, 2, 16, 8
EPSILON = 1e-6
ATTN_SITES = tuple(f"vision.blocks.{index}.attn" for index in range(DEPTH))
FFN_SITES = tuple(f"vision.blocks.{index}.ffn" for index in range(DEPTH))


def tiny_vit() -> nn.Module:
    """Depth 2, width 32, in float64; gives the normed tokens (B, 5, 32)."""

    def make() -> nn.Module:
        return VisionTransformer(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=HIDDEN / WIDTH,
            num_classes=0,
            global_pool="",
        )

    return seeded(make).double()


def images() -> Tensor:
    """(2, 3, 16, 16) in float64, always the same."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 3, std: float = 0.3) -> None:
    """Every parameter normal: none is left at the 0 or 1 that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(std * noise)


def adapted(*configs: MethodConfig) -> AdapterModel:
    """The tiny model with random adapters `a`, `b`, ... of `configs`, all active, in that order."""
    model = init(tiny_vit())
    names = "abc"[: len(configs)]
    for seed, (name, config) in enumerate(zip(names, configs, strict=True)):
        model.add_adapter(name, config)
        randomise(model.adapter(name), seed)
    model.set_active_adapters(tuple(names))
    return model


@torch.no_grad()
def output(model: nn.Module) -> Array:
    return model(images()).numpy()


def numbers(model: AdapterModel, name: str = "a") -> dict[str, Array]:
    """The tensors of an adapter by `<site>/<parameter>`, whatever the method is called."""
    found: dict[str, Array] = {}
    for key, tensor in model.adapter(name).tensors().items():
        place, parameter = key.split("/", 1)
        found[f"{place.split('#')[0]}/{parameter}"] = tensor.detach().double().numpy()
    return found


class ReferenceViT:
    """The frozen model; `p`: the numbers of an adapter, for subclasses."""

    def __init__(self, vit: nn.Module, p: dict[str, Array] | None = None) -> None:
        self.p = p or {}
        state = {name: tensor.double().numpy() for name, tensor in vit.state_dict().items()}
        self.state = state
        self.weight: dict[str, Array] = {"vision.norm": state["norm.weight"]}
        self.bias: dict[str, Array] = {"vision.norm": state["norm.bias"]}
        for i in range(DEPTH):
            site, block = f"vision.blocks.{i}", f"blocks.{i}"
            for kind, table in (("weight", self.weight), ("bias", self.bias)):
                q, k, v = np.split(state[f"{block}.attn.qkv.{kind}"], 3)
                table |= {f"{site}.attn.q": q, f"{site}.attn.k": k, f"{site}.attn.v": v}
                table[f"{site}.attn.o"] = state[f"{block}.attn.proj.{kind}"]
                table[f"{site}.ffn.up"] = state[f"{block}.mlp.fc1.{kind}"]
                table[f"{site}.ffn.down"] = state[f"{block}.mlp.fc2.{kind}"]
                table[f"{site}.attn.norm"] = state[f"{block}.norm1.{kind}"]
                table[f"{site}.ffn.norm"] = state[f"{block}.norm2.{kind}"]

    def __call__(self) -> Array:
        x = self.embed(images().numpy())
        for index in range(DEPTH):
            x = self.block(f"vision.blocks.{index}", x)
        return self.norm("vision.norm", x)

    def embed(self, pixels: Array) -> Array:
        batch, channels, side = pixels.shape[0], pixels.shape[1], SIZE // PATCH
        patches = pixels.reshape(batch, channels, side, PATCH, side, PATCH)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
        kernel = self.state["patch_embed.proj.weight"].reshape(WIDTH, -1)
        x = patches @ kernel.T + self.state["patch_embed.proj.bias"]
        first = np.broadcast_to(self.state["cls_token"], (batch, 1, WIDTH))
        return np.concatenate([first, x], axis=1) + self.state["pos_embed"]

    def block(self, site: str, x: Array) -> Array:
        n = self.norm(f"{site}.attn.norm", x)
        u = self.attention(f"{site}.attn", n)
        x = x + self.branch(f"{site}.attn", u, x, n)
        n = self.norm(f"{site}.ffn.norm", x)
        u = self.feed_forward(f"{site}.ffn", n)
        return x + self.branch(f"{site}.ffn", u, x, n)

    def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
        """What is added to the residual stream x, from the sublayer's output u and input n."""
        return u

    def attention(self, site: str, n: Array) -> Array:
        q, k, v = (self.linear(f"{site}.{role}", n) for role in "qkv")
        k, v = self.keys_values(site, n, k, v)
        q, k, v = (heads(part) for part in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(WIDTH // HEADS)
        return self.linear(f"{site}.o", unheads(self.shares(site, n, scores) @ v))

    def shares(self, site: str, n: Array, scores: Array) -> Array:
        return softmax(scores)

    def keys_values(self, site: str, n: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return k, v

    def feed_forward(self, site: str, n: Array) -> Array:
        return self.linear(f"{site}.down", gelu(self.linear(f"{site}.up", n)))

    def linear(self, site: str, x: Array) -> Array:
        return x @ self.weight[site].T + self.bias[site]

    def norm(self, site: str, x: Array) -> Array:
        return layer_norm(x, self.weight[site], self.bias[site], EPSILON)


def heads(x: Array) -> Array:
    """(B, N, D) -> (B, H, N, D/H)"""
    batch, length, _ = x.shape
    return x.reshape(batch, length, HEADS, -1).transpose(0, 2, 1, 3)


def unheads(x: Array) -> Array:
    """(B, H, N, d) -> (B, N, H d)"""
    batch, _, length, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float = 1e-5) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * weight + bias


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "identity": lambda x: x,
}


def assert_close(actual: Array, expected: Array, bound: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < bound


def assert_acts(model: AdapterModel) -> None:
    """The adapter changes the output by far more than any bound above."""
    with model.using(None):
        plain = output(model)
    assert np.abs(output(model) - plain).max() > 1e-4
