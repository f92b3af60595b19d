"""A pass that starts from kept states is the plain pass, and runs nothing of what lies below."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from families import Family, speech, tensors
from families.small import hooks, randomise, small_vit
from families.vision import HF, images
from injection.matrix import FAMILIES, METHODS, bare, config_for, distance, home, loss_of, towers
from injection.test_speech_adapters import hand_written
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    BatchSplit,
    BottleneckConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    FrontEndAdapterConfig,
    FrozenTrunk,
    Fuse,
    LAdapterConfig,
    LadderConfig,
    LoRAConfig,
    Parallel,
    PromptConfig,
    Route,
    Split,
    Stack,
    placeholder,
)
from mmadapters.injectors.intercept import Interceptor
from mmadapters.tasks.encoders.speech import SpeechTower
from mmadapters.tasks.encoders.vision import ImageTower

# Towers of which nothing is kept, and why.
ATTENDING = "its blocks attend to another tower"
SKIPPED = {
    "hf-wavlm": {"audio": "its block 0 hands more than one tensor on"},
    "torchaudio-wavlm": {"audio": "its block 0 hands more than one tensor on"},
    "hf-t5": {"text": "its block 0 hands more than one tensor on"},
    "hf-blip-retrieval": {"text": ATTENDING},
    "hf-blip-vqa": {"text": ATTENDING, "decoder": ATTENDING},
    "hf-blip-caption": {"decoder": ATTENDING},
    "open_clip-coca": {"decoder": "it takes turns with tower 'fusion'", "fusion": ATTENDING},
}
PATTERNS = {"first": "*.blocks.*", "upper": "*.blocks.[1-9]*", "head": None}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
each_start = pytest.mark.parametrize("start", PATTERNS)


def model_from(family: Family, start: str) -> AdapterModel:
    """A family's model with random, trainable adapters from the first or second block of each tower
    on, or with none."""
    model = mmadapters.init(bare(family))
    pattern = PATTERNS[start]
    if pattern is not None:
        sites = (pattern,)
        config = ConfigUnion(LoRAConfig(rank=2, sites=sites), BottleneckConfig(size=4, sites=sites))
        model.add_adapter("a", config)
        randomise(model.adapter("a"), 0.1)
        model.train_adapter("a")
    return model


def deep_vit(depth: int = 6) -> AdapterModel:
    return mmadapters.init(small_vit(depth=depth))


def holding(model: AdapterModel, config: Any, **options: Any) -> AdapterModel:
    """With a random adapter `a`, active and trainable."""
    model.add_adapter("a", config)
    randomise(model.adapter("a"), 0.1)
    model.train_adapter("a", **options)
    return model


def called(model: AdapterModel, family: Family) -> Callable[[], Any]:
    args, kwargs = family.inputs()
    return lambda: model(*args, **kwargs)


def blank(family: Family) -> tuple[tuple, dict[str, Any]]:
    """The family's inputs with placeholders for images, waveforms and spectrograms."""
    args, kwargs = family.inputs()

    def blanked(value: Tensor) -> Tensor:
        return placeholder(value.shape) if value.is_floating_point() else value

    return tuple(map(blanked, args)), {name: blanked(value) for name, value in kwargs.items()}


def outputs(run: Callable[[], Any]) -> list[Tensor]:
    """All that a pass gives but `extract_features`, wav2vec 2.0's frames before its blocks."""
    found = run()
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if key != "extract_features"}
    return tensors(found)


def gradients(model: nn.Module, given: list[Tensor]) -> dict[str, Tensor]:
    """Of every parameter that a pass's outputs depend on."""
    model.zero_grad()
    given = [tensor for tensor in given if tensor.requires_grad]
    if given:
        loss_of(given).backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def check_same(
    model: AdapterModel, prefix: FrozenTrunk, run: Callable[[], Any], again: Any = None
) -> None:
    """Outputs and gradients of a resumed pass are those of the plain one, dropout included."""
    states = prefix.capture(run)
    torch.manual_seed(1)
    plain = outputs(run)
    expected = gradients(model, plain)
    torch.manual_seed(1)
    with prefix.resume(states):
        resumed = outputs(again or run)
    found = gradients(model, resumed)
    assert distance(resumed, plain) <= 1e-6
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance([found[name]], [gradient]) <= 1e-6, name


