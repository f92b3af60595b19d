"""`ImageTower` against the libraries' own ways to features, over every family of image encoders."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import timm
import torch
from families import Family, blip, tensors, vision, vision_language
from families.small import hooks, randomise, small_vit
from open_clip import model as open_clip
from torch import Tensor, nn

from mmadapters import AdapterModel, LoRAConfig, PromptConfig, SeqBnConfig, init, load_backbone
from mmadapters.tasks.encoders.vision import ImageTower

FAMILIES = {
    family.name: family
    for family in (*vision.FAMILIES, *vision_language.CLIP_FAMILIES, *blip.FAMILIES)
    if not family.name.startswith(("hf-clip-text", "hf-siglip-text"))
}
ONE_SIZE = ("timm-relpos", "timm-beit")
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def pixels(tower: ImageTower, grid: tuple[int, int] | None = None, batch: int = 2) -> Tensor:
    """(B, 3, H, W) of the encoder's own size, or of `grid` patches."""
    size = tower.size if grid is None else (grid[0] * tower.patch, grid[1] * tower.patch)
    assert size is not None
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def grids(family: Family) -> list[tuple[int, int] | None]:
    return [None] if family.name in ONE_SIZE else [None, (3, 5)]


def tower_of(family: Family) -> ImageTower:
    return ImageTower(init(family.build()))


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The last h·w of (B, N, D) tokens as (B, D, h, w)."""
    tokens = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
    return tokens.reshape(len(tokens), *grid, -1).permute(0, 3, 1, 2)


def reference(model: Any, x: Tensor, layer: int) -> Tensor:
    """The map (B, D, h, w) after a block, normed, by the library's own API."""
    if hasattr(model, "visual"):
        return _of_open_clip(model.visual, x, layer)
    if hasattr(model, "forward_intermediates"):
        return model.forward_intermediates(x, indices=[layer], norm=True, intermediates_only=True)[
            0
        ]
    return _of_transformers(model, x, layer)


def _of_open_clip(visual: Any, x: Tensor, layer: int) -> Tensor:
    if hasattr(visual, "trunk"):
        return reference(visual.trunk, x, layer)
    # CoCa's norm stands behind its pooler, not behind its blocks.
    norm = visual.attn_pool is None
    found = visual.forward_intermediates(
        x, indices=[layer], normalize_intermediates=norm, intermediates_only=True
    )
    return found["image_intermediates"][0]


