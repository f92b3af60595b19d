"""The contrastive losses and their gradients, against formulas written out and against torch."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from families import contrastive as processes
from families.small import randomise
from families.vision_language import CLIP_FAMILIES
from forked import fork_server
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapters import SeqBnConfig, init
from mmadapters.tasks.retrieval.config import RetrievalHeadConfig
from mmadapters.tasks.retrieval.head import MAX_LOGIT_SCALE, RetrievalHead
from mmadapters.tasks.retrieval.loss import contrastive_loss, hard_negatives, in_chunks, matches

B, E = 6, 5
APART = torch.arange(B)


def unit(rows: int = B, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, E, generator=generator, dtype=torch.float64), dim=1)


SCALE = torch.tensor(7.0, dtype=torch.float64)


def by_hand(
    images: Tensor, texts: Tensor, image_ids: list[int], text_ids: list[int], same_image: str
) -> float:
    """Symmetric InfoNCE, one exponential after the other."""
    logits = 7.0 * (images @ texts.T).numpy()
    total = 0.0
    for matrix in (logits, logits.T):
        for i in range(len(matrix)):
            alike = [
                j
                for j in range(len(matrix))
                if image_ids[i] == image_ids[j] or text_ids[i] == text_ids[j]
            ]
            right = alike if same_image == "positive" else [i]
            seen = [j for j in range(len(matrix)) if j in right or j not in alike]
            below = math.log(sum(math.exp(matrix[i, j]) for j in seen))
            total += np.mean([below - matrix[i, j] for j in right])
    return total / (2 * len(logits))


IDS = [0, 1, 0, 2, 3, 4], [10, 11, 12, 13, 11, 14]  # one image twice, one text twice


@pytest.mark.parametrize("same_image", ["positive", "masked"])
def test_captions_of_one_image_are_no_negatives(same_image: str) -> None:
    images, texts = unit(seed=1), unit(seed=2)
    ids = [torch.tensor(numbers) for numbers in IDS]
    found = contrastive_loss(images, texts, *ids, scale=SCALE, same_image=same_image)
    assert found.item() == pytest.approx(by_hand(images, texts, *IDS, same_image), rel=1e-12)
    plain = contrastive_loss(images, texts, APART, APART, scale=SCALE)
    assert abs(found.item() - plain.item()) > 1e-2


def test_masked_pairs_get_no_gradient_from_each_other() -> None:
    """Two pairs of one image alone in a batch: nothing is left to push apart."""
    images, texts = unit(2, seed=1).requires_grad_(), unit(2, seed=2).requires_grad_()
    same = torch.zeros(2, dtype=torch.int64)
    contrastive_loss(
        images, texts, same, torch.arange(2), scale=SCALE, same_image="masked"
    ).backward()
    assert images.grad is not None
    assert images.grad.abs().max() == 0


def test_distinct_pairs_give_open_clips_loss() -> None:
    images, texts = unit(seed=1), unit(seed=2)
    found = contrastive_loss(images, texts, APART, APART, scale=SCALE)
    torch.testing.assert_close(found, ClipLoss()(images, texts, SCALE))


def test_sigmoid_loss_is_open_clips() -> None:
    images, texts = unit(seed=1), unit(seed=2)
    bias = torch.tensor(-3.0, dtype=torch.float64)
    found = contrastive_loss(images, texts, APART, APART, scale=SCALE, bias=bias)
    torch.testing.assert_close(found, SigLipLoss()(images, texts, SCALE, bias))


@pytest.mark.parametrize("same_image", ["positive", "masked"])
def test_sigmoid_loss_decides_about_each_pair(same_image: str) -> None:
    images, texts = unit(seed=1), unit(seed=2)
    ids = [torch.tensor(numbers) for numbers in IDS]
    bias = torch.tensor(-3.0, dtype=torch.float64)
    found = contrastive_loss(images, texts, *ids, scale=SCALE, bias=bias, same_image=same_image)
    logits, total = (7 * images @ texts.T - 3).numpy(), 0.0
    for i in range(B):
        for j in range(B):
            alike = IDS[0][i] == IDS[0][j] or IDS[1][i] == IDS[1][j]
            if alike and i != j and same_image == "masked":
                continue
            total += math.log1p(math.exp(-logits[i, j] if alike else logits[i, j]))
    assert found.item() == pytest.approx(total / B, rel=1e-12)


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("same_image", ["positive", "masked"])
def test_gradients_are_those_of_finite_differences(bias: float | None, same_image: str) -> None:
    ids = [torch.tensor(numbers) for numbers in IDS]

    def loss(images: Tensor, texts: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        kwargs = {"scale": scale, "bias": None if bias is None else shift}
        return contrastive_loss(
            F.normalize(images, dim=1),
            F.normalize(texts, dim=1),
            *ids,
            same_image=same_image,
            **kwargs,
        )

    given = [unit(seed=1), unit(seed=2), SCALE.clone(), torch.tensor(-3.0, dtype=torch.float64)]
    for tensor in given:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(loss, given)


def head(**config: object) -> RetrievalHead:
    return RetrievalHead(E, RetrievalHeadConfig(**config), logit_scale=torch.tensor(2.5))


@pytest.mark.parametrize("projection", ["none", "linear", "bottleneck"])
def test_a_fresh_head_gives_the_encoders_embeddings(projection: str) -> None:
    features = 3 * torch.randn(4, E)
    fresh = head(projection=projection)
    for given in (fresh.images(features), fresh.texts(features)):
        torch.testing.assert_close(given, F.normalize(features, dim=1))


@pytest.mark.parametrize("projection", ["linear", "bottleneck"])
def test_a_projection_is_trained_from_its_first_step(projection: str) -> None:
    fresh = head(projection=projection)
    features = torch.randn(4, E)
    images, texts = fresh.images(features), fresh.texts(features.flip(1))
    contrastive_loss(images, texts, torch.arange(4), torch.arange(4), scale=fresh.scale).backward()
    for part in (fresh.image, fresh.text):
        assert part.up.weight.grad.abs().max() > 0


def test_clip_adapters_bottleneck_has_its_size() -> None:
    residual = RetrievalHead(
        64, RetrievalHeadConfig(projection="bottleneck"), logit_scale=torch.tensor(1.0)
    ).image
    assert residual.down.weight.shape == (16, 64)
    assert residual.up.weight.shape == (64, 16)
    u = F.normalize(torch.randn(3, 64), dim=1)
    nn.init.normal_(residual.up.weight)
    expected = u + torch.relu(u @ residual.down.weight.T) @ residual.up.weight.T
    torch.testing.assert_close(residual(u), expected)


def test_the_temperature_is_a_copy_and_stays_below_100() -> None:
    own = nn.Parameter(torch.tensor([5.0]))
    copied = RetrievalHead(E, RetrievalHeadConfig(), logit_scale=own)
    assert copied.scale.item() == pytest.approx(100)
    with torch.no_grad():
        copied.logit_scale.fill_(9)
    assert copied.scale.item() == pytest.approx(100)
    copied.scale.backward()
    assert copied.logit_scale.grad.item() == pytest.approx(100)  # and can come down again
    assert copied.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    assert own.item() == 5
    fixed = RetrievalHead(E, RetrievalHeadConfig(learn_temperature=False), logit_scale=own)
    assert not fixed.logit_scale.requires_grad


class Noisy(nn.Module):
    """Towers with dropout, in fp64, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, E))
            for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0
        self.double()

    def encode(self, tower: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        return F.normalize(tower(x), dim=1)

    def loss(self, images: Tensor, texts: Tensor, size: int | None) -> Tensor:
        return contrastive_loss(
            in_chunks(lambda x: self.encode(self.image, x), images, size),
            in_chunks(lambda x: self.encode(self.text, x), texts, size),
            torch.arange(len(images)),
            torch.arange(len(images)),
            scale=self.logit_scale.exp(),
        )

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.named_parameters()}


