"""Bottleneck adapters: every option against the formula in NumPy, alone and in a whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from methods.reference import (
    ACTIVATIONS,
    Array,
    ReferenceViT,
    adapted,
    assert_acts,
    assert_close,
    layer_norm,
    numbers,
    output,
    randomise,
    tiny_vit,
)
from torch.func import functional_call

from mmadapters import (
    AdapterPlusConfig,
    AdaptFormerConfig,
    BottleneckConfig,
    DoubleSeqBnConfig,
    ParallelPlacement,
    ParBnConfig,
    SeqBnConfig,
    SequentialPlacement,
    Stack,
    init,
)
from mmadapters.methods import Branch
from mmadapters.methods.bottleneck import ACTIVATIONS as KNOWN_ACTIVATIONS
from mmadapters.sites.acting import Context
from mmadapters.sites.tables import describe

SITE = "vision.blocks.0.ffn"
PLACEMENTS = {
    "sequential-before": SequentialPlacement(residual="before"),
    "sequential-after": SequentialPlacement(residual="after"),
    "parallel-residual": ParallelPlacement(at=("attn", "ffn"), input="residual"),
    "parallel-normed": ParallelPlacement(at=("attn", "ffn"), input="normed"),
}
SCALES: dict[str, dict[str, Any]] = {
    "fixed": {"scale": 0.7},
    "scalar": {"scale": 0.7, "learn_scale": "scalar"},
    "channel": {"scale": 0.7, "learn_scale": "channel"},
}


def reference(
    config: BottleneckConfig, p: dict[str, Array], site: str, u: Array, x: Array, n: Array
) -> Array:
    """The formula at the head of mmadapters/methods/bottleneck.py, without its random parts."""
    placement = config.placement
    if isinstance(placement, SequentialPlacement):
        h = u if placement.residual == "before" else x + u
    else:
        h = x if placement.input == "residual" else n
    p = {key.split("/")[1]: value for key, value in p.items() if key.startswith(f"{site}/")}
    if config.norm == "before":
        h = layer_norm(h, p["norm_before.weight"], p["norm_before.bias"])
    h = ACTIVATIONS[config.activation](h @ p["down.weight"].T + p["down.bias"])
    h = h @ p["up.weight"].T + p["up.bias"]
    if config.norm == "after":
        h = layer_norm(h, p["norm_after.weight"], p["norm_after.bias"])
    return u + h * p.get("scale", np.float64(config.scale))


class WithBottlenecks(ReferenceViT):
    def __init__(self, model: Any, config: BottleneckConfig, name: str = "a") -> None:
        super().__init__(model.backbone, numbers(model, name))
        self.config = config

    def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
        if site.rsplit(".", 1)[1] not in self.config.placement.at:
            return u
        return reference(self.config, self.p, site, u, x, n)


def built(config: BottleneckConfig, site: str = SITE) -> Branch:
    module = config.build(describe(tiny_vit())[0])[site]
    assert isinstance(module, Branch)
    randomise(module)
    return module


def triple(batch: int = 3) -> dict[str, torch.Tensor]:
    """A branch, a residual stream and an input that differ from one another."""
    names = ("branch", "residual", "input")
    return {name: torch.randn(batch, 5, 32, dtype=torch.float64) for name in names}


def called(module: Branch, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return module(given["branch"], Context(given["residual"], given["input"]))


@pytest.mark.parametrize("norm", [None, "before", "after"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_module_computes_its_formula(placement: str, scale: str, norm: Any) -> None:
    config = BottleneckConfig(
        placement=PLACEMENTS[placement], size=6, norm=norm, activation="gelu", **SCALES[scale]
    )
    module, given = built(config), triple()
    p = {f"{SITE}/{key}": value.numpy() for key, value in module.state_dict().items()}
    u, x, n = (tensor.numpy() for tensor in given.values())
    with torch.no_grad():
        assert_close(called(module, given).numpy(), reference(config, p, SITE, u, x, n), 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("part", ["down", "up"])
@pytest.mark.parametrize("hook", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_on_a_projection_are_called_and_change_no_bit(
    hook: str, part: str, autocast: bool
) -> None:
    module = built(BottleneckConfig(placement=PLACEMENTS["sequential-after"], size=6, scale=0.7))
    module, seen = module.float(), []
    given = {name: value.float().requires_grad_() for name, value in triple().items()}

    def results() -> list[torch.Tensor]:
        with torch.autocast("cpu", enabled=autocast):
            out = called(module, given)
        wanted = [given["branch"], given["residual"], *module.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    plain = results()
    register = getattr(getattr(module, part), f"register_{hook}_hook")
    register(lambda *_: seen.append(hook))
    hooked = results()
    assert seen == [hook]
    assert plain[0].dtype == torch.float32
    assert all(map(torch.equal, plain, hooked))


@pytest.mark.parametrize("name", KNOWN_ACTIVATIONS)
def test_each_activation_is_the_one_of_that_name(name: str) -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    assert_close(KNOWN_ACTIVATIONS[name](x).numpy(), ACTIVATIONS[name](x.numpy()), 1e-14)


def test_activations_are_all_different() -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    results = [activation(x) for activation in KNOWN_ACTIVATIONS.values()]
    assert not any(
        torch.allclose(one, other) for i, one in enumerate(results) for other in results[:i]
    )


@pytest.mark.parametrize(
    "options",
    [
        *({"placement": placement} for placement in PLACEMENTS.values()),
        {"placement": SequentialPlacement(at=("attn",))},
        {"placement": SequentialPlacement(at=("ffn",), residual="after")},
        {"placement": ParallelPlacement(at=("attn",), input="normed")},
        {"norm": "before"},
        {"norm": "after"},
        {"activation": "quick_gelu"},
        *SCALES.values(),
    ],
    ids=str,
)
def test_adapted_model_is_the_written_out_one(options: dict[str, Any]) -> None:
    config = BottleneckConfig(size=6, **options)
    model = adapted(config)
    assert_close(output(model), WithBottlenecks(model, config)())
    assert_acts(model)


@pytest.mark.parametrize(
    "config",
    [
        DoubleSeqBnConfig(reduction_factor=8),
        SeqBnConfig(reduction_factor=8),
        ParBnConfig(),
        AdaptFormerConfig(),
        AdapterPlusConfig(),
    ],
    ids=lambda config: config.method,
)
def test_presets_are_the_formula_with_their_own_values(config: BottleneckConfig) -> None:
    model = adapted(config)
    assert_close(output(model), WithBottlenecks(model, config)())
    assert_acts(model)


def test_presets_have_the_values_of_their_papers() -> None:
    def told(config: BottleneckConfig) -> tuple:
        return config.placement, config.size, config.reduction_factor, config.activation

    after_ffn = SequentialPlacement(at=("ffn",), residual="after")
    assert told(DoubleSeqBnConfig()) == (SequentialPlacement(), None, 16, "gelu")
    assert told(SeqBnConfig()) == (after_ffn, None, 16, "relu")
    assert told(ParBnConfig()) == (ParallelPlacement(), None, 2, "relu")
    assert told(AdaptFormerConfig()) == (ParallelPlacement(), 64, None, "relu")
    assert told(AdapterPlusConfig()) == (after_ffn, 8, None, "gelu")
    assert (ParBnConfig().scale, AdaptFormerConfig().scale) == (4.0, 0.1)
    assert (AdapterPlusConfig().learn_scale, AdapterPlusConfig().drop_path) == ("channel", 0.1)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ParBnConfig(size=12), 12),
        (AdaptFormerConfig(reduction_factor=8), 4),
        (AdapterPlusConfig(reduction_factor=16), 2),
        (SeqBnConfig(size=5), 5),
        (BottleneckConfig(reduction_factor=3), 10),
        (BottleneckConfig(reduction_factor=0.5), 64),
        (BottleneckConfig(reduction_factor=32), 1),
        (BottleneckConfig(), 2),
    ],
    ids=str,
)
def test_bottleneck_of_any_preset_is_given_as_size_or_factor(
    config: BottleneckConfig, size: int
) -> None:
    module = config.build(describe(tiny_vit())[0])[SITE]
    assert module.down.weight.shape == (size, 32)
    assert module.up.weight.shape == (32, size)


def test_fresh_module_starts_with_zero_up_and_non_zero_down() -> None:
    module = DoubleSeqBnConfig().build(describe(tiny_vit())[0])[SITE]
    assert not module.up.weight.any()
    assert not module.up.bias.any()
    assert module.down.weight.ne(0).all()
    assert module.down.weight.abs().max() <= 32**-0.5


def test_modules_of_two_sites_share_nothing() -> None:
    model = adapted(DoubleSeqBnConfig())
    pointers = [parameter.data_ptr() for parameter in model.adapter("a").parameters()]
    assert len(set(pointers)) == len(pointers) == 4 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"placement": PLACEMENTS["sequential-after"], "norm": "before", "learn_scale": "channel"},
        {"placement": PLACEMENTS["parallel-normed"], "norm": "after", "learn_scale": "scalar"},
    ],
    ids=["after", "parallel"],
)
def test_gradients_of_every_input_and_parameter_are_right(options: dict[str, Any]) -> None:
    module = built(BottleneckConfig(size=3, activation="tanh", **options))
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    given = [torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        branch, residual, read, *parameters = tensors
        named = dict(zip(names, parameters, strict=True))
        return functional_call(module, named, (branch, Context(residual, read)))

    assert torch.autograd.gradcheck(call, (*given, *values), fast_mode=True)


def test_dropout_acts_in_train_mode_only_and_keeps_the_mean() -> None:
    module = built(BottleneckConfig(size=6, activation="identity", dropout=0.4))
    given = {name: tensor.expand(20_000, -1, -1) for name, tensor in triple(batch=1).items()}
    with torch.no_grad():
        expected = called(module.eval(), given)
        assert torch.equal(expected, expected[:1].expand_as(expected))
        random = called(module.train(), given)
    spread = random.std(dim=0)
    assert spread.min() > 0
    assert ((random.mean(dim=0) - expected[0]).abs() < 5 * spread / 20_000**0.5).all()


def test_stochastic_depth_drops_whole_samples_and_rescales_the_others() -> None:
    module, given = built(BottleneckConfig(size=6, drop_path=0.25)), triple(batch=4000)
    with torch.no_grad():
        change = called(module.eval(), given) - given["branch"]
        random = called(module.train(), given) - given["branch"]
    kept = random.flatten(1).ne(0).any(dim=1)
    assert torch.allclose(random[kept], change[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert not kept.all()


def test_stack_acts_in_its_order() -> None:
    first, second = DoubleSeqBnConfig(size=4), SeqBnConfig(size=6)
    model = adapted(first, second)

    class Both(WithBottlenecks):
        order = ("a", "b")

        def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
            for name in self.order:
                config = {"a": first, "b": second}[name]
                if site.rsplit(".", 1)[1] in config.placement.at:
                    u = reference(config, numbers(model, name), site, u, x, n)
            return u

    class Reversed(Both):
        order = ("b", "a")

    forth = output(model)
    assert_close(forth, Both(model, first)())
    model.set_active_adapters(Stack("b", "a"))
    back = output(model)
    assert_close(back, Reversed(model, first)())
    assert np.abs(forth - back).max() > 1e-3


@pytest.mark.parametrize("other", PLACEMENTS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_adapter_acts_alike_beside_one_that_is_held_and_idle(placement: str, other: str) -> None:
    model = adapted(
        BottleneckConfig(placement=PLACEMENTS[placement], size=4),
        BottleneckConfig(placement=PLACEMENTS[other], size=4),
    )
    model.set_active_adapters("a")
    beside = output(model)
    model.delete_adapter("b")
    assert np.array_equal(output(model), beside)


def test_two_adapters_that_read_different_things_each_read_their_own() -> None:
    configs = [
        BottleneckConfig(placement=PLACEMENTS[key], size=4)
        for key in ("sequential-before", "parallel-residual", "parallel-normed")
    ]
    model = adapted(*configs)

    class All(ReferenceViT):
        def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
            for name, config in zip("abc", configs, strict=True):
                u = reference(config, numbers(model, name), site, u, x, n)
            return u

    assert_close(output(model), All(model.backbone)())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8, "reduction_factor": 4}, "size=8 or as reduction_factor=4"),
        ({"size": 0}, "size must be"),
        ({"size": 2.5}, "size must be"),
        ({"size": "8"}, "size must be"),
        ({"size": True}, "size must be"),
        ({"reduction_factor": 0}, "reduction_factor must be"),
        ({"reduction_factor": -2}, "reduction_factor must be"),
        ({"reduction_factor": float("nan")}, "reduction_factor must be"),
        ({"reduction_factor": "16"}, "reduction_factor must be"),
        ({"activation": "rellu"}, "activation must be one of 'relu', .* not 'rellu'"),
        ({"norm": "both"}, "norm must be one of 'before', 'after', None, not 'both'"),
        ({"learn_scale": "token"}, "learn_scale must be one of"),
        ({"scale": 0.0}, "scale must"),
        ({"scale": 0.0, "learn_scale": "scalar"}, "scale must"),
        ({"scale": float("inf")}, "scale must"),
        ({"scale": "4"}, "scale must"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": "0.1"}, "dropout must be"),
        ({"drop_path": 1.5}, "drop_path must be"),
        ({"drop_path": float("nan")}, "drop_path must be"),
        ({"placement": "sequential"}, "placement must be SequentialPlacement or ParallelPlacement"),
        (
            {"placement": SequentialPlacement},
            "placement must be SequentialPlacement or ParallelPlacement",
        ),
        ({"sites": "vision"}, r"sites=\('vision',\)"),
        ({"sites": ()}, "sites is empty"),
        ({"sites": (3,)}, "sites must be"),
    ],
    ids=str,
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BottleneckConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("placement", "options", "message"),
    [
        (SequentialPlacement, {"at": "ffn"}, r"at=\('ffn',\)"),
        (SequentialPlacement, {"at": ()}, "at is empty: name at least one of attn, cross, ffn"),
        (
            SequentialPlacement,
            {"at": ("mlp",)},
            "at must be one of 'attn', 'cross', 'ffn', not 'mlp'",
        ),
        (SequentialPlacement, {"residual": "around"}, "residual must be one of 'before', 'after'"),
        (ParallelPlacement, {"at": "attn"}, r"at=\('attn',\)"),
        (ParallelPlacement, {"at": ("attn", "q")}, "at must be one of .* not 'q'"),
        (
            ParallelPlacement,
            {"input": "raw"},
            "input must be one of 'residual', 'normed', not 'raw'",
        ),
    ],
    ids=str,
)
def test_placement_refuses(placement: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placement(**options)


def test_lists_of_names_are_taken_as_tuples() -> None:
    config = BottleneckConfig(sites=["vision"], placement=SequentialPlacement(at=["ffn"]))  # type: ignore[arg-type]
    assert config == BottleneckConfig(sites=("vision",), placement=SequentialPlacement(at=("ffn",)))
    assert hash(config) == hash(
        BottleneckConfig(sites=("vision",), placement=SequentialPlacement(at=("ffn",)))
    )


def test_factor_above_the_width_is_refused_where_the_width_is_known() -> None:
    model = init(tiny_vit())
    with pytest.raises(ValueError, match=r"reduction_factor 33 .* width 32 of vision"):
        model.add_adapter("a", BottleneckConfig(reduction_factor=33))
    assert model.adapter_names == ()


def test_sublayer_that_the_encoder_lacks_is_refused() -> None:
    model = init(tiny_vit())
    with pytest.raises(ValueError, match=r"VisionTransformer has no cross .* it has attn, ffn"):
        model.add_adapter("a", BottleneckConfig(placement=SequentialPlacement(at=("cross",))))


def test_sites_bound_where_the_adapter_stands() -> None:
    model = init(tiny_vit())
    model.add_adapter("last", DoubleSeqBnConfig(sites=("vision.blocks.1",)))
    model.add_adapter("attention", DoubleSeqBnConfig(sites=("*.attn",)))
    assert [site for site, _ in model.adapter("last").entries()] == [
        "vision.blocks.1.attn",
        "vision.blocks.1.ffn",
    ]
    assert [site for site, _ in model.adapter("attention").entries()] == [
        "vision.blocks.0.attn",
        "vision.blocks.1.attn",
    ]
