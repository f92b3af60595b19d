"""Classifiers on two towers: against their formulas, with padding, in batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families.small import randomise
from families.vision_language import CLIP_FAMILIES, LENGTH, tokens
from torch import Tensor, nn

import mmadapters
from mmadapters import SeqBnConfig
from mmadapters.tasks.vqa.clip import ClipVQA, classifier_loss
from mmadapters.tasks.vqa.config import VQAHeadConfig
from mmadapters.tasks.vqa.heads import (
    Attention,
    AttentionPooling,
    BilinearHead,
    CoAttentionHead,
    FusionHead,
)

E, A, B = 12, 7, 3
ENCODERS = {
    f.name: f
    for f in CLIP_FAMILIES
    if f.name in ("hf-clip", "hf-siglip", "open_clip-clip", "open_clip-custom_text")
}
KINDS = ("fusion", "bilinear", "coattention")


def config(kind: str = "fusion", **options: object) -> VQAHeadConfig:
    given = {"kind": kind, "width": 16, "heads": 2, "layers": 2, **options}
    return VQAHeadConfig.model_validate(given)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5


def test_fusion_is_an_mlp_on_both_their_product_and_their_distance() -> None:
    head = FusionHead(E, A, config()).eval()
    image, text = torch.randn(B, E), torch.randn(B, E)
    v, t = unit(image), unit(text)
    joint = torch.cat([v, t, v * t, (v - t).abs()], dim=1)
    first, second, last = (m for m in head.mlp if isinstance(m, nn.Linear))
    expected = last(F.gelu(second(F.gelu(first(joint)))))
    torch.testing.assert_close(head(image, text), expected)
    torch.testing.assert_close(head(30 * image, 0.01 * text), expected)


def test_bilinear_pooling_is_a_low_rank_bilinear_form() -> None:
    """Without biases, each feature before the root is v' U Vᵀ t of rank `factors`."""
    head = BilinearHead(E, A, config("bilinear", factors=3)).eval()
    nn.init.zeros_(head.image.bias)
    nn.init.zeros_(head.text.bias)
    image, text = torch.randn(B, E), torch.randn(B, E)
    u = head.image.weight.unflatten(0, (16, 3))  # (W, factors, E)
    v = head.text.weight.unflatten(0, (16, 3))
    form = torch.einsum("wfi,wfj->wij", u, v)
    assert torch.linalg.matrix_rank(form).unique().tolist() == [3]
    z = torch.einsum("bi,wij,bj->bw", unit(image), form, unit(text))
    expected = head.classifier(unit(z.sign() * z.abs().sqrt()))
    torch.testing.assert_close(head(image, text), expected, atol=1e-2, rtol=1e-2)


def test_bilinear_pooling_learns_from_a_product_of_zero() -> None:
    head = BilinearHead(E, A, config("bilinear"))
    nn.init.zeros_(head.image.weight)
    nn.init.zeros_(head.image.bias)
    head(torch.randn(B, E), torch.randn(B, E)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_attention_is_that_of_torch() -> None:
    ours, theirs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    queries, states = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    expected = theirs(queries, states, states, key_padding_mask=~mask)[0]
    torch.testing.assert_close(ours(queries, states, mask), expected)


def test_pooling_is_a_mean_with_weights_of_what_is_no_padding() -> None:
    pooling = AttentionPooling(16)
    states = torch.randn(1, 4, 16)
    mask = torch.tensor([[True, True, True, False]])
    weights = pooling.scores(states[:, :3]).softmax(dim=1)
    expected = (weights * states[:, :3]).sum(dim=1)
    torch.testing.assert_close(pooling(states, mask), expected)


@torch.no_grad()
def test_coattention_reads_no_padding() -> None:
    head = CoAttentionHead(10, 8, A, config("coattention")).eval()
    randomise(head)
    images, texts = torch.randn(2, 5, 10), torch.randn(2, 6, 8)
    mask = torch.tensor([[True] * 3 + [False] * 3, [True] * 6])
    numbers = torch.tensor([0, 1])
    both = head(images, texts, mask, image_of=numbers, text_of=numbers)
    noise = torch.where(mask[..., None], texts, 100 * torch.randn_like(texts))
    torch.testing.assert_close(head(images, noise, mask, image_of=numbers, text_of=numbers), both)
    alone = head(images[:1], texts[:1, :3], mask[:1, :3], image_of=numbers[:1], text_of=numbers[:1])
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)
    longer = torch.ones_like(mask)
    other = head(images, texts, longer, image_of=numbers, text_of=numbers)
    assert (other[0] - both[0]).abs().max() > 1e-2


