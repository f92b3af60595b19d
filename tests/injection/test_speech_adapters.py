"""Speech adapters in whole encoders: libraries, padding, training, files and compositions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import Family, seeded, speech, tensors
from families.small import randomise
from families.speech import SMALL
from injection.matrix import FAMILIES, METHODS, bare, distance, loss_of, refusal, run, train
from safetensors.torch import load_file
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    AdapterModel,
    Architecture,
    Average,
    BatchSplit,
    ConfigUnion,
    ConformerAdapterConfig,
    EAdapterConfig,
    FrontEndAdapterConfig,
    Fuse,
    LAdapterConfig,
    Parallel,
    Route,
    SeqBnConfig,
    Split,
    Stack,
    SublayerSpec,
    TowerSpec,
)
from mmadapters.composition import Composition
from mmadapters.methods.conformer import ConformerAdapter
from mmadapters.sites.acting import Context
from mmadapters.sites.tables import find_row
from mmadapters.tasks.encoders.speech import SpeechTower

OWN = (
    "e_adapter",
    "mms_adapter",
    "conformer_adapter",
    "l_adapter",
    "l_adapter-replacing",
    "conv_front_end",
)
TWINS = [
    (FAMILIES[trait.removeprefix("twin:")], family)
    for family in speech.FAMILIES
    for trait in family.traits
    if trait.startswith("twin:")
]
each_method = pytest.mark.parametrize("method", OWN)
STABLE, PRENORM = FAMILIES["hf-wav2vec2-stable"], FAMILIES["torchaudio-wav2vec2-prenorm"]
LENGTHS = torch.tensor([3300, 4800])


@torch.no_grad()
def fill(module: nn.Module, std: float = 0.1) -> None:
    """Random parameters, and random means and variances of batch norms."""
    randomise(module, std)
    for name, buffer in module.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("running_var") else 0.0))


def holding(family: Family, **configs: Any) -> AdapterModel:
    torch.manual_seed(0)
    model = mmadapters.init(bare(family))
    for name, config in configs.items():
        model.add_adapter(name, config)
        fill(model.adapter(name), 0.3)
    return model


def waves() -> Tensor:
    """(2, 4800); behind the first one's 3300 samples there is noise."""
    return torch.randn(2, 4800, generator=torch.Generator().manual_seed(5))


def padded(family: Family) -> tuple[tuple, dict[str, Any]]:
    if not family.name.startswith("hf"):
        return (waves(), LENGTHS), {}
    mask = torch.arange(4800) < LENGTHS[:, None]
    return (waves(),), {"attention_mask": mask.long()}


@each_method
@pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins[1].name)
@pytest.mark.parametrize("direction", ["forth", "back"])
def test_one_file_gives_the_same_on_transformers_and_torchaudio(
    twins: tuple[Family, Family], method: str, direction: str, tmp_path: Path
) -> None:
    source, target = twins if direction == "forth" else twins[::-1]
    model = holding(source, a=METHODS[method])
    model.save_adapter(tmp_path / "a", "a")
    other = mmadapters.init(bare(target))
    other.load_adapter(tmp_path / "a")
    plain = run(model, source)[0]
    model.set_active_adapters("a")
    other.set_active_adapters("a")
    expected, given = run(model, source)[0], run(other, target)[0]
    assert (given - expected).abs().max() <= 1e-5
    assert (expected - plain).abs().max() > 1e-3