def test_chunks_give_the_gradient_of_the_whole_batch() -> None:
    model = Noisy().eval()
    images, texts = torch.randn(2, 10, 7, dtype=torch.float64)
    model.loss(images, texts, None).backward()
    whole = model.gradients()
    for size in (1, 3, 5, 10):
        model.zero_grad()
        model.loss(images, texts, size).backward()
        for name, gradient in model.gradients().items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-12, atol=1e-14)


def test_the_temperatures_gradient_is_not_multiplied_by_the_chunks() -> None:
    """open_clip's accum-freq computes the loss once for each part and so adds it up K times."""
    model = Noisy().eval()
    images, texts = torch.randn(2, 12, 7, dtype=torch.float64)
    found = []
    for size in (None, 3):
        model.zero_grad()
        model.loss(images, texts, size).backward()
        found.append(model.logit_scale.grad.item())
    assert found[0] != 0
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_chunks_replay_the_dropout_of_their_first_pass() -> None:
    model = Noisy().train()
    images, texts = torch.randn(2, 10, 7, dtype=torch.float64)

    def kept(size: int) -> Tensor:
        """The same chunks with their graphs kept."""
        parts = [
            torch.cat([model.encode(tower, part) for part in inputs.split(size)])
            for tower, inputs in ((model.image, images), (model.text, texts))
        ]
        numbers = torch.arange(len(images))
        return contrastive_loss(*parts, numbers, numbers, scale=model.logit_scale.exp())

    torch.manual_seed(5)
    expected = kept(4)
    expected.backward()
    gradients = model.gradients()
    model.zero_grad()
    torch.manual_seed(5)
    found = model.loss(images, texts, 4)
    assert found.item() == expected.item()
    torch.rand(100)  # what is drawn in between must not matter
    found.backward()
    for name, gradient in model.gradients().items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-12, atol=1e-14)