def clip_vqa(name: str, kind: str, *, binary: bool = False) -> ClipVQA:
    encoder = mmadapters.init(ENCODERS[name].build())
    encoder.add_adapter("a", SeqBnConfig(size=4))
    randomise(encoder.adapter("a"))
    encoder.train_adapter("a")
    torch.manual_seed(1)
    return ClipVQA(encoder, config(kind), answers=A, binary=binary)


def batch() -> dict[str, Tensor]:
    """Five questions about three images in two texts."""
    return {
        "pixels": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)),
        "tokens": tokens(),
        "image_of": torch.tensor([0, 0, 1, 2, 2]),
        "text_of": torch.tensor([0, 1, 1, 0, 1]),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_questions_that_share_images_and_texts_are_answered_as_alone(name: str, kind: str) -> None:
    model, given = clip_vqa(name, kind).eval(), batch()
    zero = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        together = model(**given)["logits"]
        assert together.shape == (5, A)
        for row, (image, text) in enumerate(zip(given["image_of"], given["text_of"], strict=True)):
            alone = model(given["pixels"][image][None], given["tokens"][text][None], zero, zero)[
                "logits"
            ]
            torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)
    assert (together[0] - together[3]).abs().max() > 1e-3
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["hf-clip", "hf-siglip", "open_clip-clip"])
def test_gradients_reach_the_head_and_the_adapters_of_both_towers(name: str, kind: str) -> None:
    model = clip_vqa(name, kind)
    targets = F.one_hot(torch.tensor([0, 1, 2, 3, 4]), A).float()
    model(**batch(), targets=targets)["loss"].backward()
    towers = set()
    for site, module in model.encoder.adapter("a").entries():
        for parameter in module.parameters():
            assert parameter.grad is not None, site
            assert parameter.grad.abs().sum() > 0, site
        towers.add(site.partition(".")[0])
    assert towers == {"vision", "text"}
    for parameter_name, parameter in model.head.named_parameters():
        assert parameter.grad is not None, parameter_name
        # What is added to all scores of a softmax changes nothing: rounding alone is left of it.
        shared = parameter_name.endswith("scores.2.bias")
        assert shared or parameter.grad.abs().sum() > 0, parameter_name
    assert all(p.grad is None for p in model.encoder.backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_padded_text_of_transformers_clip_is_answered_as_the_text_alone(kind: str) -> None:
    """Its text tower is causal: what follows the end token changes nothing before it."""
    model, given = clip_vqa("hf-clip", kind).eval(), batch()
    short = given["tokens"].clone()
    short[:, 4] = short.max()
    cut = short[:, :5]
    short[:, 5:] = 0
    with torch.no_grad():
        padded = model(**{**given, "tokens": short})["logits"]
        alone = model(**{**given, "tokens": cut})["logits"]
    assert cut.shape[1] < LENGTH
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_cross_entropy_is_that_of_torch_for_one_right_answer() -> None:
    logits, labels = torch.randn(5, A), torch.tensor([0, 3, 2, 6, 1])
    targets = F.one_hot(labels, A).float()
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(classifier_loss(logits, targets, binary=False), expected)
    # Targets count by their shares.
    torch.testing.assert_close(classifier_loss(logits, 0.3 * targets, binary=False), expected)


def test_a_question_without_a_known_answer_teaches_the_softmax_nothing() -> None:
    logits = torch.randn(4, A, requires_grad=True)
    targets = F.one_hot(torch.tensor([0, 3, 2, 6]), A).float()
    targets[1] = 0
    loss = classifier_loss(logits, targets, binary=False)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0
    halves = [
        classifier_loss(logits[rows], targets[rows], binary=False) for rows in ([0, 1], [2, 3])
    ]
    torch.testing.assert_close(sum(halves) / 2, loss)


def test_binary_cross_entropy_is_a_sum_over_answers() -> None:
    logits, targets = torch.randn(4, A), torch.rand(4, A)
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(dim=1).mean()
    torch.testing.assert_close(classifier_loss(logits, targets, binary=True), expected)


def test_probabilities_are_of_the_loss() -> None:
    logits = torch.randn(2, A)
    assert clip_vqa("hf-clip", "fusion").probabilities(logits).sum(dim=1).tolist() == pytest.approx(
        [1.0, 1.0]
    )
    binary = clip_vqa("hf-clip", "fusion", binary=True)
    assert torch.equal(binary.probabilities(logits), logits.sigmoid())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide a width of 16"):
        config("coattention", heads=5)
