"""Heads: their formulas, their shapes, what they read, and that they learn."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from application.segmentation.norm_in_two_processes import inputs, run
from safetensors.torch import load_file
from torch import Tensor, nn

from mmadapters.tasks.segmentation.config import HeadConfig
from mmadapters.tasks.segmentation.heads.build import head_layers, make_head
from mmadapters.tasks.segmentation.heads.norm import BatchNorm
from mmadapters.tasks.segmentation.heads.plain import LinearHead, Segmenter
from mmadapters.tasks.segmentation.heads.pyramid import SimplePyramid, TopDown

WIDTH, PATCH, CLASSES = 24, 8, 3
KINDS = ("linear", "setr_pup", "segmenter", "upernet", "panoptic_fpn", "fpn")
EVERY = pytest.mark.parametrize("kind", KINDS)


def head(kind: str, *, classes: int = CLASSES, patch: int = PATCH) -> tuple[nn.Module, int]:
    """A small head and how many maps it reads."""
    config = HeadConfig(kind=kind, channels=16, dropout=0.0)
    layers = len(head_layers(config, 8))
    made = make_head(config, width=WIDTH, patch=patch, layers=layers, classes=classes)
    return made, layers


def given(layers: int, grid: tuple[int, int], batch: int = 2) -> tuple[list[Tensor], Tensor]:
    maps = [torch.randn(batch, WIDTH, *grid) for _ in range(layers)]
    return maps, torch.randn(batch, 3, PATCH * grid[0], PATCH * grid[1])


@EVERY
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 4)], ids=str)
def test_every_grid_gives_logits(kind: str, grid: tuple[int, int]) -> None:
    module, layers = head(kind)
    scale = {"setr_pup": 8, "upernet": 4, "panoptic_fpn": 4, "fpn": 2}.get(kind, 1)
    logits = module(*given(layers, grid))
    assert logits.shape == (2, CLASSES, scale * grid[0], scale * grid[1])


@EVERY
def test_one_image_trains_too(kind: str) -> None:
    """torch's batch norm refuses the 1×1 map that pyramid pooling makes of one image."""
    module, layers = head(kind)
    logits = module(*given(layers, (2, 2), batch=1))
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()


@EVERY
def test_every_parameter_learns_and_every_map_is_read(kind: str) -> None:
    """All processes of a group wait for gradients of all parameters."""
    module, layers = head(kind)
    maps, pixels = given(layers, (4, 6))
    for x in maps:
        x.requires_grad_()
    logits = module(maps, pixels)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for x in maps:
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