@each_method
def test_the_same_with_padding(method: str, tmp_path: Path) -> None:
    model = holding(STABLE, a=METHODS[method])
    model.save_adapter(tmp_path / "a", "a")
    other = mmadapters.init(bare(PRENORM))
    other.load_adapter(tmp_path / "a")
    given = []
    for one, family in ((model, STABLE), (other, PRENORM)):
        one.set_active_adapters("a")
        args, kwargs = padded(family)
        with torch.no_grad():
            given.append(tensors(one(*args, **kwargs))[0])
    real = 10  # frames of 3300 samples
    assert (given[0][0, :real] - given[1][0, :real]).abs().max() <= 1e-5
    assert (given[0][1] - given[1][1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in (
            *("hf-wav2vec2", "hf-wav2vec2-stable", "hf-wavlm", "hf-whisper"),
            *("torchaudio-hubert", "torchaudio-wavlm"),
        )
        for method in OWN
        if refusal(FAMILIES[name], method) is None
    ],
)
def test_tasks_give_an_utterance_the_same_frames_in_any_batch(name: str, method: str) -> None:
    family = FAMILIES[name]
    model = holding(family, a=METHODS[method])
    model.set_active_adapters("a")
    tower = SpeechTower(model)
    lengths = LENGTHS if tower.longest is None else LENGTHS.clamp(max=tower.longest)
    with torch.no_grad():
        frames, counts = tower(waves(), lengths)
        alone, _ = tower(waves()[:1, : int(lengths[0])], lengths[:1])
    assert counts[0] < counts[1] or name == "hf-whisper"
    assert distance([frames[:1, : int(counts[0])]], [alone]) <= 1e-5


def test_mask_of_eager_attention_says_the_same() -> None:
    given = []
    for attention in ("sdpa", "eager"):
        config = transformers.Wav2Vec2Config(**SMALL, **speech.STABLE, layerdrop=0.0)
        backbone = seeded(
            lambda config=config, attention=attention: transformers.Wav2Vec2Model._from_config(
                config, attn_implementation=attention
            )
        )
        torch.manual_seed(0)
        model = mmadapters.init(backbone)
        model.add_adapter("a", METHODS["conformer_adapter"])
        fill(model.adapter("a"), 0.3)
        model.set_active_adapters("a")
        args, kwargs = padded(STABLE)
        with torch.no_grad():
            given.append(model(*args, **kwargs)[0][0, :10])
    assert distance(given[:1], given[1:]) <= 1e-5