def kept(prefix: FrozenTrunk) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {tower.tower: (tower.block, tower.layers) for tower in prefix.towers}


@each_start
@each_family
def test_resumed_pass_is_the_plain_one_in_outputs_and_gradients(family: Family, start: str) -> None:
    model = model_from(family, start)
    run = called(model, family)
    prefix = FrozenTrunk.of(model, run)
    args, kwargs = blank(family) if prefix.towers else family.inputs()
    check_same(model, prefix, run, lambda: model(*args, **kwargs))
    skipped = SKIPPED.get(family.name, {})
    assert prefix.skipped.keys() == skipped.keys()
    for tower, reason in skipped.items():
        assert prefix.skipped[tower].startswith(reason)
    for name in set(towers(family)) - set(skipped):
        depth = len(model.sites.towers[name].blocks)
        block = {"first": 0, "upper": 1, "head": depth}[start]
        assert kept(prefix)[name] == (block, (block - 1,))


@contextlib.contextmanager
def counted(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Notes each call of the innermost modules inside `modules`."""
    calls: list[nn.Module] = []

    def note(module: nn.Module, args: tuple) -> None:
        calls.append(module)

    inner = (part for module in modules for part in module.modules() if part is not module)
    leaves = {part for part in inner if not list(part.children())}
    handles = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@each_start
@pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES.values() if family.name not in SKIPPED],
    ids=lambda family: family.name,
)
def test_stem_and_lower_blocks_do_not_run_and_capturing_runs_nothing_else(
    family: Family, start: str
) -> None:
    model = model_from(family, start)
    run = called(model, family)
    prefix = FrozenTrunk.of(model, run)
    below, above = [], []
    for part in prefix.towers:
        tower = model.sites.towers[part.tower]
        below += [stem.module for stem in tower.stem]
        below += [block.module for block in tower.blocks[: part.block]]
        above += [block.module for block in tower.blocks[part.block :]]
    with counted(above) as calls:
        states = prefix.capture(run)
    assert not calls
    with Convolutions() as made, counted(below) as calls, prefix.resume(states):
        run()
    # BEiT's towers have modules that all blocks share.
    assert not set(calls) - {part for module in above for part in module.modules()}
    assert not made.shapes
    if set(towers(family)) - {"text"}:
        with Convolutions() as made:
            run()
        assert made.shapes


class Convolutions(TorchDispatchMode):
    """Shapes of what is convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket is torch.ops.aten.convolution:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drop", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_acts_as_in_a_plain_pass(method: str, drop: int) -> None:
    family = home(method)
    config = config_for(family, method)
    model = mmadapters.init(bare(family))
    model.add_adapter("a", config)
    randomise(model.adapter("a"), 0.1)
    model.train_adapter("a", drop=drop)
    run = called(model, family)
    prefix = FrozenTrunk.of(model, run)
    if method == "conv_front_end" and not drop:
        assert prefix.skipped == {"audio": "adapters act on its convolutional front end"}
    else:
        assert all(part.block >= drop for part in prefix.towers)
        assert prefix.towers
    check_same(model, prefix, run)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (LadderConfig(heads=2), (-1, 0, 1, 2, 3, 4, 5)),
        (LadderConfig(heads=2, every=2), (-1, 1, 3, 5)),
        (LadderConfig(heads=2, sites=("vision.blocks.[24]",)), (-1, 2, 4, 5)),
        (
            ConfigUnion(LadderConfig(heads=2, every=3), LoRAConfig(sites=("vision.blocks.[45]",))),
            (-1, 2, 3),
        ),
    ],
    ids=["all", "every second", "some", "and LoRA in two blocks"],
)
def test_layers_that_a_ladder_reads_are_kept_and_no_others(
    config: Any, layers: tuple[int, ...]
) -> None:
    model = holding(deep_vit(), config)
    run = functools.partial(model, images())
    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (layers[-1] + 1, layers)}
    check_same(model, prefix, run, lambda: model(placeholder((2, 3, 32, 32))))