def test_chunks_keep_no_graph_of_their_own() -> None:
    model = Noisy()
    images, texts = torch.randn(2, 10, 7, dtype=torch.float64)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    ):
        model.loss(images, texts, 5)
    assert (5, 16) not in kept  # the hidden states
    loss = model.loss(images, texts, 5)
    before = model.calls
    loss.backward()
    assert model.calls == before + 4  # each chunk once more
    with torch.no_grad():
        model.loss(images, texts, 5)
    assert model.calls == before + 6  # in one piece where there is no graph


@pytest.mark.parametrize("name", ["open_clip-clip", "hf-siglip", "open_clip-timm_tower"])
def test_adapters_of_a_real_encoder_get_the_whole_batchs_gradient(name: str) -> None:
    from mmadapters.tasks.encoders.clip import ClipTowers

    family = next(f for f in CLIP_FAMILIES if f.name == name)
    model = init(family.build().double())
    model.add_adapter("a", SeqBnConfig(size=4, dropout=0.0))
    randomise(model.adapter("a"))
    model.train_adapter("a")
    towers = ClipTowers(model)
    args, kwargs = family.inputs()
    pixels = args[0] if args else kwargs["pixel_values"]
    tokens = args[1] if args else kwargs["input_ids"]
    pixels = torch.cat([pixels, pixels.flip(3), pixels.flip(2)]).double()
    tokens = torch.cat([tokens, tokens.roll(1, 0) // 2 + 3, tokens])
    tokens[:, -1] = 63
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def gradients(size: int | None) -> list[Tensor]:
        model.zero_grad()
        scale.grad = None
        contrastive_loss(
            in_chunks(lambda x: F.normalize(towers.images(x), dim=1), pixels, size),
            in_chunks(lambda x: F.normalize(towers.texts(x), dim=1), tokens, size),
            torch.arange(6),
            torch.arange(6),
            scale=scale.exp(),
        ).backward()
        own = [p.grad.clone() for p in model.adapter("a").parameters()]
        return [*own, scale.grad.clone()]

    for whole, chunked in zip(gradients(None), gradients(2), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-9, atol=1e-12)


def test_two_processes_give_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    expected_loss, expected = processes.alone()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    fork_server()
    mp.start_processes(
        processes.worker, args=(address, str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["loss"].item() == pytest.approx(expected_loss.item(), rel=1e-12)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_matches_are_of_image_or_text() -> None:
    found = matches(*(torch.tensor(numbers) for numbers in IDS))
    expected = torch.eye(B, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 4] = expected[4, 1] = True
    assert torch.equal(found, expected)


def test_hard_negatives_follow_the_softmax_and_never_match() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, generator=generator) * 2
    matching = torch.eye(4, dtype=torch.bool)
    matching[0, 1] = matching[1, 0] = True
    counts = torch.zeros(4, 4)
    draws = 4000
    for _ in range(draws):
        columns, there = hard_negatives(logits, matching)
        counts[torch.arange(4), columns] += 1
    assert there.all()
    assert counts[matching].sum() == 0
    expected = logits.masked_fill(matching, -torch.inf).softmax(dim=1)
    torch.testing.assert_close(counts / draws, expected, atol=0.03, rtol=0)


def test_a_row_without_a_negative_is_said_so() -> None:
    matching = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    columns, there = hard_negatives(torch.zeros(3, 3), matching)
    assert there.tolist() == [False, True, True]
    assert columns[1:].tolist() == [2, 1]