@pytest.mark.parametrize("family", [STABLE, PRENORM], ids=lambda family: family.name)
def test_padding_moves_no_running_statistic(family: Family) -> None:
    kept = []
    for scale in (1.0, 50.0):
        model = holding(family, a=METHODS["conformer_adapter"])
        model.train_adapter("a")
        args, kwargs = padded(family)
        args[0][0, int(LENGTHS[0]) :] *= scale
        model(*args, **kwargs)
        kept.append([buffer.clone() for buffer in model.adapter("a").buffers()])
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_saved_and_loaded(tmp_path: Path) -> None:
    model = mmadapters.init(bare(STABLE))
    model.add_adapter("a", METHODS["conformer_adapter"])
    fresh = {name: buffer.clone() for name, buffer in model.adapter("a").named_buffers()}
    train(model, STABLE.inputs())
    assert len(fresh) == 4
    for name, buffer in model.adapter("a").named_buffers():
        assert not torch.equal(buffer, fresh[name])
    model.save_adapter(tmp_path / "a", "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum(key.endswith(("running_mean", "running_var")) for key in stored) == 4
    other = mmadapters.init(bare(STABLE))
    other.load_adapter(tmp_path / "a")
    for one, two in zip(model.adapter("a").buffers(), other.adapter("a").buffers(), strict=True):
        assert torch.equal(one, two)


def test_self_check_and_idle_adapters_move_no_running_statistic() -> None:
    model = mmadapters.init(bare(STABLE))
    model.add_adapter("a", METHODS["conformer_adapter"])
    model.train()
    run(model, STABLE)
    for name, buffer in model.adapter("a").named_buffers():
        assert torch.equal(buffer, torch.full_like(buffer, float(name.endswith("var"))))


@pytest.mark.parametrize("name", ["hf-wav2vec2-stable", "torchaudio-wav2vec2-prenorm"])
@each_method
def test_checkpointing_gives_the_same_gradients_with_padding(name: str, method: str) -> None:
    family, gradients = FAMILIES[name], []
    for checkpointing in (False, True):
        model = holding(family, a=METHODS[method])
        model.train_adapter("a")
        model.set_grad_checkpointing(checkpointing)
        args, kwargs = padded(family)
        output = tensors(model(*args, **kwargs))[0]
        loss_of([output[0, :10], output[1]]).backward()
        gradients.append([p.grad for p in model.adapter("a").parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("train_trunk", [False, True])
@pytest.mark.parametrize("name", ["hf-wav2vec2", "hf-wavlm", "torchaudio-wav2vec2"])
def test_front_end_is_in_the_graph_from_the_first_adapted_layer_on(
    name: str, train_trunk: bool
) -> None:
    model = mmadapters.init(bare(FAMILIES[name]), train_trunk=train_trunk)
    model.add_adapter("a", FrontEndAdapterConfig(size=4, sites=("audio.front.[35]",)))
    fill(model.adapter("a"))
    model.train_adapter("a")
    tracked: list[bool] = []
    for layer in model.sites.towers["audio"].front:
        layer.module.register_forward_hook(
            lambda _, __, out: tracked.append(tensors(out)[0].requires_grad)
        )
    args, kwargs = FAMILIES[name].inputs()
    output = tensors(model(*args, **kwargs))[0]
    assert tracked == [False] * 3 + [True] * 4
    loss_of([output]).backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in model.adapter("a").parameters())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_l_adapter_bears_layers_that_layer_drop_leaves_out() -> None:
    config = transformers.Wav2Vec2Config(**SMALL, layerdrop=0.5)
    model = mmadapters.init(seeded(lambda: transformers.Wav2Vec2Model(config)), train_trunk=True)
    model.add_adapter("a", LAdapterConfig())
    model.train_adapter("a")
    for seed in range(12):
        torch.manual_seed(seed)
        (sound,), _ = speech.waves()
        output = model(sound).last_hidden_state
        if output.requires_grad:
            output.square().mean().backward()
        assert output.isfinite().all()


def test_blocks_run_without_their_tower_leave_nothing_behind() -> None:
    model = holding(PRENORM, a=LAdapterConfig())
    model.set_active_adapters("a")
    (sound,), _ = speech.waves()
    with torch.no_grad():
        acting = tensors(model(sound))[0]
        model.extract_features(sound)
        assert model.store.runtime.local.states == {}
        assert torch.equal(tensors(model(sound))[0], acting)


def test_e_and_l_adapters_go_under_one_name() -> None:
    model = mmadapters.init(bare(STABLE))
    model.add_adapter("a", ConfigUnion(EAdapterConfig(size=4), LAdapterConfig()))
    train(model, STABLE.inputs())
    (row,) = model.adapter_summary()
    assert (row.method, row.sites) == ("union", 3)


def partial(backbone: Any) -> Architecture:
    """The encoder's own architecture without what only speech adapters want."""
    row = find_row(backbone)
    assert row is not None
    known = next(iter(row.architectures(backbone)))
    (tower,) = known.towers
    return dataclasses.replace(known, towers=(dataclasses.replace(tower, runner=None, front=None),))


def test_site_map_without_runner_or_front_is_refused_in_one_sentence() -> None:
    backbone = bare(STABLE)
    model = mmadapters.init(backbone, sites=partial(backbone))
    with pytest.raises(ValueError, match=r"give TowerSpec\(runner=...\) for l_adapter"):
        model.add_adapter("a", LAdapterConfig())
    with pytest.raises(ValueError, match="has no convolutional front end"):
        model.add_adapter("a", FrontEndAdapterConfig())
    model.add_adapter("a", METHODS["conformer_adapter"])


def hand_written(*, attention: bool = True, batch_first: bool = True) -> AdapterModel:
    """torch's own pre-norm encoder as a tower of sound."""
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=batch_first, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    leaves = {role: f"self_attn.in_proj_weight[{i}/3]" for i, role in enumerate("qkv")}
    attn = SublayerSpec(
        output="dropout1", residual="norm1", attention="self_attn", norm="norm1", leaves=leaves
    )
    ffn = SublayerSpec(
        output="dropout2",
        residual="norm2",
        input="linear1",
        norm="norm2",
        leaves={"up": "linear1", "down": "linear2"},
    )
    sublayers = {"attn": attn, "ffn": ffn} if attention else {"ffn": ffn}
    tower = TowerSpec(
        name="audio", blocks="layers", sublayers=sublayers, runner="", batch_first=batch_first
    )
    return mmadapters.init(
        encoder,
        sites=Architecture(towers=(tower,)),
        example_inputs=(torch.randn(1, 6, 32),),
    )


@pytest.mark.parametrize("method", ["conformer_adapter", "l_adapter"])
def test_hand_written_tower_hides_its_padding_too(method: str) -> None:
    torch.manual_seed(0)
    model = hand_written()
    model.add_adapter("a", METHODS[method])
    fill(model.adapter("a"), 0.3)
    x, hidden = torch.randn(2, 9, 32), torch.arange(9) >= torch.tensor([[6], [9]])
    with torch.no_grad():
        plain = model(x[:1, :6])
        model.set_active_adapters("a")
        together = model(x, src_key_padding_mask=hidden)[:1, :6]
        alone = model(x[:1, :6])
    assert distance([together], [alone]) <= 1e-5
    assert distance([alone], [plain]) > 1e-3


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"attention": False}, "which the site map does not name as 'attn'"),
        ({"batch_first": False}, "build it with batch_first=True"),
    ],
    ids=str,
)
def test_tower_that_a_conformer_adapter_cannot_read_is_refused(
    layout: dict[str, bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hand_written(**layout).add_adapter("a", METHODS["conformer_adapter"])


def outputs(model: AdapterModel, setup: Any, rows: slice = slice(None)) -> Tensor:
    (sound,), _ = speech.waves()
    with torch.no_grad(), model.using(setup):
        return tensors(model(sound[rows]))[0]


@pytest.mark.parametrize("family", [STABLE, PRENORM], ids=lambda family: family.name)
@each_method
def test_each_sample_of_a_route_gets_its_own_adapter(method: str, family: Family) -> None:
    model = holding(family, a=METHODS[method], b=METHODS[method])
    alone = {name: outputs(model, name) for name in "ab"} | {"base": outputs(model, None)}
    assert distance([alone["a"]], [alone["b"]]) > 1e-3
    for first, second in (("a", "b"), ("b", "a"), ("base", "b"), ("a", "base")):
        routed = outputs(model, Route((first, second)))
        assert distance([routed[:1]], [alone[first][:1]]) <= 1e-5
        assert distance([routed[1:]], [alone[second][1:]]) <= 1e-5
    split = outputs(model, BatchSplit("a", "b", batch_sizes=(1, 1)))
    assert distance([split[1:]], [alone["b"][1:]]) <= 1e-5


def test_padding_stays_with_its_sample_in_a_route() -> None:
    config = METHODS["conformer_adapter"]
    model = holding(STABLE, a=config, b=config, c=config)
    model.adapter("c").load(model.adapter("a").tensors(), "a")
    args, kwargs = padded(STABLE)
    with torch.no_grad():
        with model.using("a"):
            alone = model(args[0][:1, : int(LENGTHS[0])])[0]
        for setup in (Route(("a", "b")), Average("a", "c"), Stack("a")):
            with model.using(setup):
                mixed = model(*args, **kwargs)[0][:1, :10]
            assert distance([mixed], [alone]) <= 1e-5
        with model.using(Parallel("b", "a")):
            copies = model(*args, **kwargs)[0]
    assert distance([copies[2:3, :10]], [alone]) <= 1e-5


@each_method
def test_average_of_two_equal_adapters_is_either(method: str) -> None:
    model = holding(STABLE, a=METHODS[method], b=METHODS[method], c=METHODS[method])
    model.adapter("b").load(model.adapter("a").tensors(), "a")
    single = outputs(model, "a")
    assert distance([outputs(model, Average("a", "b"))], [single]) <= 1e-5
    assert distance([outputs(model, Average("a", "c"))], [single]) > 1e-3


def test_average_of_l_adapters_is_the_mean_of_what_they_give() -> None:
    model = holding(STABLE, a=LAdapterConfig(), b=LAdapterConfig(residual=False))
    mean = (3 * outputs(model, "a") + outputs(model, "b")) / 4
    given = outputs(model, Average("a", "b", weights=(3, 1)))
    assert distance([given], [mean]) <= 1e-5


@pytest.mark.parametrize("family", [STABLE, PRENORM], ids=lambda family: family.name)
@pytest.mark.parametrize("method", ["e_adapter", "mms_adapter", "conformer_adapter"])
def test_parallel_is_each_adapter_on_its_copy(method: str, family: Family) -> None:
    model = holding(family, a=METHODS[method], b=METHODS[method])
    both = torch.cat([outputs(model, "a"), outputs(model, "b")])
    assert distance([outputs(model, Parallel("a", "b"))], [both]) <= 1e-5


MIXED: list[tuple[str, Callable[[], Composition]]] = [
    ("Split", lambda: Split("a", "b", splits=(4,))),
    ("Parallel", lambda: Parallel("a", "b")),
]


@pytest.mark.parametrize(("what", "make"), MIXED, ids=[what for what, _ in MIXED])
@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("l_adapter", "it acts on what a whole tower gives.*use Stack or Average, or Route"),
        ("conv_front_end", "at audio.front.0 there are samples of sound.*use Stack or Average"),
    ],
)
def test_what_has_no_tokens_of_its_own_is_refused_in_one_sentence(
    method: str, reason: str, what: str, make: Callable[[], Composition]
) -> None:
    model = holding(STABLE, b=SeqBnConfig(size=4), a=METHODS[method])
    with pytest.raises(ValueError, match=f"{what} cannot hold 'a', a {method}: {reason}") as error:
        model.set_active_adapters(make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["l_adapter", "conv_front_end"])