@pytest.mark.parametrize("name", ["hf-wav2vec2-stable", "torchaudio-wav2vec2"])
def test_layers_that_an_l_adapter_reads_are_kept(name: str) -> None:
    family = FAMILIES[name]
    model = holding(mmadapters.init(bare(family)), LAdapterConfig())
    prefix = FrozenTrunk.of(model, called(model, family))
    assert kept(prefix) == {"audio": (2, (0, 1))}
    check_same(model, prefix, called(model, family))


@pytest.mark.parametrize("norm", [True, False])
def test_layers_that_an_image_tower_is_asked_for_are_kept(norm: bool) -> None:
    model = holding(deep_vit(), LoRAConfig(sites=("vision.blocks.5",)))
    tower = ImageTower(model)

    def run(pixels: Tensor) -> list[Tensor]:
        states = tower(pixels, (0, 2, 5), norm=norm)
        assert states.cls is not None
        return [*states.maps, states.cls, states.pooled]

    prefix = FrozenTrunk.of(model, lambda: run(images()))
    assert kept(prefix) == {"vision": (5, (0, 2, 4))}
    check_same(model, prefix, lambda: run(images()), lambda: run(placeholder((2, 3, 32, 32))))


def test_blocks_above_the_last_one_that_is_read_are_not_kept_either() -> None:
    model = deep_vit()
    tower = ImageTower(model)

    def run() -> list[Tensor]:
        return tower(images(), (1, 3)).maps

    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (4, (1, 3))}
    check_same(model, prefix, run)


@pytest.mark.parametrize("name", ["hf-vit", "hf-wav2vec2", "hf-clip-vision", "hf-bert"])
def test_hidden_states_that_a_pass_gives_are_kept(name: str) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family))
    args, kwargs = family.inputs()
    (tower,) = towers(family)

    def run() -> Any:
        return model(*args, **kwargs, output_hidden_states=True)

    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {tower: (2, (-1, 0, 1))}
    check_same(model, prefix, run)
    # Once asked for, transformers' hooks stay on the blocks, and keep nothing.
    plain = FrozenTrunk.of(model, called(model, family))
    assert kept(plain) == {tower: (2, (1,))}


def test_hidden_states_are_kept_for_a_head_that_lets_go_of_them() -> None:
    config = transformers.ViTConfig(**{**HF, "num_hidden_layers": 4})
    model = mmadapters.init(transformers.ViTModel(config).eval())

    def run() -> Tensor:
        states = model(pixel_values=images(), output_hidden_states=True).hidden_states
        return torch.stack([state.mean() for state in states[:3]])

    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (4, (-1, 0, 1, 2, 3))}
    check_same(model, prefix, run)


@pytest.mark.parametrize("wanted", [[1, 2, 5], [0, 4]], ids=str)
def test_intermediate_states_that_a_library_collects_by_itself_are_kept(
    wanted: list[int],
) -> None:
    model = deep_vit()
    run = functools.partial(model.forward_intermediates, images(), indices=wanted)
    prefix = FrozenTrunk.of(model, lambda: run())
    assert set(wanted) <= set(kept(prefix)["vision"][1])
    check_same(model, prefix, run)


def test_intermediate_states_are_kept_for_a_head_that_lets_go_of_them() -> None:
    model = deep_vit()

    def run() -> Tensor:
        states = model.forward_intermediates(images(), indices=[1, 3, 4], intermediates_only=True)
        return torch.stack([state.mean() for state in states])

    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (6, (1, 3, 4, 5))}
    check_same(model, prefix, run)


@pytest.mark.parametrize("least", [0, 2, 6])
def test_blocks_below_the_least_number_that_training_drops_are_kept(least: int) -> None:
    model = deep_vit()
    model.add_adapter("a", DoubleSeqBnConfig(size=4))
    randomise(model.adapter("a"))
    model.train_adapter("a", drop=(least, 6))
    run = functools.partial(model, images())
    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (least, (least - 1,))}
    states = prefix.capture(run)
    for seed in range(4):
        torch.manual_seed(seed)
        plain = run()
        torch.manual_seed(seed)
        with prefix.resume(states):
            assert distance([run()], [plain]) <= 1e-6


