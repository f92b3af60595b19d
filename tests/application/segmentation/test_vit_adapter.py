"""ViT-Adapter on small encoders: its formulas and shapes, what it leaves alone, and a job of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from application.segmentation.scenes import CLASSES, SMALL_VIT, Scenes, batch_of, job, made, train
from families import seeded
from families.small import hooks, randomise
from pydantic import ValidationError
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmadapters import LoRAConfig, PromptConfig, init
from mmadapters.tasks import artifact
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.encoders.block_states import BlockStates
from mmadapters.tasks.encoders.vision import ImageTower
from mmadapters.tasks.jobs.model import sizes
from mmadapters.tasks.segmentation.config import HeadConfig, ViTAdapterConfig
from mmadapters.tasks.segmentation.heads.build import head_layers, make_head
from mmadapters.tasks.segmentation.heads.pyramid import resized
from mmadapters.tasks.segmentation.heads.vit_adapter import (
    CellLocations,
    NeckedHead,
    SpatialPrior,
    ViTAdapter,
    as_maps,
    as_tokens,
)

WIDTH, DEPTH = 32, 5
LAYERS = (0, 1, 2, 4)  # stages of 1, 1, 1 and 2 blocks
MODES = pytest.mark.parametrize("mode", ["frozen", "full"])


def _timm(of: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    base = {"patch_size": 16, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "num_classes": 0}
    settings: dict[str, Any] = {**base, **options}
    return seeded(lambda: of(img_size=4 * settings["patch_size"], **settings))


def _hf(name: str, **options: Any) -> nn.Module:
    base = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 16,
    }
    settings: dict[str, Any] = {**base, **options}
    config = getattr(transformers, f"{name}Config")(
        image_size=4 * settings["patch_size"], **settings
    )
    return seeded(lambda: getattr(transformers, f"{name}Model")(config))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "timm-class": _timm,
    "timm-registers-14": lambda: _timm(
        patch_size=14, reg_tokens=4, init_values=0.5, no_embed_class=True
    ),
    "timm-patches-8": lambda: _timm(patch_size=8, class_token=False, global_pool="avg"),
    "timm-rotary": lambda: _timm(
        Eva, use_rot_pos_emb=True, rope_type="dinov3", num_reg_tokens=2, use_abs_pos_emb=False
    ),
    "hf-vit": lambda: _hf("ViT"),
    "hf-dinov2-14": lambda: _hf("Dinov2", patch_size=14, mlp_ratio=2),
    "hf-dinov2-registers": lambda: _hf("Dinov2WithRegisters", num_register_tokens=2, mlp_ratio=2),
    "hf-dinov3": lambda: _hf("DINOv3ViT", num_register_tokens=2),
}
EVERY = pytest.mark.parametrize("name", ENCODERS)


def tower_of(name: str) -> ImageTower:
    return ImageTower(init(ENCODERS[name]()))


def neck_of(mode: Any = "frozen", **options: Any) -> ViTAdapter:
    settings: dict[str, Any] = {"heads": 2, "stem": 4, "extra": 1, **options}
    return ViTAdapter(WIDTH, ViTAdapterConfig(mode=mode, **settings))


def pixels(tower: ImageTower, grid: tuple[int, int] = (3, 5), batch: int = 2) -> Tensor:
    size = (grid[0] * tower.patch, grid[1] * tower.patch)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


@EVERY
@MODES
def test_levels_are_a_quarter_to_a_32nd_of_any_image(name: str, mode: str) -> None:
    tower, neck = tower_of(name), neck_of(mode)
    for grid in [(3, 5), (4, 4), (6, 2)]:
        x = pixels(tower, grid)
        levels = neck(tower, x, LAYERS)
        for level, stride in zip(levels, (4, 8, 16, 32), strict=True):
            height, width = (-(-side // stride) for side in x.shape[-2:])
            assert level.shape == (2, WIDTH, height, width)
            assert torch.isfinite(level).all()
    assert hooks(tower.encoder.backbone) == 0


def test_the_prior_is_convolutions_of_the_pixels() -> None:
    prior = SpatialPrior(WIDTH, inner=16).eval()
    x = torch.randn(1, 3, 64, 96)
    levels = prior(x)
    assert [tuple(level.shape) for level in levels] == [
        (1, WIDTH, 64 // s, 96 // s) for s in (4, 8, 16, 32)
    ]
    changed = x.clone()
    changed[..., :8, :8] += 1
    for level, other in zip(levels, prior(changed), strict=True):
        moved = (level - other).abs().sum(dim=1)[0] > 0
        assert moved[0, 0]
        assert not moved[-1, -1]


@torch.no_grad()
def test_extractor_and_injector_are_their_formulas() -> None:
    neck = neck_of("full")
    randomise(neck)
    grid, levels = (3, 5), [(6, 10), (3, 5), (2, 3)]
    places = CellLocations.of(grid, levels, torch.device("cpu"))
    x, c = torch.randn(2, 15, WIDTH), torch.randn(2, 60 + 15 + 6, WIDTH)

    def attend(part: Any, query: Tensor, points: Tensor, value: Tensor, grids: list) -> Tensor:
        return part.attention(part.query_norm(query), points, part.value_norm(value), grids)

    injector = neck.injectors[1]
    seen = attend(injector, x, places.patch_points, c, levels)
    torch.testing.assert_close(injector(x, c, places), x + injector.gamma * seen)

    extractor = neck.extractors[1]
    after = c + attend(extractor, c, places.level_points, x, [grid])
    hidden = extractor.ffn.up(extractor.ffn_norm(after))
    assert hidden.shape[-1] == WIDTH // 4
    mixed = [extractor.ffn.mix(level) for level in as_maps(hidden, levels)]
    mixed = torch.cat([level.flatten(2) for level in mixed], dim=2).transpose(1, 2)
    expected = after + extractor.ffn.down(nn.functional.gelu(mixed))
    torch.testing.assert_close(extractor(c, x, places), expected)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_full_goes_stage_by_stage(norm: bool) -> None:
    """Against the same parts called one after another in a loop over timm's own blocks."""
    vit: Any = _timm(reg_tokens=4)
    tower, neck = ImageTower(init(vit)), neck_of("full").eval()
    randomise(neck, std=0.1)
    x = pixels(tower, (4, 4))
    found = neck(tower, x, LAYERS, norm=norm)

    first, *levels = neck.prior(x)
    grids = [(level.shape[-2], level.shape[-1]) for level in levels]
    places = CellLocations.of((4, 4), grids, x.device)
    c = torch.cat(
        [as_tokens(y) + e for y, e in zip(levels, neck.level_embedding, strict=True)], dim=1
    )
    tokens = vit._pos_embed(vit.patch_embed(x))
    maps, start = [], 0
    for stage, last in enumerate(LAYERS):
        patches = neck.injectors[stage](tokens[:, 5:], c, places)
        tokens = torch.cat([tokens[:, :5], patches], dim=1)
        for block in vit.blocks[start : last + 1]:
            tokens = block(tokens)
        start = last + 1
        read = (vit.norm(tokens) if norm else tokens)[:, 5:]
        c = neck.extractors[stage](c, read, places)
        maps.append(read.transpose(1, 2).unflatten(2, (4, 4)))
    c = neck.extra[0](c, as_tokens(maps[-1]), places)
    second, third, fourth = as_maps(c, grids)
    expected = [
        bn(level + resized(y, level.shape[-2:]))
        for bn, level, y in zip(
            neck.norm, [first + neck.up(second), second, third, fourth], maps, strict=True
        )
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@EVERY
def test_frozen_makes_no_graph_in_the_encoder(name: str) -> None:
    tower, neck = tower_of(name), neck_of("frozen")
    graphs: list[bool] = []
    for block in tower.encoder.sites.towers["vision"].blocks:
        block.module.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    sum(level.square().sum() for level in neck(tower, pixels(tower), LAYERS)).backward()
    assert graphs == [False] * DEPTH
    assert all(p.grad is None for p in tower.encoder.parameters())
    assert not neck.injectors
    for key, parameter in neck.named_parameters():
        assert parameter.grad is not None, key


@MODES
def test_adapters_in_the_encoder_train_beside_the_neck(mode: str) -> None:
    tower, neck = tower_of("timm-class"), neck_of(mode)
    tower.encoder.add_adapter("a", LoRAConfig(rank=2))
    randomise(tower.encoder.adapter("a"))
    tower.encoder.train_adapter("a")
    sum(level.square().sum() for level in neck(tower, pixels(tower), LAYERS)).backward()
    for key, parameter in tower.encoder.adapter("a").named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key
    assert all(p.grad is None for p in tower.encoder.backbone.parameters())


@EVERY
def test_full_starts_as_the_encoder_and_its_gamma_learns(name: str) -> None:
    tower, neck = tower_of(name), neck_of("full")
    x = pixels(tower)
    with BlockStates(tower._tower, range(DEPTH)) as before:
        tower(x)
    with BlockStates(tower._tower, range(DEPTH)) as watch:
        levels = neck(tower, x, LAYERS)
    for layer in range(DEPTH):
        assert torch.equal(watch.states[layer], before.states[layer]), layer
    assert hooks(tower.encoder.backbone) == 0

    sum(level.square().sum() for level in levels).backward()
    for injector in neck.injectors:
        assert injector.gamma.grad.any()  # type: ignore[operator, union-attr]
    assert all(p.grad is None for p in tower.encoder.parameters())

    with torch.no_grad():
        for injector in neck.injectors:
            injector.gamma.fill_(0.1)  # type: ignore[operator, union-attr]
    with BlockStates(tower._tower, range(DEPTH)) as watch:
        neck(tower, x, LAYERS)
    for layer in range(DEPTH):
        assert not torch.allclose(watch.states[layer], before.states[layer]), layer
    with BlockStates(tower._tower, range(DEPTH)) as after:
        tower(x)
    for layer in range(DEPTH):
        assert torch.equal(after.states[layer], before.states[layer]), layer


@pytest.mark.parametrize("name", ["timm-registers-14", "hf-dinov2-registers"])
@torch.no_grad()
def test_only_patches_enter_a_block_changed(name: str) -> None:
    tower, neck = tower_of(name), neck_of("full")
    randomise(neck)
    x, entered = pixels(tower), []
    first = tower.encoder.sites.towers["vision"].blocks[0].module
    first.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    tower(x)
    neck(tower, x, LAYERS)
    plain, changed = entered
    prefix = plain.shape[1] - 15
    assert prefix > 1
    assert torch.equal(plain[:, :prefix], changed[:, :prefix])
    assert ((plain - changed)[:, prefix:].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("name", ["timm-class", "hf-dinov2-14"])
@torch.no_grad()
def test_prompts_are_no_patches(name: str) -> None:
    tower, neck = tower_of(name), neck_of("full").eval()
    tower.encoder.add_adapter("p", PromptConfig(length=3, deep=True))
    tower.encoder.set_active_adapters("p")
    x = pixels(tower)
    with BlockStates(tower._tower, range(DEPTH)) as before:
        tower(x)
    with BlockStates(tower._tower, range(DEPTH)) as watch:
        neck(tower, x, LAYERS)
    for layer in range(DEPTH):
        assert torch.equal(watch.states[layer], before.states[layer]), layer
    randomise(neck.injectors)
    with BlockStates(tower._tower, [0]) as watch:
        neck(tower, x, LAYERS)
    assert not torch.allclose(watch.states[0], before.states[0])


@torch.no_grad()
def test_another_thread_does_not_meet_the_injectors() -> None:
    tower, neck = tower_of("hf-dinov2-14"), neck_of("full").eval()
    randomise(neck)
    x = pixels(tower)
    plain, injected = tower(x).pooled, neck(tower, x, LAYERS)

    @torch.no_grad()
    def right(turn: int) -> bool:
        if turn % 2:
            return torch.equal(tower(x).pooled, plain)
        found = neck(tower, x, LAYERS)
        return all(torch.equal(one, other) for one, other in zip(found, injected, strict=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(right, range(60)))
    finally:
        sys.setswitchinterval(interval)


def test_hooks_are_gone_after_an_error() -> None:
    tower, neck = tower_of("timm-class"), neck_of("full")
    neck.extractors[1].forward = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        neck(tower, pixels(tower), LAYERS)
    assert hooks(tower.encoder.backbone) == 0


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        tower, neck = tower_of("timm-registers-14"), neck_of("full")
        randomise(neck, std=0.1)
        tower.encoder.set_grad_checkpointing(checkpointed)
        sum(level.square().sum() for level in neck(tower, pixels(tower), LAYERS)).backward()
        gradients.append([p.grad for p in neck.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@MODES
@pytest.mark.parametrize("kind", ["upernet", "panoptic_fpn"])
def test_a_necked_head_learns_in_every_parameter(kind: str, mode: str) -> None:
    """All processes of a group wait for gradients of all parameters; under autocast too."""
    config = necked(kind, mode=mode)
    head = make_head(config, width=WIDTH, patch=16, layers=4, classes=3)
    assert isinstance(head, NeckedHead)
    tower = tower_of("timm-class")
    x = pixels(tower, (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(tower, x, LAYERS)
    assert logits.shape == (2, 3, 8, 12)
    (logits.float() * torch.randn(logits.shape)).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def necked(kind: Any = "upernet", **options: Any) -> HeadConfig:
    settings = {"stem": 4, "heads": 2, **options}
    return HeadConfig(
        kind=kind, channels=16, neck="vit_adapter", vit_adapter=ViTAdapterConfig(**settings)
    )


@MODES
@torch.no_grad()
def test_a_batch_gives_what_its_images_give(mode: str) -> None:
    tower = tower_of("hf-vit")
    head = make_head(necked(mode=mode), width=WIDTH, patch=16, layers=4, classes=3).eval()
    randomise(head, std=0.05)
    x = pixels(tower, batch=3)
    together = head(tower, x, LAYERS)
    alone = torch.cat([head(tower, x[i : i + 1], LAYERS) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def necked_job(kind: str, mode: str) -> Any:
    return job(
        head=necked(kind, mode=mode).model_dump(exclude_unset=True),
        trainer={"mode": "head", "max_steps": 3, "batch_size": 4},
    )


@pytest.mark.parametrize(("kind", "mode"), [("upernet", "frozen"), ("panoptic_fpn", "full")])
def test_a_job_trains_saves_and_opens_to_the_same_bits(
    kind: str, mode: str, tmp_path: Path
) -> None:
    rows = Scenes(16)
    task, model = made(necked_job(kind, mode), rows)
    backbone = {name: p.clone() for name, p in model.encoder.backbone.state_dict().items()}
    losses = train(task, model, rows, steps=12)
    assert sum(losses[-3:]) < sum(losses[:3])
    for name, tensor in model.encoder.backbone.state_dict().items():
        assert torch.equal(tensor, backbone[name]), name
    assert isinstance(model.head, NeckedHead)
    if mode == "full":
        assert model.head.neck.injectors[0].gamma.any()  # type: ignore[operator, union-attr]

    counted = sum(p.numel() for p in model.head.parameters())
    facts = sizes(model, task.config.name)
    assert facts["head_parameters"] == counted
    assert counted > sum(p.numel() for p in model.head.neck.parameters()) > 0
    assert facts["adapter_parameters"] == facts["trained_share"] == 0

    torch.save(backbone, tmp_path / "encoder.pt")
    artifact.save(tmp_path / "adapter", task, model, mode="head", metrics={})
    opened = artifact.open_directory(
        tmp_path / "adapter",
        overrides=[f"backbone.weights={tmp_path / 'encoder.pt'}"],
        device="cpu",
    )
    assert opened.task.config.head == task.config.head  # type: ignore[attr-defined]
    with torch.no_grad():
        for size in [(33, 57), (64, 32), (19, 21)]:
            x = torch.randn(2, 3, *size)
            found: Any = opened.model
            assert found.logits(x).shape == (2, len(CLASSES), *size)
            assert torch.equal(found.logits(x), model.logits(x))
    batch = batch_of(task, Scenes(2, seed=5), range(2), train=False)
    one, other = task.records(model, batch), opened.task.records(opened.model, batch)
    assert all(
        (a["counts"].cells == b["counts"].cells).all() for a, b in zip(one, other, strict=True)
    )


def test_stages_end_at_four_blocks_that_rise() -> None:
    assert head_layers(necked(), 12) == (2, 5, 8, 11)
    assert head_layers(necked(), 4) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"works in 4 stages.*the encoder has 3"):
        head_layers(necked(), 3)
    for layers in ([0, 0, 1, 3], [3, 2, 1, 0], [1, 2, 3]):
        config = necked().model_copy(update={"layers": tuple(layers)})
        with pytest.raises(ValueError, match=r"last block of each of 4 stages.*not"):
            head_layers(config, 4)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kind": "linear", "neck": "vit_adapter"}, "linear reads the encoder's maps: set kind to"),
        ({"kind": "fpn", "neck": "vit_adapter"}, "fpn has its own stem on the pixels"),
        ({"kind": "upernet", "vit_adapter": {"mode": "full"}}, "set neck to vit_adapter"),
        ({"kind": "upernet", "neck": "fpn"}, "vit_adapter"),
        ({"kind": "upernet", "neck": "vit_adapter", "vit_adapter": {"points": 0}}, "points"),
    ],
)
def test_what_does_not_fit_is_refused(head: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(head=head)


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    with pytest.raises(ValueError, match=r"head\.vit_adapter: a width of 48 cannot be cut into 5"):
        made(
            job(
                backbone=SMALL_VIT,
                head={"kind": "upernet", "neck": "vit_adapter", "vit_adapter": {"heads": 5}},
            ),
            Scenes(1),
        )


@pytest.mark.parametrize(
    ("width", "inner", "heads"), [(384, None, 6), (768, 384, 12), (1024, None, 16), (224, None, 2)]
)
def test_default_heads_are_the_authors_or_divide(width: int, inner: int | None, heads: int) -> None:
    with torch.device("meta"):
        neck = ViTAdapter(width, ViTAdapterConfig(width=inner))
    assert neck.extractors[0].attention.shape == (heads, 1, 4)  # type: ignore[union-attr]


def test_the_config_that_ships_trains_the_neck_with_the_head() -> None:
    config: Any = read_config("segment_nuclei_vit_adapter", [])
    assert config.head.neck == "vit_adapter"
    assert config.trainer.mode == "head"
    plain: Any = read_config("segment_nuclei", [])
    assert config.data == plain.data
    assert config.transforms == plain.transforms
    assert config.trainer.epochs == plain.trainer.epochs