def test_fusion_of_them_is_refused(method: str) -> None:
    model = holding(STABLE, a=METHODS[method], b=SeqBnConfig(size=4))
    with pytest.raises(ValueError, match=f"adapter 'a', a {method}, cannot be fused"):
        model.add_adapter_fusion(["a", "b"])


def test_conformer_adapters_are_fused_and_split_like_bottlenecks() -> None:
    model = holding(STABLE, a=METHODS["conformer_adapter"], b=SeqBnConfig(size=4))
    model.add_adapter_fusion(["a", "b"])
    args, kwargs = padded(STABLE)
    with torch.no_grad(), model.using(Fuse("a", "b")):
        together = model(*args, **kwargs)[0][:1, :10]
        alone = model(args[0][:1, : int(LENGTHS[0])])[0]
    assert distance([together], [alone]) <= 1e-5
    first = outputs(model, Split("a", "base", splits=(14,)))
    assert distance([first], [outputs(model, "a")]) <= 1e-5


def test_dropped_blocks_take_the_front_end_with_them() -> None:
    model = holding(STABLE, a=FrontEndAdapterConfig(size=4))
    (sound,), _ = speech.waves()
    with torch.no_grad():
        plain = tensors(model(sound))[0]
        with model.using("a", drop=1):
            assert torch.equal(tensors(model(sound))[0], plain)
        with model.using("a"):
            assert not torch.equal(tensors(model(sound))[0], plain)