@pytest.mark.parametrize(
    "setup",
    [
        Stack("a", "b"),
        Fuse("a", "b"),
        Average("a", "b"),
        Route(("a", "base")),
        BatchSplit("a", "b", batch_sizes=[1, 1]),
        Split("a", "b", splits=[5]),
        Parallel("a", "b"),
    ],
    ids=lambda setup: type(setup).__name__,
)
def test_compositions_start_at_the_first_block_at_which_a_member_acts(setup: Any) -> None:
    model = deep_vit(4)
    for name, blocks in (("a", "[23]"), ("b", "3")):
        model.add_adapter(name, DoubleSeqBnConfig(size=4, sites=(f"vision.blocks.{blocks}",)))
        randomise(model.adapter(name))
    if isinstance(setup, Fuse):
        model.add_adapter_fusion(setup)
    model.train_adapter(setup)
    run = functools.partial(model, images())
    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (2, (1,))}
    check_same(model, prefix, run)


def test_setups_that_will_act_later_count_too() -> None:
    model = deep_vit()
    for name, block in (("a", 4), ("b", 2)):
        model.add_adapter(name, LoRAConfig(sites=(f"vision.blocks.{block}",)))
        randomise(model.adapter(name))
    model.add_adapter("ladder", LadderConfig(heads=2))
    model.set_active_adapters("a")
    run = functools.partial(model, images())
    assert kept(FrozenTrunk.of(model, run)) == {"vision": (4, (3,))}
    prefix = FrozenTrunk.of(model, run, setups=["b", None])
    assert kept(prefix) == {"vision": (2, (1,))}
    for setup in ("a", "b", None):
        with model.using(setup):
            check_same(model, prefix, run)
    prefix = FrozenTrunk.of(model, run, setups=["ladder"])
    assert kept(prefix) == {"vision": (4, (-1, 0, 1, 2, 3))}
    with model.using("ladder"):
        check_same(model, prefix, run)


SPEECH = [family for family in speech.FAMILIES if "wavlm" not in family.name]
LENGTHS = torch.tensor([4800, 3300, 4000])


@each_start
@pytest.mark.parametrize("family", SPEECH, ids=lambda family: family.name)
def test_padded_utterances_of_different_lengths_are_resumed(family: Family, start: str) -> None:
    if family.name == "hf-whisper":
        family = Family("hf-whisper", lambda: speech.hf_whisper(), family.inputs)
        lengths = torch.tensor([2400, 3800, 3000])
    else:
        lengths = LENGTHS
    model = model_from(family, start)
    tower = SpeechTower(model)
    waves = torch.randn(3, int(lengths.max()), generator=torch.Generator().manual_seed(3))

    def run(sound: Tensor = waves) -> Tensor:
        return tower(sound, lengths)[0]

    prefix = FrozenTrunk.of(model, run)
    block = {"first": 0, "upper": 1, "head": 2}[start]
    assert kept(prefix) == {"audio": (block, (block - 1,))}
    check_same(model, prefix, run, lambda: run(placeholder(waves.shape)))


def test_images_of_another_size_than_the_first_ones_are_resumed() -> None:
    model = holding(
        mmadapters.init(small_vit(depth=4, dynamic_img_size=True)),
        LoRAConfig(sites=("vision.blocks.[23]",)),
    )
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    large = torch.randn(3, 3, 48, 40)
    check_same(model, prefix, lambda: model(large), lambda: model(placeholder((3, 3, 48, 40))))


@pytest.mark.parametrize("name", ["hf-dinov2", "hf-dinov3"])
def test_positions_are_interpolated_as_ever(name: str) -> None:
    family = FAMILIES[name]
    model = model_from(family, "upper")
    prefix = FrozenTrunk.of(model, called(model, family))
    large = torch.randn(1, 3, 48, 40)
    check_same(
        model,
        prefix,
        lambda: model(pixel_values=large),
        lambda: model(pixel_values=placeholder(large.shape)),
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_block_whose_input_is_changed_from_outside_is_run(layer: int) -> None:
    model = deep_vit()
    tower = ImageTower(model)
    shift = nn.Parameter(torch.randn(32))

    def run() -> list[Tensor]:
        return tower(images(), (5,), between={layer: lambda tokens: tokens + shift}).maps

    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (layer, (layer - 1,))}
    states = prefix.capture(run)
    shift.data += 1
    (plain,) = run()
    with prefix.resume(states):
        (again,) = run()
    assert distance([again], [plain]) <= 1e-6