@EVERY
def test_a_batch_gives_what_its_images_give(kind: str) -> None:
    module, layers = head(kind)
    maps, pixels = given(layers, (4, 6), batch=3)
    module.eval()
    with torch.no_grad():
        together = module(maps, pixels)
        alone = [module([x[i : i + 1] for x in maps], pixels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("classes", [2, 5])
def test_heads_tell_classes_apart_that_the_maps_tell(kind: str, classes: int) -> None:
    """Two classes too: a norm over two numbers would leave the segmenter without a gradient."""
    module, layers = head(kind, classes=classes)
    grid = (4, 4)
    truth = torch.randint(classes, (2, *grid))
    codes = torch.randn(classes, WIDTH)
    maps = [codes[truth].movedim(-1, 1)] * layers
    target = truth.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    pixels = torch.zeros(2, 3, *target.shape[1:])
    optimiser = torch.optim.AdamW(module.parameters(), lr=5e-3)
    loss = torch.tensor(0.0)
    for _ in range(80):
        logits = F.interpolate(module(maps, pixels), size=target.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    logits = F.interpolate(module(maps, pixels), size=target.shape[1:], mode="bilinear")
    centres = logits.argmax(1)[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    assert (centres == truth).float().mean() > 0.95, loss.item()


def test_linear_is_batch_norm_and_a_1x1_convolution() -> None:
    module = LinearHead(2 * WIDTH, classes=CLASSES, dropout=0.0)
    maps, pixels = given(2, (3, 4))
    x = torch.cat(maps, dim=1).double()
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    deviation = (x.var(dim=(0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    weight = module.classify.weight[:, :, 0, 0].double()
    expected = torch.einsum("cd,bdhw->bchw", weight, (x - mean) / deviation)
    expected += module.classify.bias[:, None, None]
    torch.testing.assert_close(module(maps, pixels), expected.float(), atol=1e-5, rtol=1e-4)


def test_segmenter_is_the_cosine_of_patches_and_classes_normed_over_the_classes() -> None:
    """Strudel et al. 2021, with the same transformer taken as given."""
    module = Segmenter(WIDTH, depth=2, classes=CLASSES, channels=16, dropout=0.0).eval()
    maps, pixels = given(1, (3, 4))
    with torch.no_grad():
        patches = torch.stack([module.project(p) for p in maps[0].flatten(2).transpose(1, 2)])
        x = torch.cat([patches, torch.stack([module.class_tokens] * 2)], dim=1)
        for block in module.blocks:
            x = block(x)
        x = module.norm(x)
        expected = torch.zeros(2, CLASSES, 3, 4)
        for b in range(2):
            for place in range(12):
                patch = module.project_patches.weight @ x[b, place]
                scores = [
                    F.cosine_similarity(patch, module.project_classes.weight @ x[b, 12 + k], dim=0)
                    for k in range(CLASSES)
                ]
                expected[b, :, place // 4, place % 4] = module.mask_norm(torch.stack(scores))
        torch.testing.assert_close(module(maps, pixels), expected, atol=1e-5, rtol=1e-4)


def test_the_simple_pyramid_has_four_scales() -> None:
    pyramid = SimplePyramid(WIDTH)
    maps, _ = given(4, (5, 6))
    shapes = [tuple(level.shape[-2:]) for level in pyramid(maps)]
    assert shapes == [(20, 24), (10, 12), (5, 6), (3, 3)]
    assert pyramid(maps)[2] is maps[2]


def test_a_coarse_level_reaches_all_finer_ones() -> None:
    module = TopDown(3, 8).eval()
    levels = [torch.randn(1, 8, 8 // 2**s, 8 // 2**s) for s in range(3)]
    before = module(levels)
    changed = module([*levels[:-1], levels[-1] + 5])
    assert before.shape == (1, 8, 8, 8)
    assert ((before - changed).abs().sum(dim=1) > 0).all()


def test_default_layers_and_those_of_the_config() -> None:
    def layers(depth: int, **options: object) -> tuple[int, ...]:
        return head_layers(HeadConfig(**options), depth)  # type: ignore[arg-type]

    assert layers(12) == (11,)
    assert layers(12, kind="upernet") == (2, 5, 8, 11)  # as DINOv2 and BEiT have them
    assert layers(24, kind="fpn") == (5, 11, 17, 23)
    assert layers(2, kind="upernet") == (0, 0, 0, 1)
    assert layers(12, layers=[-4, -3, -2, -1]) == (8, 9, 10, 11)
    with pytest.raises(ValueError, match="no block 12, the encoder has 12"):
        layers(12, layers=[12])
    with pytest.raises(ValueError, match="upernet head reads 4 blocks"):
        make_head(HeadConfig(kind="upernet"), width=8, patch=8, layers=2, classes=2)


def test_batch_norm_is_torchs_in_one_process() -> None:
    ours, theirs = BatchNorm(4), nn.BatchNorm2d(4)
    for _ in range(60):
        x = torch.randn(3, 4, 5, 6) + 2
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert int(ours.num_batches_tracked) == 60
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0.01)
    single = torch.randn(1, 4, 1, 1)
    ours.train()
    assert (ours(single) == ours.bias[:, None, None]).all()


def test_running_statistics_start_with_the_first_batches() -> None:
    """torch's would have 27 % of the mean after three of them."""
    norm = BatchNorm(4)
    batches = [torch.randn(3, 4, 5, 6) + 2 for _ in range(3)]
    for x in batches:
        norm(x)
    together = torch.stack(batches)
    torch.testing.assert_close(norm.running_mean, together.mean(dim=(0, 1, 3, 4)))
    variances = together.transpose(1, 2).flatten(2).var(dim=2)
    torch.testing.assert_close(norm.running_var, variances.mean(dim=0))


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    program = Path(__file__).with_name("norm_in_two_processes.py")
    done = forked.run(program, str(tmp_path), processes=2, timeout=120)
    assert done.returncode == 0, done.stderr
    whole = run(inputs())
    halves = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for key in ("y", "x"):
        together = torch.cat([half[key] for half in halves])
        torch.testing.assert_close(together, whole[key], atol=1e-5, rtol=1e-4)
    for key in ("weight", "bias"):
        torch.testing.assert_close(
            halves[0][key] + halves[1][key], whole[key], atol=1e-4, rtol=1e-4
        )
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(halves[0][key], whole[key])
        torch.testing.assert_close(halves[1][key], whole[key])