@pytest.mark.parametrize("method", ["conformer_adapter", "l_adapter", "conv_front_end"])
@pytest.mark.parametrize("family", [STABLE, PRENORM], ids=lambda family: family.name)
def test_compiled_model_gives_the_same(family: Family, method: str) -> None:
    torch._dynamo.reset()
    model = holding(family, a=METHODS[method])
    model.set_active_adapters("a")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert distance(run(compiled, family), run(model, family)) <= 1e-6
    model.set_active_adapters(None)
    assert distance(run(compiled, family), run(mmadapters.init(bare(family)), family)) <= 1e-6
    torch._dynamo.reset()


def test_reach_of_a_conformer_adapter_is_that_of_its_kernel() -> None:
    """A frame sees `kernel // 2` frames on each side, and no more."""
    config = ConformerAdapterConfig(size=4, kernel=5, sites=("audio.blocks.0",))
    model = holding(STABLE, a=config)
    ((_, module),) = model.adapter("a").entries()
    assert isinstance(module, ConformerAdapter)
    x = torch.randn(1, 11, 32)
    moved = x.clone()
    moved[:, 5] += torch.randn(32)
    with torch.no_grad():
        changes = [module.change(y, Context(torch.zeros_like(y))) for y in (x, moved)]
    differs = (changes[0] - changes[1]).abs().amax((0, 2)) > 1e-6
    assert differs.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