def test_blocks_that_take_tokens_first_are_resumed_from_states_with_the_batch_first() -> None:
    model = holding(hand_written(batch_first=False), LoRAConfig(sites=("audio.blocks.1",)))
    x = torch.randn(5, 3, 32)
    prefix = FrozenTrunk.of(model, lambda: model(x))
    assert prefix.capture(lambda: model(x))["audio", 0].shape == (3, 5, 32)
    check_same(model, prefix, lambda: model(x), lambda: model(placeholder(x.shape)))


def test_prompts_do_not_come_into_states() -> None:
    model = holding(deep_vit(4), PromptConfig(length=3, sites=("vision.blocks.[23]",)))
    run = functools.partial(model, images())
    prefix = FrozenTrunk.of(model, run)
    assert prefix.capture(run)["vision", 1].shape == (2, 17, 32)
    check_same(model, prefix, run)


def test_states_have_no_gradient_and_need_not_be_those_of_the_first_batch() -> None:
    model = holding(deep_vit(4), LoRAConfig(sites=("vision.blocks.[23]",)))
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    other = torch.randn(5, 3, 32, 32)
    states = prefix.capture(lambda: model(other))
    assert not states["vision", 1].requires_grad
    check_same(model, prefix, lambda: model(other))


@pytest.mark.parametrize("autocast", [False, True])
def test_states_in_half_precision_are_close(autocast: bool) -> None:
    model = holding(deep_vit(), LoRAConfig(sites=("vision.blocks.[345]",)))
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)

    def run() -> Tensor:
        with context():
            return model(images())

    prefix = FrozenTrunk.of(model, run)
    states = {key: state.bfloat16() for key, state in prefix.capture(run).items()}
    plain = run()
    with prefix.resume(states):
        resumed = run()
    assert resumed.dtype == plain.dtype
    assert 0 < distance([resumed.float()], [plain.float()]) < 0.05


def test_model_in_half_precision_is_resumed() -> None:
    model = holding(
        mmadapters.init(small_vit(depth=4).bfloat16()), LoRAConfig(sites=("vision.blocks.3",))
    )
    x = images().bfloat16()
    prefix = FrozenTrunk.of(model, lambda: model(x))
    check_same(model, prefix, lambda: model(x))


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("block", "share"), [(12, 0.01), (6, 0.52), (3, 0.76)])
def test_resumed_forward_costs_what_its_blocks_cost(block: int, share: float) -> None:
    vit = VisionTransformer(img_size=96, embed_dim=192, depth=12, num_heads=3, num_classes=10)
    model = mmadapters.init(vit)
    if block < 12:
        rest = "|".join(str(index) for index in range(block, 12))
        sites = tuple(f"vision.blocks.{index}" for index in rest.split("|"))
        model.add_adapter("a", LoRAConfig(rank=1, sites=sites))
        model.train_adapter("a")
    x = torch.randn(2, 3, 96, 96)
    prefix = FrozenTrunk.of(model, lambda: model(x))
    assert kept(prefix) == {"vision": (block, (block - 1,))}
    states = prefix.capture(lambda: model(x))

    def resumed() -> None:
        with prefix.resume(states):
            model(x)

    plain = flops(lambda: model(x))
    assert share - 0.04 < flops(resumed) / plain < share
    assert flops(lambda: prefix.capture(lambda: model(x))) < (block / 12 + 0.03) * plain


def test_train_mode_of_the_trunk_is_skipped() -> None:
    model = mmadapters.init(small_vit(), train_trunk=True)
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    assert prefix.skipped["vision"].startswith("its encoder is in train mode, where dropout")
    assert prefix.towers == ()
    assert prefix.capture(lambda: model(images())) == {}
    with prefix.resume({}):
        model(images())