def _of_transformers(model: Any, x: Tensor, layer: int) -> Tensor:
    heads = ("vision_model", "vit", "beit", "dinov2")
    model = next((getattr(model, name) for name in heads if hasattr(model, name)), model)
    accepted = inspect.signature(type(model).forward).parameters
    asked = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
    output = model(pixel_values=x, output_hidden_states=True, **asked)
    norm = next(
        getattr(model, name)
        for name in ("layernorm", "norm", "post_layernorm")
        if hasattr(model, name)
    )
    if layer == model.config.num_hidden_layers - 1:
        # Only CLIP's is without the norm; versions differ in whether hidden_states[-1] is.
        tokens = output.last_hidden_state
        tokens = norm(tokens) if model.config.model_type.startswith("clip") else tokens
    elif output.hidden_states is None:
        # SigLIP of transformers 4 keeps no hidden states.
        tokens = model.embeddings(x)
        for block in model.encoder.layers[: layer + 1]:
            tokens = block(tokens, None)
            tokens = tokens if isinstance(tokens, Tensor) else tokens[0]
        tokens = norm(tokens)
    else:
        tokens = norm(output.hidden_states[layer + 1])
    patch = model.config.patch_size
    return as_map(tokens, (x.shape[2] // patch, x.shape[3] // patch))


@EVERY
@torch.no_grad()
def test_maps_equal_what_the_library_gives(family: Family) -> None:
    tower = tower_of(family)
    x = pixels(tower)
    states = tower(x, layers=(0, -1))
    bare = family.build()
    for layer, found in zip((0, tower.depth - 1), states.maps, strict=True):
        torch.testing.assert_close(found, reference(bare, x, layer), rtol=1e-5, atol=1e-5)


@EVERY
@torch.no_grad()
def test_sizes_that_the_encoder_was_not_built_for(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tower_of(family)
    x = pixels(tower, (3, 5))
    if family.name in ONE_SIZE:
        with pytest.raises(
            ValueError, match=r"takes 32×32 pixels, not 24×40.*img_size: \[24, 40\]"
        ):
            tower(x)
        return
    (found,) = tower(x).maps
    assert found.shape == (2, tower.width, 3, 5)
    monkeypatch.setitem(vision.TIMM, "dynamic_img_size", True)
    able = family.build()
    if hasattr(able, "visual"):
        able = able_open_clip(able, (3, 5))
    expected = reference(able, x, tower.depth - 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def able_open_clip(model: Any, grid: tuple[int, int]) -> Any:
    """The model with position embeddings resized by open_clip's own function, or in its timm trunk
    by timm's setting."""
    if hasattr(model.visual, "trunk"):
        trunk = timm.create_model("test_vit", dynamic_img_size=True, num_classes=0, global_pool="")
        trunk.load_state_dict(model.visual.trunk.state_dict())
        return trunk.eval()
    model.visual.grid_size = grid
    state = {"visual.positional_embedding": model.visual.positional_embedding}
    open_clip.resize_pos_embed(state, model)
    model.visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"])
    return model


@EVERY
def test_adapters_act_and_learn_and_switched_off_nothing_has_changed(family: Family) -> None:
    tower = tower_of(family)
    model = tower.encoder
    with torch.no_grad():
        before = {grid: states(tower, grid) for grid in grids(family)}
    model.add_adapter("a", SeqBnConfig(size=4, sites=("vision",)))
    model.add_adapter("b", LoRAConfig(rank=2, targets=("q", "v"), sites=("vision",)))
    randomise(model.adapter("a"))
    randomise(model.adapter("b"))
    model.train_adapter(["a", "b"])
    for grid, bare in before.items():
        model.zero_grad()
        acting = states(tower, grid)
        sum(part.square().sum() for part in acting).backward()
        assert not any(torch.allclose(x, y) for x, y in zip(acting, bare, strict=True))
        unreached = [
            name
            for name, parameter in model.adapters.named_parameters()
            if parameter.grad is None or not parameter.grad.any()
        ]
        # The attention weights of random BEiT, CLIP, … all reach: none may be left out.
        assert not unreached
        with model.using(None), torch.no_grad():
            off = states(tower, grid)
        assert all(torch.equal(x, y) for x, y in zip(off, bare, strict=True))


def states(tower: ImageTower, grid: tuple[int, int] | None) -> list[Tensor]:
    """Maps of the first and the last block, and the pooled features."""
    found = tower(pixels(tower, grid), layers=(0, -1))
    return [*found.maps, found.pooled]


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.name) for f in FAMILIES.values() if "prompt" in f.traits],
)
@torch.no_grad()
def test_prompts_act_but_are_no_part_of_the_maps(family: Family, deep: bool) -> None:
    tower = tower_of(family)
    model = tower.encoder
    for grid in grids(family):
        bare = tower(pixels(tower, grid), layers=(0, -1))
        with_prompts(model, deep)
        found = tower(pixels(tower, grid), layers=(0, -1))
        model.delete_adapter("p")
        for x, y in zip(found.maps, bare.maps, strict=True):
            assert x.shape == y.shape
            assert not torch.allclose(x, y)
            # Tokens that did not move by a place: closer to their own than to their neighbours'.
            assert (x - y).norm() < (x - y.roll(1, dims=-1)).norm()


def with_prompts(model: AdapterModel, deep: bool) -> None:
    model.add_adapter("p", PromptConfig(length=3, deep=deep, sites=("vision",)))
    model.set_active_adapters("p")


@EVERY
@torch.no_grad()
def test_blocks_behind_the_last_requested_one_do_not_run(family: Family) -> None:
    tower = tower_of(family)
    ran: list[int] = []
    blocks = tower.encoder.sites.towers["vision"].blocks
    for block in blocks:
        block.module.register_forward_pre_hook(
            lambda *_, index=block.index: ran.append(index)  # type: ignore[misc]
        )
    tower(pixels(tower), layers=(0,))
    assert ran == [0]
    tower(pixels(tower), layers=(-1, 0))
    assert ran == [0, *range(len(blocks))]


@EVERY
@torch.no_grad()
def test_a_call_leaves_nothing_behind(family: Family) -> None:
    backbone = family.build()
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    args, kwargs = family.inputs()
    tower = ImageTower(init(backbone))
    before = tensors(backbone(*args, **kwargs))
    for grid in grids(family):
        tower(pixels(tower, grid))
        with pytest.raises((RuntimeError, ValueError)):
            tower(pixels(tower, grid)[:, :1].expand(-1, 2, -1, -1))  # two channels
    assert hooks(backbone) == 0
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.state_dict().items())
    after = tensors(backbone(*args, **kwargs))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_class_tokens_and_what_is_pooled() -> None:
    x = vision.images()
    with torch.no_grad():
        vit = small_vit()
        tokens = vit.forward_features(x)
        found = ImageTower(init(vit))(x)
        assert found.cls is not None
        assert torch.equal(found.cls, tokens[:, 0])
        assert torch.equal(found.pooled, tokens[:, 0])

        average = FAMILIES["timm-vit-avg"].build()
        expected = average.forward_head(average.forward_features(x), pre_logits=True)
        found = ImageTower(init(average))(x)
        assert found.cls is None
        torch.testing.assert_close(found.pooled, expected)

        beit = FAMILIES["hf-beit"].build()
        torch.testing.assert_close(
            ImageTower(init(beit))(x).pooled, beit(pixel_values=x).pooler_output
        )

        siglip = FAMILIES["timm-siglip"].build()
        found = ImageTower(init(siglip))(x)
        assert found.cls is None
        torch.testing.assert_close(found.pooled, siglip.forward_features(x).mean(dim=1))


