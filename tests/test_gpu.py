"""What must hold on an accelerator too; the same facts as on the CPU, on one model of each kind."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
import transformers
from families import Family, families, tensors
from torch import Tensor, nn

import mmadapters
from mmadapters import BottleneckConfig, DoRAConfig, LoRAConfig, MethodConfig, PrefixConfig
from mmadapters.methods.bottleneck import ACTIVATIONS
from mmadapters.methods.kernels import fused
from mmadapters.tasks.training.encoder_trainer import use_one_gpu

pytestmark = pytest.mark.gpu

NAMES = (
    "timm-vit",
    "hf-vit",
    "open_clip-clip",
    "hf-wav2vec2-stable",
    "torchaudio-wavlm",
    "hf-bert",
)
CONFIGS: dict[str, MethodConfig] = {
    "bottleneck": BottleneckConfig(reduction_factor=4),
    "lora": LoRAConfig(rank=4, targets=("q", "k", "v", "o", "up", "down")),
    "dora": DoRAConfig(rank=4),
    "prefix": PrefixConfig(length=4),
}
PAIRS = [(name, method) for name in NAMES for method in CONFIGS]


def on_gpu(value, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    if isinstance(value, Tensor):
        return value.to("cuda", dtype) if value.is_floating_point() else value.to("cuda")
    if isinstance(value, dict):
        return {key: on_gpu(item, dtype) for key, item in value.items()}
    return tuple(on_gpu(item, dtype) for item in value)


def family(name: str) -> Family:
    found = families()
    if name not in found:
        pytest.skip(f"{name} needs a library that is not installed here")
    return found[name]


def build(name: str, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    kind = family(name)
    args, kwargs = kind.inputs()
    return kind.build().to("cuda", dtype), on_gpu(args, dtype), on_gpu(kwargs, dtype)


def outputs(model: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    return tensors(model(*args, **kwargs))


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_adapter_lives_on_the_backbones_device_and_starts_as_identity(
    name: str, method: str
) -> None:
    backbone, args, kwargs = build(name)
    backbone.requires_grad_(False)
    with torch.no_grad():
        bare = outputs(backbone, args, kwargs)
        model = mmadapters.init(backbone)
        model.add_adapter("a", CONFIGS[method])
        assert {p.device.type for p in model.adapter("a").parameters()} == {"cuda"}
        model.set_active_adapters("a")
        fresh = outputs(model, args, kwargs)
    assert all(map(torch.equal, bare, fresh)) is CONFIGS[method].identity


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_bf16_training_leaves_the_backbone_bit_for_bit(name: str, method: str) -> None:
    backbone, args, kwargs = build(name, torch.bfloat16)
    before = copy.deepcopy(backbone.state_dict())
    model = mmadapters.init(backbone)
    model.add_adapter("a", CONFIGS[method])
    model.train_adapter("a")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        loss = sum(out.float().square().mean() for out in outputs(model, args, kwargs))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = outputs(model, args, kwargs)
        with model.using(None):
            bare = outputs(model, args, kwargs)
    assert not all(map(torch.equal, trained, bare))
    after = model.detach().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("method", ["bottleneck", "lora", "prefix"])
def test_compiled_model_equals_eager(method: str) -> None:
    torch._dynamo.reset()
    backbone, args, kwargs = build("timm-vit")
    model = mmadapters.init(backbone)
    model.add_adapter("a", CONFIGS[method])
    model.set_active_adapters("a")
    for parameter in model.adapter("a").parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        eager = outputs(model, args, kwargs)
        compiled = outputs(torch.compile(model, fullgraph=True), args, kwargs)
    for one, other in zip(eager, compiled, strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


def test_gradients_with_checkpointing_equal_those_without() -> None:
    backbone, args, kwargs = build("hf-vit")
    model = mmadapters.init(backbone, train_trunk=True)
    model.add_adapter("a", CONFIGS["bottleneck"])
    model.train_adapter("a")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        sum(out.square().mean() for out in outputs(model, args, kwargs)).backward()
        return [p.grad.clone() for p in model.adapter("a").parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert len(plain) == len(list(model.adapter("a").parameters()))
    for one, other in zip(plain, again, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_threads_with_different_adapters_never_mix() -> None:
    backbone, args, kwargs = build("timm-vit")
    model = mmadapters.init(backbone)
    expected = {}
    for name in ("a", "b"):
        model.add_adapter(name, CONFIGS["lora"])
        for parameter in model.adapter(name).parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        with model.using(name), torch.no_grad():
            expected[name] = outputs(model, args, kwargs)
    wrong = []

    def serve(name: str) -> None:
        for _ in range(50):
            with model.using(name), torch.no_grad():
                got = outputs(model, args, kwargs)
            if not all(map(torch.equal, got, expected[name])):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(expected["a"][0], expected["b"][0])
    assert wrong == []


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "quick_gelu", "identity"])
@pytest.mark.parametrize("rows", [1, 5000, 40000])
def test_one_kernel_of_a_bottleneck_computes_the_formula(rows: int, activation: str) -> None:
    h, rest = (torch.randn(rows, 360, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    shapes = ((48, 360), (48,), (360, 48), (360,))
    maps = tuple((0.1 * torch.randn(shape, device="cuda")).bfloat16() for shape in shapes)
    assert fused.fits(h, rest, maps, activation)
    down, down_bias, up, up_bias = (t.double() for t in maps)
    state = ACTIVATIONS[activation](h.double() @ down.T + down_bias)
    wanted = rest.double() + 0.5 * (state @ up.T + up_bias)
    for _ in range(2):  # the second time by the kernel that is kept
        found = fused.bottleneck(h, rest, maps, activation=activation, scale=0.5)
        assert (found.double() - wanted).norm() / wanted.norm() < 4e-3


@pytest.mark.parametrize("name", NAMES)
def test_bottleneck_without_gradients_equals_that_with(name: str) -> None:
    model, args, kwargs = build(name, torch.bfloat16)
    adapted = mmadapters.init(model)
    adapted.add_adapter("a", BottleneckConfig(reduction_factor=4))
    with torch.no_grad():
        bare = outputs(adapted, args, kwargs)
        adapted.set_active_adapters("a")
        assert all(map(torch.equal, outputs(adapted, args, kwargs), bare))
        for parameter in adapted.adapter("a").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found = outputs(adapted, args, kwargs)
    adapted.train_adapter("a")
    adapted.eval()
    wanted = outputs(adapted, args, kwargs)
    change = max((w.float() - b.float()).norm() for w, b in zip(wanted, bare, strict=True))
    error = max((f.float() - w.float()).norm() for f, w in zip(found, wanted, strict=True))
    assert error < 0.05 * change


def test_lora_on_a_fused_map_equals_its_merge() -> None:
    model, args, kwargs = build("timm-vit")
    adapted = mmadapters.init(model)
    adapted.add_adapter("a", LoRAConfig(rank=4, targets=("q", "v")))
    adapted.set_active_adapters("a")
    with torch.no_grad():
        for parameter in adapted.adapter("a").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found = outputs(adapted, args, kwargs)
    with_gradients = outputs(adapted, args, kwargs)
    adapted.merge_adapter("a")
    for f, g, m in zip(found, with_gradients, outputs(adapted, args, kwargs), strict=True):
        torch.testing.assert_close(f, g, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(f, m, rtol=1e-3, atol=1e-3)


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs in one process")


@TWO
def test_trainer_on_two_gpus_is_refused_and_own_training_takes_one(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = mmadapters.init(transformers.ViTForImageClassification(config))
    model.add_adapter("a", LoRAConfig(rank=4))
    model.train_adapter("a")
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": number % 2} for number in range(4)]
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none")
    assert arguments.n_gpu == torch.cuda.device_count()
    with pytest.raises(RuntimeError, match=r"DataParallel cannot run .*torchrun"):
        transformers.Trainer(model, arguments, train_dataset=rows).train()
    with pytest.warns(UserWarning, match=r"torchrun --nproc-per-node"):
        use_one_gpu(arguments)
    assert arguments.n_gpu == 1
    assert transformers.Trainer(model, arguments, train_dataset=rows).train().global_step == 1


@TWO
def test_data_parallel_on_two_gpus_is_refused_and_changes_nothing() -> None:
    model, args, kwargs = build("hf-vit")
    adapted = mmadapters.init(model)
    adapted.add_adapter("a", LoRAConfig(rank=4))
    adapted.set_active_adapters("a")
    with torch.no_grad():
        before = outputs(adapted, args, kwargs)
        two = [torch.cat((value, value)) for value in args]
        several = {key: torch.cat((value, value)) for key, value in kwargs.items()}
        with pytest.raises(RuntimeError, match=r"DataParallel cannot run .*torchrun"):
            nn.DataParallel(adapted)(*two, **several)
        assert all(map(torch.equal, outputs(adapted, args, kwargs), before))