def test_part_of_the_trunk_in_train_mode_is_skipped_by_name() -> None:
    model = mmadapters.init(bare(FAMILIES["hf-wav2vec2"]))
    model.backbone.wav2vec2.encoder.training = True
    run = called(model, FAMILIES["hf-wav2vec2"])
    while "audio" not in (skipped := FrozenTrunk.of(model, run).skipped):
        raise AssertionError("kept")
    # LayerDrop may have left a block out of this very pass.
    assert (
        "'wav2vec2.encoder' is in train mode" in skipped["audio"]
        or "did not run" in (skipped["audio"])
    )


def test_trained_stem_is_skipped_and_trained_block_is_run() -> None:
    model = deep_vit()
    run = functools.partial(model, images())
    model.backbone.blocks[4].mlp.fc1.weight.requires_grad_(True)
    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (4, (3,))}
    check_same(model, prefix, run)
    model.backbone.pos_embed.requires_grad_(True)
    assert FrozenTrunk.of(model, run).skipped == {
        "vision": "what enters its first block is trained"
    }
    model.backbone.patch_embed.proj.weight.requires_grad_(True)
    assert FrozenTrunk.of(model, run).skipped == {
        "vision": "patch_embed.proj.weight, before its blocks, is trained"
    }


def test_trained_head_of_the_encoder_is_no_reason_to_skip() -> None:
    model = deep_vit()
    model.backbone.head.requires_grad_(True)
    run = functools.partial(model, images())
    prefix = FrozenTrunk.of(model, run)
    assert kept(prefix) == {"vision": (6, (5,))}
    check_same(model, prefix, run)


def test_tower_that_runs_twice_or_not_at_all_is_skipped() -> None:
    model = mmadapters.init(bare(FAMILIES["open_clip-clip"]))

    def run() -> list[Tensor]:
        return [model.encode_image(images()), model.encode_image(images() + 1)]

    assert FrozenTrunk.of(model, run).skipped == {
        "vision": "it ran 2 times in one pass",
        "text": "it did not run in this pass",
    }


def test_front_end_adapters_are_skipped_and_lower_ones_bound_the_rest() -> None:
    family = FAMILIES["hf-hubert"]
    model = holding(mmadapters.init(bare(family)), FrontEndAdapterConfig(size=4))
    skipped = FrozenTrunk.of(model, called(model, family)).skipped
    assert skipped == {"audio": "adapters act on its convolutional front end"}


def test_states_of_another_batch_are_refused() -> None:
    model = deep_vit()
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    states = prefix.capture(lambda: model(images()[:1]))
    with (
        prefix.resume(states),
        pytest.raises(ValueError, match=r"of tower 'vision' have the shape \(1, 17, 32\) and"),
    ):
        model(images())
    with pytest.raises(ValueError, match="no state of layer 5 of tower 'vision'; it needs"):
        prefix.resume({}).__enter__()
    model(images())


def test_adapters_that_act_below_by_now_are_refused() -> None:
    model = deep_vit()
    model.add_adapter("a", LoRAConfig(sites=("vision.blocks.2",)))
    run = functools.partial(model, images())
    prefix = FrozenTrunk.of(model, run)
    states = prefix.capture(run)
    model.set_active_adapters("a")
    with pytest.raises(ValueError, match="act at block 2 of tower 'vision' now, and its states"):
        prefix.resume(states).__enter__()
    with model.using(None), prefix.resume(states):
        run()


def test_pass_that_stops_below_is_refused() -> None:
    model = deep_vit()
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    with pytest.raises(ValueError, match="tower 'vision' did not run as far as block 5"):
        prefix.capture(lambda: ImageTower(model)(images(), (2,)))


def test_check_finds_what_reads_pixels_and_blocks_that_do_not_run() -> None:
    model = deep_vit()
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    prefix.check(lambda: model(images()))

    def reads(pixels: Tensor) -> Tensor:
        return model(pixels) + pixels.mean()

    prefix.check(lambda: reads(images()))
    with pytest.raises(ValueError, match="what resumes 'vision' is not the same when resumed"):
        prefix.check(lambda: reads(images()), resumed=lambda: reads(placeholder((2, 3, 32, 32))))
    with pytest.raises(ValueError, match="tower 'vision' is not the same when resumed"):
        prefix.check(lambda: ImageTower(model)(images(), (2, 5)).maps)


