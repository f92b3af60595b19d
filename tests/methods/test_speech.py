"""Speech adapters against their formulas in NumPy, MMS adapters against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import seeded, tensors
from families.speech import SMALL, STABLE, hf_wav2vec2, hf_wav2vec2_stable, waves
from methods.reference import Array, assert_close, gelu, layer_norm, randomise, sigmoid, softmax
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2AttnAdapterLayer

from mmadapters import (
    AdapterModel,
    ConformerAdapterConfig,
    EAdapterConfig,
    FrontEndAdapterConfig,
    LAdapterConfig,
    MethodConfig,
    MMSAdapterConfig,
    ParallelPlacement,
    SequentialPlacement,
    init,
)
from mmadapters.methods.conformer import ConformerAdapter, FrameNorm
from mmadapters.sites.acting import Context
from mmadapters.sites.tables import describe

SITE = "audio.blocks.0.ffn"
FRAMES, WIDTH, LAYERS = 14, 32, 2
BUILDS = {"pre-norm": hf_wav2vec2_stable, "post-norm": hf_wav2vec2}


def sound() -> Tensor:
    """(2, 4800) in float64."""
    return waves()[0][0].double()


def random_like(adapter: nn.Module) -> None:
    """Random parameters and, of a batch norm, random means and variances."""
    randomise(adapter)
    for name, buffer in adapter.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else 0.0))


def adapted(model: nn.Module, config: MethodConfig) -> AdapterModel:
    wrapped = init(model.double())
    wrapped.add_adapter("a", config)
    random_like(wrapped.adapter("a"))
    wrapped.set_active_adapters("a")
    return wrapped


def numbers(model: AdapterModel) -> dict[str, Array]:
    """The tensors of the adapter by `<site>/<parameter>`."""
    found = {}
    for key, tensor in model.adapter("a").tensors().items():
        place, parameter = key.split("/", 1)
        found[f"{place.split('#')[0]}/{parameter}"] = tensor.detach().double().numpy()
    return found


@torch.no_grad()
def states(model: nn.Module) -> tuple[list[Array], Array]:
    """What enters the first block and what each gives; and the last hidden state."""
    output = model(sound(), output_hidden_states=True)
    return [state.numpy() for state in output.hidden_states], output[0].numpy()


def of(p: dict[str, Array], site: str) -> dict[str, Array]:
    return {key.split("/")[1]: value for key, value in p.items() if key.startswith(f"{site}/")}


def e_change(p: dict[str, Array], u: Array) -> Array:
    h = gelu(u @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"]
    return layer_norm(h, p["norm_after.weight"], p["norm_after.bias"])


def mms_change(p: dict[str, Array], z: Array) -> Array:
    h = layer_norm(z, p["norm_before.weight"], p["norm_before.bias"])
    h = np.maximum(h @ p["down.weight"].T + p["down.bias"], 0)
    return h @ p["up.weight"].T + p["up.bias"]


def conformer_change(
    p: dict[str, Array], z: Array, *, real: Array | None = None, training: bool = False
) -> Array:
    """z: (B, N, D); real: (B, N)."""
    real = np.ones(z.shape[:2], dtype=bool) if real is None else real
    h = layer_norm(z, p["norm.weight"], p["norm.bias"])
    h = h @ p["expand.weight"].T + p["expand.bias"]
    one, gate = np.split(h, 2, axis=-1)
    h = one * sigmoid(gate) * real[..., None]
    kernel = p["depthwise.weight"][:, 0]  # (r, k)
    reach = kernel.shape[1] // 2
    padded = np.pad(h, ((0, 0), (reach, reach), (0, 0)))
    h = sum(padded[:, j : j + z.shape[1]] * kernel[:, j] for j in range(kernel.shape[1]))
    mean, variance = p["batch_norm.running_mean"], p["batch_norm.running_var"]
    if training:
        mean, variance = h[real].mean(axis=0), h[real].var(axis=0)
    h = (h - mean) / np.sqrt(variance + 1e-5)
    h = h * p["batch_norm.weight"] + p["batch_norm.bias"]
    return h * sigmoid(h) @ p["up.weight"].T + p["up.bias"]


def front_change(p: dict[str, Array], c: Array) -> Array:
    """c: (B, C, T); the convolution sees the step itself and those before."""
    h = np.einsum("rc,bct->brt", p["down.weight"][..., 0], c) + p["down.bias"][:, None]
    kernel = p["depthwise.weight"][:, 0]
    size = kernel.shape[1]
    padded = np.pad(h, ((0, 0), (0, 0), (size - 1, 0)))
    h = sum(padded[..., j : j + c.shape[-1]] * kernel[:, j, None] for j in range(size))
    h = gelu(h + p["depthwise.bias"][:, None])
    return np.einsum("cr,brt->bct", p["up.weight"][..., 0], h) + p["up.bias"][:, None]


BLOCK = {
    "mms": (MMSAdapterConfig(size=6, sites=("audio.blocks.0",)), mms_change),
    "conformer": (
        ConformerAdapterConfig(size=6, kernel=5, sites=("audio.blocks.0",)),
        conformer_change,
    ),
}


@pytest.mark.parametrize("method", BLOCK)
def test_at_the_end_of_a_pre_norm_block_it_adds_its_formula(method: str) -> None:
    config, change = BLOCK[method]
    model = adapted(hf_wav2vec2_stable(), config)
    with model.using(None):
        plain, _ = states(model)
    acting, _ = states(model)
    assert_close(acting[1], plain[1] + change(of(numbers(model), SITE), plain[1]))
    assert np.abs(acting[1] - plain[1]).max() > 1e-3


@pytest.mark.parametrize("method", BLOCK)
def test_in_a_post_norm_block_it_adds_before_the_last_norm(method: str) -> None:
    config, change = BLOCK[method]
    model = adapted(hf_wav2vec2(), config)
    layer = model.backbone.wav2vec2.encoder.layers[0]  # type: ignore[union-attr]
    summed, plain = sums_before(model, layer.final_layer_norm)
    assert_close(summed, plain + change(of(numbers(model), SITE), plain))


@torch.no_grad()
def sums_before(model: AdapterModel, norm: nn.Module) -> tuple[Array, Array]:
    """What the norm reads with the adapter, and without."""
    seen: list[Array] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
    model(sound())
    with model.using(None):
        model(sound())
    handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("norms", BUILDS)
def test_e_adapter_adds_its_formula_to_the_feed_forward_part(norms: str) -> None:
    model = adapted(BUILDS[norms](), EAdapterConfig(size=6, sites=("audio.blocks.0",)))
    assert [site for site, _ in model.adapter("a").entries()] == [SITE]
    sublayer = model.sites.towers["audio"].blocks[0].sublayers["ffn"]
    seen: list[Array] = []
    with torch.no_grad():
        handle = sublayer.output.register_forward_hook(lambda _, __, out: seen.append(out.numpy()))
        model(sound())
        with model.using(None):
            model(sound())
        handle.remove()
    acting, plain = seen
    assert_close(acting, plain + e_change(of(numbers(model), SITE), plain))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norms", BUILDS)
def test_l_adapter_is_the_weighted_sum_of_what_the_layers_gave(norms: str, residual: bool) -> None:
    backbone = BUILDS[norms]()
    backbone = getattr(backbone, "wav2vec2", backbone)
    seen: list[Array] = []
    model = adapted(backbone, LAdapterConfig(residual=residual))
    p = of(numbers(model), "audio")
    for layer in backbone.encoder.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(tensors(out)[0].numpy()))
    with torch.no_grad(), model.using(None):
        last = model(sound())[0].numpy()
    shares = softmax(p["weights"])
    expected = last if residual else np.zeros_like(last)
    for index in range(LAYERS):
        h = gelu(seen[index] @ p[f"linears.{index}.weight"].T + p[f"linears.{index}.bias"])
        normed = layer_norm(h, p[f"norms.{index}.weight"], p[f"norms.{index}.bias"])
        expected = expected + shares[index] * normed
    with torch.no_grad():
        for output in (model(sound())[0], model(sound(), return_dict=False)[0]):
            assert_close(output.numpy(), expected)


def test_l_adapter_of_some_layers_reads_these_alone() -> None:
    model = adapted(hf_wav2vec2_stable(), LAdapterConfig(sites=("audio.blocks.0",)))
    names = set(of(numbers(model), "audio"))
    assert names == {f"{part}.0.{kind}" for part in ("linears", "norms") for kind in KINDS}


KINDS = ("weight", "bias")


@pytest.mark.parametrize("layer", [0, 3, 6])
@pytest.mark.parametrize("norms", BUILDS)
def test_front_end_adapter_adds_its_formula_and_keeps_the_frames(norms: str, layer: int) -> None:
    site = f"audio.front.{layer}"
    model = adapted(BUILDS[norms](), FrontEndAdapterConfig(size=5, kernel=4, sites=(site,)))
    seen: list[Array] = []
    with torch.no_grad():
        module = model.sites.towers["audio"].front[layer].module
        handle = module.register_forward_hook(lambda _, __, out: seen.append(out.numpy()))
        model(sound())
        with model.using(None):
            model(sound())
        handle.remove()
    acting, plain = seen
    assert acting.shape == plain.shape
    assert_close(acting, plain + front_change(of(numbers(model), site), plain))
    assert np.abs(acting - plain).max() > 1e-4


PLACEMENTS = {
    "before": SequentialPlacement(at=("attn",)),
    "after": SequentialPlacement(at=("ffn",), residual="after"),
    "beside": ParallelPlacement(at=("ffn",)),
    "normed": ParallelPlacement(at=("attn", "ffn"), input="normed"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_conformer_module_computes_its_formula(
    placement: str, padded: bool, training: bool
) -> None:
    config = ConformerAdapterConfig(size=6, kernel=7, placement=PLACEMENTS[placement])
    module = next(iter(config.build(describe(hf_wav2vec2_stable().double())[0]).values()))
    assert isinstance(module, ConformerAdapter)
    random_like(module)
    module.train(training)
    generator = torch.Generator().manual_seed(2)
    u, x, n = torch.randn(3, 2, 9, WIDTH, generator=generator, dtype=torch.float64)
    read = {"before": u, "after": x + u, "beside": x, "normed": n}[placement].numpy()
    real = torch.arange(9) < torch.tensor([[6], [9]]) if padded else None
    p = {key: value.clone().numpy() for key, value in module.state_dict().items()}
    with torch.no_grad():
        given = module(u, Context(residual=x, input=n, mask=real)).numpy()
    expected = conformer_change(
        p, read, real=None if real is None else real.numpy(), training=training
    )
    assert_close(given, u.numpy() + expected)


def test_frame_norm_is_torchs_batch_norm_where_nothing_is_padding() -> None:
    mine = FrameNorm(6, {"dtype": torch.float64, "device": "cpu"})
    theirs = nn.BatchNorm1d(6, dtype=torch.float64)
    for seed in range(3):
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed)).double()
        expected = theirs(x.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(mine(x, None), expected)
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)
    x = torch.randn(1, 4, 6).double()
    torch.testing.assert_close(
        mine.eval()(x, None), theirs.eval()(x.transpose(1, 2)).transpose(1, 2)
    )


def test_frame_norm_takes_no_notice_of_padding() -> None:
    one, other = (FrameNorm(6, {"dtype": torch.float64, "device": "cpu"}) for _ in range(2))
    x = torch.randn(2, 5, 6).double()
    real = torch.arange(5) < torch.tensor([[3], [5]])
    noisy = torch.where(real[..., None], x, 100 * torch.randn(2, 5, 6).double())
    torch.testing.assert_close(one(x, real)[real], other(noisy, real)[real])
    torch.testing.assert_close(one.running_var, other.running_var)
    torch.testing.assert_close(one.running_mean, 0.1 * x[real].mean(dim=0))


def test_frame_norm_keeps_its_statistics_in_float32_at_least() -> None:
    norm = FrameNorm(6, {"dtype": torch.bfloat16, "device": "cpu"})
    assert {buffer.dtype for buffer in norm.buffers()} == {torch.float32}
    assert norm(torch.randn(2, 5, 6).bfloat16(), None).dtype == torch.bfloat16


def test_one_frame_alone_is_no_reason_to_fail_in_training() -> None:
    norm = FrameNorm(3, {"dtype": torch.float32, "device": "cpu"})
    assert norm(torch.randn(1, 1, 3), None).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in norm.buffers())


def with_attention_adapters() -> nn.Module:
    config = transformers.Wav2Vec2Config(**SMALL, **STABLE, layerdrop=0.0, adapter_attn_dim=8)
    return seeded(lambda: transformers.Wav2Vec2Model(config))


def test_mms_adapter_is_the_one_of_transformers() -> None:
    theirs = with_attention_adapters()
    config = transformers.Wav2Vec2Config(**SMALL, **STABLE, layerdrop=0.0)
    bare = transformers.Wav2Vec2Model(config).eval()
    surplus = bare.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys
    assert len(surplus) == LAYERS * 6
    mine = init(bare)
    mine.add_adapter("a", MMSAdapterConfig(size=8))
    mine.set_active_adapters("a")
    with torch.no_grad():
        before = mine(waves()[0][0])[0]
        for site, module in mine.adapter("a").entries():
            layer = theirs.encoder.layers[int(site.split(".")[2])].adapter_layer
            assert isinstance(layer, Wav2Vec2AttnAdapterLayer)
            named: Any = module
            named.norm_before.load_state_dict(layer.norm.state_dict())
            named.down.load_state_dict(layer.linear_1.state_dict())
            named.up.load_state_dict(layer.linear_2.state_dict())
        expected, given = theirs(waves()[0][0])[0], mine(waves()[0][0])[0]
    assert (given - expected).abs().max() <= 1e-6
    assert (given - before).abs().max() > 1e-3


def test_published_sizes() -> None:
    assert EAdapterConfig().size == 256
    assert MMSAdapterConfig().size == 16
    assert ConformerAdapterConfig().kernel == 31


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConformerAdapterConfig(kernel=4), "kernel must be odd.*not 4; use 5"),
        (lambda: ConformerAdapterConfig(kernel=0), "kernel must be a whole number"),
        (lambda: ConformerAdapterConfig(size=0), "size must be a whole number"),
        (lambda: ConformerAdapterConfig(dropout=1.0), "dropout must be at least 0 and below 1"),
        (lambda: ConformerAdapterConfig(placement="after"), "placement must be Sequential"),  # type: ignore[arg-type]
        (lambda: LAdapterConfig(residual="no"), "residual must be true or false, not 'no'"),  # type: ignore[arg-type]
        (lambda: FrontEndAdapterConfig(size=2.5), "size must be a whole number"),  # type: ignore[arg-type]
        (lambda: FrontEndAdapterConfig(kernel=0), "kernel must be a whole number"),
        (lambda: EAdapterConfig(size=0), "size must be a whole number"),
        (lambda: MMSAdapterConfig(size=8, reduction_factor=2), "not as both"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ConformerAdapterConfig(sites=("audio.front.*",)),
            r"the audio tower of Wav2Vec2Model has no ffn under sites=\('audio.front.\*',\)",
        ),
        (LAdapterConfig(sites=("*.ffn",)), r"name whole blocks, e.g. sites=\('audio.blocks.\*',\)"),
        (
            FrontEndAdapterConfig(sites=("audio.blocks.*",)),
            "no layer of the front end .* it has audio.front.0 to audio.front.6",
        ),
        (FrontEndAdapterConfig(sites=("audio.front.7",)), "did you mean 'audio.front"),
    ],
)
def test_sites_that_a_method_cannot_use_are_refused(config: MethodConfig, message: str) -> None:
    model = init(hf_wav2vec2_stable())
    with pytest.raises(ValueError, match=message) as error:
        model.add_adapter("a", config)
    assert "\n" not in str(error.value)
