"""Convpass and Mona against loops over the grid of patches, in every library and on any image."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import seeded, twins
from families.vision import HF, TIMM
from families.vision_language import TEXT, VISION, tokens
from methods.reference import (
    Array,
    assert_close,
    gelu,
    layer_norm,
    numbers,
    randomise,
    sigmoid,
)
from open_clip import model as open_clip
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmadapters import (
    AdapterModel,
    Architecture,
    Average,
    BatchSplit,
    ConvpassConfig,
    Fuse,
    LoRAConfig,
    MethodConfig,
    MonaConfig,
    Parallel,
    PatchSpec,
    PromptConfig,
    Route,
    Split,
    Stack,
    SublayerSpec,
    TowerSpec,
    init,
)
from mmadapters.sites.sitemap import Grid

METHODS: dict[str, MethodConfig] = {
    "convpass": ConvpassConfig(size=4, scale=0.7, sites=("vision",)),
    "mona": MonaConfig(size=4, sites=("vision",)),
}
each_method = pytest.mark.parametrize("method", METHODS)
WIDE, TALL, SQUARE = (24, 40), (40, 16), (32, 32)  # 3 x 5, 5 x 2 and 4 x 4 patches of 8 pixels
ANY = {"interpolate_pos_encoding": True}


def images(size: tuple[int, int] = WIDE, seed: int = 5) -> Tensor:
    """(2, 3, H, W) in float64, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)


def timm_vit(of: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    settings = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
    return seeded(lambda: of(**{**TIMM, **settings, **options}))


def hf_vit(kind: str, **options: Any) -> nn.Module:
    def make() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**{**HF, **options})
        return getattr(transformers, f"{kind}Model")(config)

    return seeded(make)


def hf_clip(kind: str) -> nn.Module:
    def make() -> nn.Module:
        vision = getattr(transformers, f"{kind}VisionConfig")(**VISION, projection_dim=32)
        text = getattr(transformers, f"{kind}TextConfig")(**TEXT, projection_dim=32)
        config = getattr(transformers, f"{kind}Config")(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32
        )
        return getattr(transformers, f"{kind}Model")(config)

    return seeded(make)


def open_clip_model() -> nn.Module:
    vision = open_clip.CLIPVisionCfg(
        layers=2, width=32, head_width=16, patch_size=8, image_size=WIDE
    )
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2)
    return seeded(lambda: open_clip.CLIP(32, vision, text))