def test_check_names_the_tower_at_fault_and_takes_dropout_for_what_it_is() -> None:
    family = FAMILIES["hf-clip"]
    model = mmadapters.init(bare(family))
    args, kwargs = family.inputs()
    prefix = FrozenTrunk.of(model, lambda: model(*args, **kwargs))

    def noisy(**more: Any) -> Any:
        given = model(*args, **kwargs, **more)
        return [given.image_embeds, torch.dropout(given.text_embeds, 0.5, True)]

    prefix.check(noisy)
    stem = model.sites.towers["text"].blocks[0].module

    def reads() -> Any:
        seen = []
        handle = stem.register_forward_hook(lambda m, a, out: seen.append(tensors([out])[0]))
        model(*args, **kwargs)
        handle.remove()
        return seen

    with pytest.raises(ValueError, match="tower 'text' is not the same"):
        prefix.check(reads)


@pytest.mark.parametrize("blocks", ["[345]", "*"])
def test_other_threads_run_plainly_meanwhile(blocks: str) -> None:
    model = holding(deep_vit(), LoRAConfig(sites=(f"vision.blocks.{blocks}",)))
    x = torch.randn(2, 3, 32, 32)
    found: list[Tensor] = []
    done = threading.Event()

    def others() -> None:
        with torch.no_grad():
            while not done.is_set():
                found.append(model(x))

    with torch.no_grad():
        plain, other = model(images()), model(x)
        prefix = FrozenTrunk.of(model, lambda: model(images()))
        with ThreadPoolExecutor(2) as pool:
            threads = [pool.submit(others) for _ in range(2)]
            resumed = []
            try:
                for _ in range(20):
                    states = prefix.capture(lambda: model(images()))
                    with prefix.resume(states):
                        resumed.append(model(placeholder((2, 3, 32, 32))))
            finally:
                done.set()
            for thread in threads:
                thread.result()
    assert all(torch.equal(one, plain) for one in resumed)
    assert found
    assert all(torch.equal(one, other) for one in found)
    assert not intercepted(model)


def intercepted(model: AdapterModel) -> list[nn.Module]:
    modules = model.backbone.modules()
    return [m for m in modules if isinstance(m.__dict__.get("forward"), Interceptor)]


@pytest.mark.parametrize("name", ["timm-vit", "hf-wav2vec2", "open_clip-clip"])
def test_nothing_is_left_on_the_encoder(name: str) -> None:
    family = FAMILIES[name]
    model = model_from(family, "upper")
    run = called(model, family)
    before, keys = hooks(model), list(model.backbone.state_dict())
    prefix = FrozenTrunk.of(model, run)
    states = prefix.capture(run)
    with prefix.resume(states):
        run()
    assert hooks(model) == before
    assert list(model.backbone.state_dict()) == keys
    assert not [m for m in model.backbone.modules() if "forward" in m.__dict__]
    with prefix.resume(states):
        encoder = model.detach()
    assert not [m for m in encoder.modules() if "forward" in m.__dict__]