def test_without_the_norm_states_are_those_of_the_residual_stream() -> None:
    vit = small_vit()
    x = vision.images()
    with torch.no_grad():
        expected = vit.forward_intermediates(x, norm=False, intermediates_only=True)
        found = ImageTower(init(vit))(x, layers=(0, 1), norm=False).maps
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_positions_of_a_size_follow_the_weights_they_come_from() -> None:
    tower = ImageTower(init(small_vit()))
    position = tower.encoder.backbone.pos_embed
    x = pixels(tower, (3, 5))
    with torch.inference_mode():
        first = tower(x).pooled
    position.requires_grad_(True)
    tower(x).pooled.sum().backward()  # nothing of inference mode was kept
    assert position.grad is not None
    assert position.grad.any()
    with torch.no_grad():
        position.mul_(2)
        assert not torch.allclose(tower(x).pooled, first)
        position.div_(2)
        assert torch.equal(tower(x).pooled, first)


def test_sizes_of_several_threads_do_not_meet() -> None:
    tower = ImageTower(init(small_vit()))
    sizes = [(3, 5), (4, 4), (5, 2), (2, 2)]
    with torch.no_grad():
        expected = {size: tower(pixels(tower, size)).pooled for size in sizes}
    wrong: list[tuple[int, int]] = []

    def work(size: tuple[int, int]) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(tower(pixels(tower, size)).pooled, expected[size]):
                    wrong.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_and_a_pickle_work_by_themselves() -> None:
    tower = ImageTower(init(small_vit()))
    x = pixels(tower, (3, 5))
    with torch.no_grad():
        expected = tower(x).pooled
        for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
            assert torch.equal(other(x).pooled, expected)
            other.encoder.backbone.pos_embed.zero_()
            assert not torch.allclose(other(x).pooled, expected)
        assert torch.equal(tower(x).pooled, expected)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        tower = ImageTower(init(small_vit()))
        torch.manual_seed(1)
        tower.encoder.add_adapter("a", SeqBnConfig(size=4))
        randomise(tower.encoder.adapter("a"))
        tower.encoder.train_adapter("a")
        if checkpointed:
            tower.encoder.gradient_checkpointing_enable()
        tower(pixels(tower, (3, 5)), layers=(0, 1)).pooled.square().sum().backward()
        gradients.append([p.grad for p in tower.encoder.adapters.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_nano_vit_takes_other_sizes_in_both_libraries() -> None:
    for library in ("timm", "hf"):
        tower = ImageTower(init(load_backbone("nano/vit", library=library)))
        with torch.no_grad():
            assert tower(torch.randn(1, 3, 96, 40)).maps[0].shape == (1, 224, 12, 5)


def test_what_does_not_fit_is_said_in_one_sentence() -> None:
    tower = ImageTower(init(small_vit()))
    with pytest.raises(ValueError, match=r"\(1, 3, 30, 32\) do not fit.*multiples of the patch, 8"):
        tower(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"layers \(2,\) are not there: the encoder has 2 blocks"):
        tower(vision.images(), layers=(2,))
    with pytest.raises(ValueError, match="Wav2Vec2Model reads no images: it has the towers audio"):
        ImageTower(init(load_backbone("nano/wav2vec2")))
    drops = small_vit(patch_drop_rate=0.5)
    tower = ImageTower(init(drops, train_trunk=True))
    tower.encoder.train()
    with pytest.raises(ValueError, match="set its patch dropout to 0"):
        tower(vision.images())