def positional(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def pixel_values(model: nn.Module, x: Tensor) -> Any:
    return model(pixel_values=x)


def any_pixel_values(model: nn.Module, x: Tensor) -> Any:
    return model(pixel_values=x, **ANY)


def with_text(model: nn.Module, x: Tensor) -> Any:
    return model(pixel_values=x, input_ids=tokens(), **ANY)


def with_text_behind(model: nn.Module, x: Tensor) -> Any:
    return model(x, tokens())


@dataclass(frozen=True)
class Case:
    """A model, how it is called with images of `size`, and the tokens before its patches."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor], Any]
    num_prefix_tokens: int
    size: tuple[int, int] = WIDE


CASES: dict[str, Case] = {
    "timm-vit": Case(timm_vit, positional, 1),
    "timm-tall": Case(timm_vit, positional, 1, TALL),
    "timm-registers": Case(lambda: timm_vit(reg_tokens=3), positional, 4),
    "timm-patches-alone": Case(
        lambda: timm_vit(class_token=False, global_pool="avg"), positional, 0
    ),
    "timm-padded": Case(lambda: timm_vit(dynamic_img_pad=True), positional, 1, (20, 33)),
    "timm-distilled": Case(
        lambda: timm_vit(VisionTransformerDistilled, num_classes=5, global_pool="token"),
        positional,
        2,
    ),
    "timm-eva": Case(lambda: timm_vit(Eva, use_rot_pos_emb=True, num_reg_tokens=2), positional, 3),
    "hf-vit": Case(lambda: hf_vit("ViT"), any_pixel_values, 1),
    "hf-deit": Case(lambda: hf_vit("DeiT"), any_pixel_values, 2),
    "hf-dinov2": Case(lambda: hf_vit("Dinov2", mlp_ratio=2), pixel_values, 1, TALL),
    "hf-registers": Case(
        lambda: hf_vit("Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=3), pixel_values, 4
    ),
    "hf-dinov3": Case(lambda: hf_vit("DINOv3ViT", num_register_tokens=2), pixel_values, 3),
    "hf-beit": Case(lambda: hf_vit("Beit"), pixel_values, 1, SQUARE),
    "hf-clip": Case(lambda: hf_clip("CLIP"), with_text, 1),
    "hf-siglip": Case(lambda: hf_clip("Siglip"), with_text, 0),
    "open_clip": Case(open_clip_model, with_text_behind, 1),
}
each_case = pytest.mark.parametrize("name", CASES)


def adapted(build: Callable[[], nn.Module], *configs: MethodConfig, **options: Any) -> AdapterModel:
    """The model in float64 with random adapters `a`, `b`, ..., all active."""
    model = init(build().double(), **options)
    names = "abc"[: len(configs)]
    for seed, (name, config) in enumerate(zip(names, configs, strict=True)):
        model.add_adapter(name, config)
        randomise(model.adapter(name), seed)
    model.set_active_adapters(tuple(names))
    return model


@dataclass
class Seen:
    """What passed one sublayer: stream x, input n, branch u and what the adapters made of it."""

    x: Array
    n: Array
    u: Array
    changed: Array


def first(value: Any) -> Array:
    tensor = value if isinstance(value, Tensor) else value[0]
    return tensor.detach().numpy().copy()


def watched(model: AdapterModel, run: Callable[[nn.Module], Any]) -> dict[str, Seen]:
    """By sublayer of the image tower, what plain torch hooks before and behind ours see."""
    seen: dict[str, dict[str, Array]] = {}
    handles = []
    for block in model.sites.towers["vision"].blocks:
        for part in block.sublayers.values():
            kept = seen.setdefault(part.name, {})

            def enter(
                module: nn.Module, args: tuple, kwargs: dict, *, kept: dict = kept, key: str
            ) -> None:
                kept[key] = first(args[0] if args else kwargs["hidden_states"])

            def leave(
                module: nn.Module, args: tuple, output: Any, *, kept: dict = kept, key: str
            ) -> None:
                kept[key] = first(output)

            for module, key in ((part.residual, "x"), (part.input, "n")):
                hook = _bound(enter, key)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for key in ("u", "changed"):
                hook = _bound(leave, key)
                handles.append(part.output.register_forward_hook(hook, prepend=key == "u"))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Seen(**kept) for name, kept in seen.items()}


def _bound(function: Callable, key: str) -> Callable:
    return lambda *given: function(*given, key=key)


def convolved(z: Array, weight: Array, bias: Array, grid: Grid) -> Array:
    """z (B, N, r) by a kernel (r, r or 1, k, k), one patch and one tap after another; tokens that
    are no patches meet the centre tap alone."""
    prefix, height, width = grid
    depthwise, middle = weight.shape[1] == 1, weight.shape[2] // 2

    def tap(value: Array, dy: int, dx: int) -> Array:
        kernel = weight[:, :, dy + middle, dx + middle]
        return value * kernel[:, 0] if depthwise else value @ kernel.T

    out = np.empty_like(z)
    for token in range(z.shape[1]):
        patch = token - prefix
        if not 0 <= patch < height * width:
            out[:, token] = tap(z[:, token], 0, 0) + bias
            continue
        row, column = divmod(patch, width)
        total = np.zeros_like(z[:, token])
        for dy in range(-middle, middle + 1):
            for dx in range(-middle, middle + 1):
                y, x = row + dy, column + dx
                if 0 <= y < height and 0 <= x < width:
                    total += tap(z[:, prefix + y * width + x], dy, dx)
        out[:, token] = total + bias
    return out


def quick_gelu(x: Array) -> Array:
    return x * sigmoid(1.702 * x)


def change(method: str, p: dict[str, Array], site: str, seen: Seen, grid: Grid) -> Array:
    """What the method adds to the branch."""

    def linear(name: str, x: Array) -> Array:
        return x @ p[f"{site}/{name}.weight"].T + p[f"{site}/{name}.bias"]

    def convolution(name: str, z: Array) -> Array:
        return convolved(z, p[f"{site}/{name}.weight"], p[f"{site}/{name}.bias"], grid)

    if method == "convpass":
        z = quick_gelu(linear("down", seen.n))
        return 0.7 * linear("up", quick_gelu(convolution("conv", z)))
    h = seen.x + seen.u
    normed = layer_norm(h, p[f"{site}/norm.weight"], p[f"{site}/norm.bias"])
    v = linear("down", normed * p[f"{site}/gain"] + h * p[f"{site}/gain_x"])
    t = v + (convolution("conv3", v) + convolution("conv5", v) + convolution("conv7", v)) / 3
    return linear("up", gelu(t + convolution("mix", t)))


def grid_of(case: Case) -> Grid:
    return Grid(case.num_prefix_tokens, -(-case.size[0] // 8), -(-case.size[1] // 8))


@each_method
@each_case
def test_every_branch_is_the_written_out_one(name: str, method: str) -> None:
    case = CASES[name]
    model = adapted(case.build, METHODS[method])
    p, grid = numbers(model), grid_of(case)
    found = watched(model, lambda model: case.call(model, images(case.size)))
    assert len(found) == 4
    for site, seen in found.items():
        assert seen.u.shape[1] == grid.num_prefix_tokens + grid.height * grid.width
        expected = seen.u + change(method, p, site, seen, grid)
        assert_close(seen.changed, expected, 1e-9)
        assert np.abs(seen.changed - seen.u).max() > 1e-3


@each_method
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-registers", "hf-vit"])
def test_prompts_behind_the_patches_pass_through_the_centre_tap(
    name: str, deep: bool, method: str
) -> None:
    case = CASES[name]
    model = adapted(case.build, METHODS[method], PromptConfig(length=3, deep=deep))
    p, grid = numbers(model), grid_of(case)
    found = watched(model, lambda model: case.call(model, images(case.size)))
    for site, seen in found.items():
        assert seen.u.shape[1] == grid.num_prefix_tokens + grid.height * grid.width + 3
        assert_close(seen.changed, seen.u + change(method, p, site, seen, grid), 1e-9)


@each_method
def test_blocks_that_take_tokens_before_the_batch_give_the_same(method: str) -> None:
    def tokens_first() -> nn.Module:
        model = open_clip_model()
        model.visual.transformer.batch_first = False
        for block in model.visual.transformer.resblocks:
            block.attn.batch_first = False
        return model

    model, other = (adapted(build, METHODS[method]) for build in (open_clip_model, tokens_first))
    assert not other.sites.towers["vision"].batch_first
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(other(x, tokens())[0], model(x, tokens())[0])
        with model.using(None):
            assert (other(x, tokens())[0] - model(x, tokens())[0]).abs().max() > 1e-3


@each_method
def test_autocast_computes_nearly_the_same(method: str) -> None:
    model = adapted(timm_vit, METHODS[method]).float()
    x = images().float()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()


@each_method
def test_each_image_has_its_own_grid(method: str) -> None:
    """Also with as many patches in another shape, which nothing but the image can tell."""
    model = adapted(timm_vit, METHODS[method])
    found = {}
    with torch.no_grad():
        for size in (WIDE, SQUARE, TALL, (40, 24), WIDE):
            out = model(images(size))
            assert torch.equal(out, found.setdefault(size, out))
        alone = {size: adapted(timm_vit, METHODS[method])(images(size)) for size in found}
    assert all(torch.equal(out, alone[size]) for size, out in found.items())


@each_method
def test_threads_with_images_of_other_shapes_do_not_meet(method: str) -> None:
    model = adapted(timm_vit, METHODS[method])
    sizes = (WIDE, (40, 24), TALL)
    with torch.no_grad():
        expected = {size: model(images(size)) for size in sizes}
    wrong: list[tuple[int, int]] = []
    gate = threading.Barrier(len(sizes))

    def run(size: tuple[int, int]) -> None:
        gate.wait()
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(images(size)), expected[size]):
                    wrong.append(size)

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@each_method
def test_checkpointed_blocks_see_the_grid_of_their_own_image(method: str) -> None:
    """Backward runs a block anew after another image has passed."""

    def gradients(checkpointed: bool) -> list[Tensor]:
        model = adapted(timm_vit, METHODS[method])
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train_adapter("a")
        model.eval()
        losses = [(model(images(size)) ** 2).mean() for size in (WIDE, (40, 24), SQUARE)]
        for loss in reversed(losses):
            loss.backward()
        assert not model.store.runtime.local.stash
        return [p.grad for p in model.adapter("a").parameters() if p.grad is not None]

    plain, anew = gradients(False), gradients(True)
    assert len(plain) == len(anew) > 0
    for one, other in zip(plain, anew, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_method
@pytest.mark.parametrize("name", ["timm-registers", "hf-vit", "open_clip"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_model_follows_the_shape_of_the_image(name: str, method: str) -> None:
    case = CASES[name]
    model = adapted(case.build, METHODS[method])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    sizes = [WIDE] if name == "open_clip" else [WIDE, WIDE, (40, 24), TALL]
    counters = torch._dynamo.utils.counters
    for number, size in enumerate(sizes):
        with torch.no_grad():
            found = case.call(compiled, images(size))
            expected = case.call(model, images(size))
        for one, other in zip(_flat(found), _flat(expected), strict=True):
            torch.testing.assert_close(one, other)
        if number == 0:
            frames = counters["stats"]["unique_graphs"]
        if number == 1:
            assert counters["stats"]["unique_graphs"] == frames
    assert not model.store.runtime.local.stash


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [v for v in values if isinstance(v, Tensor)]


@each_method
def test_nothing_is_left_behind_by_a_forward_pass(method: str) -> None:
    model = adapted(timm_vit, METHODS[method])
    with torch.no_grad():
        model(images())
        with model.using(None):
            model(images())
    assert not model.store.runtime.local.stash


@each_method
def test_without_the_lowest_blocks_it_is_the_adapter_of_the_upper_ones(method: str) -> None:
    model = adapted(timm_vit, METHODS[method])
    upper = init(timm_vit().double())
    upper.add_adapter("a", dataclasses.replace(METHODS[method], sites=("vision.blocks.1",)))
    own = upper.adapter("a").tensors()
    whole = model.adapter("a").tensors()
    upper.adapter("a").load({key: whole[key] for key in own}, "the whole adapter")
    upper.set_active_adapters("a")
    with torch.no_grad(), model.using("a", drop=1):
        assert torch.equal(model(images()), upper(images()))
    assert not model.store.runtime.local.stash


@each_method
def test_dropped_patches_raise_at_add_adapter_and_a_frozen_trunk_drops_none(method: str) -> None:
    def dropping() -> nn.Module:
        return timm_vit(patch_drop_rate=0.5)

    with pytest.raises(ValueError, match=r"4 x 4 patches came with 8 of them: .*patch dropout"):
        adapted(lambda: timm_vit(patch_drop_rate=0.5, dynamic_img_size=False), METHODS[method],
                train_trunk=True)  # fmt: skip
    model = adapted(dropping, METHODS[method])
    model.train_adapter("a")
    assert model(images()).shape == (2, 16, 32)


@each_method
def test_blocks_without_an_image_raise(method: str) -> None:
    model = adapted(timm_vit, METHODS[method])
    with pytest.raises(ValueError, match="no image went through the encoder's patch embedding"):
        model.backbone.blocks[0](torch.zeros(1, 16, 32, dtype=torch.float64))


@each_method
def test_split_refuses_and_other_compositions_hold_it(method: str) -> None:
    config = METHODS[method]
    model = adapted(timm_vit, config, config, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=f"Split cannot hold 'a', a {method}: it convolves"):
        model.set_active_adapters(Split("a", "c", splits=(4,)))
    with pytest.raises(ValueError, match=f"Split cannot hold 'b', a {method}"):
        model.set_active_adapters(Average("a", Split("c", Stack("c", "b"), splits=(4,))))
    x = images()
    with torch.no_grad():
        alone = {}
        for name in ("a", "b", "base"):
            with model.using(name):
                alone[name] = model(x)
        for setup in (Route(["a", "b"]), BatchSplit("a", "b", batch_sizes=(1, 1))):
            with model.using(setup):
                found = model(x)
            torch.testing.assert_close(found[0], alone["a"][0])
            torch.testing.assert_close(found[1], alone["b"][1])
        with model.using(Parallel("a", "base", "b")):
            expected = torch.cat([alone["a"], alone["base"], alone["b"]])
            torch.testing.assert_close(model(x), expected)
        with model.using(Average("a", "b", weights=(1, 0))):
            torch.testing.assert_close(model(x), alone["a"])
        with model.using(Average("a", Stack("b", "c"))):
            mixed = model(x)
        assert (mixed - alone["a"]).abs().max() > 1e-3
        model.add_adapter_fusion(["a", "b"])
        with model.using(Average("a", "b")):
            averaged = model(x)
        # A fresh fusion weighs its members alike, save for queries and keys near zero.
        for parameter in (f.query for _, f in model.fusions._modules["a,b"].entries()):
            parameter.weight.zero_(), parameter.bias.zero_()
        with model.using(Fuse("a", "b")):
            torch.testing.assert_close(model(x), averaged)


@each_method
@pytest.mark.parametrize("sites", [("*",), ("text.blocks.0",)], ids=str)
def test_a_tower_without_patches_is_refused(sites: tuple[str, ...], method: str) -> None:
    model = init(hf_clip("CLIP"))
    config = type(METHODS[method])(sites=sites)
    message = (
        f"{method} reads the grid of an image's patches, which tower 'text' of CLIPModel does not "
        r"have; name sites=\('vision',\)"
    )
    with pytest.raises(ValueError, match=message):
        model.add_adapter("a", config)
    with pytest.raises(ValueError, match="CLIPModel has no attn or ffn under sites="):
        model.add_adapter("a", type(config)(sites=("vision.norm",)))
    assert model.adapter_names == ()


class Own(nn.Module):
    """An encoder of nobody's library: patches of two by two pixels, one token before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, stride=2)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), patches], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x


def own_tower(patches: PatchSpec | None) -> Architecture:
    ffn = SublayerSpec(
        output="dropout2",
        residual="norm2",
        input="linear1",
        norm="norm2",
        leaves={"up": "linear1", "down": "linear2"},
    )
    tower = TowerSpec(name="vision", blocks="layers", sublayers={"ffn": ffn}, patches=patches)
    return Architecture(towers=(tower,))


@each_method
def test_an_own_encoder_says_where_its_patches_are(method: str) -> None:
    example = (torch.randn(1, 3, 4, 6, dtype=torch.float64),)
    with pytest.raises(ValueError, match="tower 'vision' of Own does not have; image encoders"):
        adapted(Own, METHODS[method], sites=own_tower(None), example_inputs=example)
    sites = own_tower(PatchSpec(path="embed"))
    model = adapted(Own, METHODS[method], sites=sites, example_inputs=example)
    p = numbers(model)
    found = watched(model, lambda model: model(images((6, 10))))
    assert len(found) == 2
    for site, seen in found.items():
        expected = seen.u + change(method, p, site, seen, Grid(1, 3, 5))
        assert_close(seen.changed, expected, 1e-9)
    with pytest.raises(ValueError, match="does not fit Own: Own has no module 'embde'"):
        init(Own(), sites=own_tower(PatchSpec(path="embde")))


@each_method
@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("twin", twins.TWINS, ids=lambda twin: f"{twin.source}-{twin.target}")
def test_one_file_serves_the_same_weights_in_another_library(
    twin: twins.Twin, back: bool, method: str, tmp_path: Path
) -> None:
    source, target, run, run_twin = twin.either_way(back=back)
    # Of an image tower and a text tower the first: these methods act on images alone.
    runs = [lambda model, own=own: own(model)[:1] for own in (run, run_twin)]
    twins.assert_alike(source, target, *runs, tmp_path, METHODS[method])


def test_convpass_starts_as_the_bottleneck_without_its_neighbours() -> None:
    model = init(timm_vit().double())
    model.add_adapter("a", ConvpassConfig(size=4))
    for _, module in model.adapter("a").entries():
        assert torch.equal(module.conv.weight[:, :, 1, 1], torch.eye(4, dtype=torch.float64))
        assert module.conv.weight.count_nonzero() == 4
        assert not any(p.any() for p in (module.up.weight, module.up.bias, module.conv.bias))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ConvpassConfig, {"size": 0}, "size must be a whole number of at least 1, not 0"),
        (ConvpassConfig, {"size": 2.5}, "size must be a whole number"),
        (ConvpassConfig, {"scale": 0}, "scale must not be 0"),
        (ConvpassConfig, {"scale": float("inf")}, "scale must be a finite number"),
        (ConvpassConfig, {"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        (MonaConfig, {"size": True}, "size must be a whole number"),
        (MonaConfig, {"dropout": -0.1}, "dropout must be at least 0"),
        (MonaConfig, {"sites": "vision"}, r"sites=\('vision',\)"),
    ],
    ids=str,
)
def test_bad_options_are_refused(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@each_method
def test_it_cannot_be_merged_and_says_why(method: str) -> None:
    model = adapted(timm_vit, METHODS[method])
    with pytest.raises(ValueError, match="'a' cannot be merged: a convolution mixes tokens"):
        model.merge_adapter("a")