def test_pass_that_breaks_off_leaves_nothing_behind() -> None:
    model = deep_vit()

    def broken() -> None:
        model(images())
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        FrozenTrunk.of(model, broken)
    assert not intercepted(model)
    assert model.store.runtime.local.passing is None


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hf-hubert", "torchaudio-hubert"])
def test_checkpointed_blocks_are_resumed_and_computed_anew(name: str) -> None:
    family = FAMILIES[name]
    model = model_from(family, "upper")
    run = called(model, family)
    prefix = FrozenTrunk.of(model, run)
    plain = outputs(run)
    expected = gradients(model, plain)
    model.gradient_checkpointing_enable()
    check_same(model, FrozenTrunk.of(model, run), run)
    states = prefix.capture(run)
    with prefix.resume(states):
        resumed = outputs(run)
        model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable()
        args, kwargs = blank(family)
        again = outputs(lambda: model(*args, **kwargs))
    assert distance(again, plain) <= 1e-6
    found = gradients(model, resumed)
    for gradient in expected:
        assert distance([found[gradient]], [expected[gradient]]) <= 1e-6
    model.gradient_checkpointing_disable()
    assert not [m for m in model.backbone.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_copies_of_a_model_made_in_a_resumed_pass_run_plainly(checkpointed: bool) -> None:
    model = holding(deep_vit(), LoRAConfig(sites=("vision.blocks.[345]",)))
    if checkpointed:
        model.gradient_checkpointing_enable()
    run = functools.partial(model, images())
    plain = run()
    prefix = FrozenTrunk.of(model, run)
    with prefix.resume(prefix.capture(run)):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert torch.equal(copied(images() + 0), plain)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(other(images()), plain)
        own = FrozenTrunk.of(other, lambda other=other: other(images()))
        check_same(other, own, lambda other=other: other(images()))
        assert not [m for m in other.detach().modules() if "forward" in m.__dict__]


def test_prefixes_may_be_entered_one_in_another() -> None:
    model = deep_vit()
    for name, block in (("a", 2), ("b", 4)):
        model.add_adapter(name, LoRAConfig(sites=(f"vision.blocks.{block}",)))
        randomise(model.adapter(name))
    run = functools.partial(model, images())
    made = {}
    for name in "ab":
        model.set_active_adapters(name)
        prefix = FrozenTrunk.of(model, run)
        made[name] = prefix, prefix.capture(run), run()
    for outer, inner in ("ab", "ba"):
        prefix, states, plain = made[outer]
        with model.using(outer), prefix.resume(states):
            other, others, expected = made[inner]
            with model.using(inner), other.resume(others):
                assert torch.equal(run(), expected)
                other.capture(run)
            assert torch.equal(run(), plain)


def test_tower_that_only_a_pass_around_this_one_keeps_is_run() -> None:
    model = mmadapters.init(bare(FAMILIES["hf-clip"]))
    args, kwargs = FAMILIES["hf-clip"].inputs()

    def both() -> Any:
        return model(*args, **kwargs)

    def image() -> Any:
        return model.get_image_features(pixel_values=kwargs["pixel_values"])

    all_towers, vision = FrozenTrunk.of(model, both), FrozenTrunk.of(model, image)
    assert set(kept(all_towers)) == {"vision", "text"}
    assert set(kept(vision)) == {"vision"}
    plain, states = outputs(both), vision.capture(both)
    with all_towers.resume(all_towers.capture(both)), vision.resume(states):
        assert distance(outputs(both), plain) <= 1e-6


def test_compiled_model_is_compiled_once_for_all_resumed_passes() -> None:
    model = holding(deep_vit(4), LoRAConfig(sites=("vision.blocks.[23]",)))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    blank = placeholder((2, 3, 32, 32))
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    frames = []
    for _ in range(3):
        batch = torch.randn(2, 3, 32, 32)
        states = prefix.capture(functools.partial(model, batch))
        with prefix.resume(states):
            assert distance([compiled(blank)], [model(batch)]) <= 1e-6
        assert distance([compiled(batch)], [model(batch)]) <= 1e-6
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_fingerprint_tells_of_what_lies_below_alone() -> None:
    model = deep_vit()
    model.add_adapter("a", LoRAConfig(sites=("vision.blocks.[45]",)))
    model.add_adapter("low", LoRAConfig(sites=("vision.blocks.1",)))
    randomise(model.adapter("low"))
    model.set_active_adapters("a")
    prefix = FrozenTrunk.of(model, lambda: model(images()))
    before = prefix.fingerprint()
    randomise(model.adapter("a"))
    model.backbone.blocks[4].mlp.fc1.weight.data += 1
    assert prefix.fingerprint() == before
    model.merge_adapter("low")
    merged = prefix.fingerprint()
    assert merged != before
    model.reset_adapter("low")
    assert prefix.fingerprint() == before
    model.backbone.patch_embed.proj.bias.data += 1
    assert prefix.fingerprint() not in (before, merged)


def test_placeholder_is_one_number_that_shows_wherever_it_is_read() -> None:
    blank = placeholder((64, 3, 224, 224))
    assert blank.shape == (64, 3, 224, 224)
    assert blank.untyped_storage().nbytes() == 4
    assert blank.isnan().all()
    whole = placeholder((2, 3), dtype=torch.uint8)
    assert whole.dtype == torch.uint8
    assert not whole.any()
