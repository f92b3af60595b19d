"""CTC on every speech encoder: transcripts, loss, gradients, and long audio in pieces."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from families import Family
from torch import Tensor, nn

import mmadapters
from mmadapters.tasks.asr.config import ChunkConfig
from mmadapters.tasks.asr.model import CTCModel, hop_and_field
from mmadapters.tasks.jobs.model import add_adapters

from .conftest import LETTERS, SPEECH, config, every_encoder, task_and_model

LENGTHS = (3300, 800, 2411, 3300, 1700)


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Noise, and what must not count behind it."""
    waves = torch.full((len(lengths), max(lengths)), 7.0)
    for row, length in enumerate(lengths):
        waves[row, :length] = torch.randn(length)
    return waves, torch.tensor(lengths)


@every_encoder
@pytest.mark.parametrize("decoding", [{}, {"method": "beam", "beams": 4}])
def test_transcripts_of_a_batch_are_those_of_each_utterance_alone(
    family: Family, decoding: dict
) -> None:
    task, model = task_and_model(family, decoding=decoding)
    waves, lengths = batch()
    with torch.no_grad():
        together = [text for text, _ in task.transcribe(model, waves, lengths)]
        alone = [
            task.transcribe(model, waves[i : i + 1, :n], lengths[i : i + 1])[0][0]
            for i, n in enumerate(LENGTHS)
        ]
    assert together == alone
    assert len(set(together)) > 2


def by_all_paths(log_probs: Tensor, label: list[int]) -> float:
    """−ln of the sum over all paths that collapse to the label."""
    frames, classes = log_probs.shape
    scores = [
        sum(float(log_probs[t, c]) for t, c in enumerate(path))
        for path in itertools.product(range(classes), repeat=frames)
        if [c for c, _ in itertools.groupby(path) if c != LETTERS.blank] == label
    ]
    return -float(torch.logsumexp(torch.tensor(scores), 0))


def test_the_loss_is_the_sum_over_all_paths_per_character() -> None:
    _, model = task_and_model(SPEECH["hf-wav2vec2-stable"])
    model.head[-1].weight.data.mul_(0.1)
    model.head[-1].bias.data.zero_()
    waves, lengths = batch((400 + 320 * 4, 400 + 320 * 2))
    labels = [[3, 3], [4, 2]]
    with torch.no_grad():
        log_probs, counts = model.log_probs(waves, lengths)
        found = model(waves, lengths, torch.tensor(labels), torch.tensor([2, 2]))["loss"]
    assert counts.tolist() == [5, 3]
    expected = [by_all_paths(log_probs[i, :n], labels[i]) / 2 for i, n in enumerate((5, 3))]
    assert found.item() == pytest.approx(sum(expected) / 2, rel=1e-4)


@every_encoder
def test_the_loss_of_a_batch_is_the_mean_of_each_utterances_own(family: Family) -> None:
    _, model = task_and_model(family)
    waves, lengths = batch((3300, 1700, 2411))
    labels = torch.tensor([[2, 3, 4], [5, 9, 9], [6, 6, 9]])
    sizes = torch.tensor([3, 1, 2])
    with torch.no_grad():
        together = model(waves, lengths, labels, sizes)["loss"]
        alone = [
            model(waves[i : i + 1, :n], lengths[i : i + 1], labels[i : i + 1, :u], sizes[i : i + 1])
            for i, (n, u) in enumerate(zip(lengths.tolist(), sizes.tolist(), strict=True))
        ]
    mean = torch.stack([part["loss"] for part in alone]).mean()
    torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-4)


def test_too_few_frames_are_an_infinite_loss_that_nothing_hides() -> None:
    _, model = task_and_model(SPEECH["hf-wav2vec2-stable"])
    waves, lengths = batch((400 + 320,))
    with torch.no_grad():
        loss = model(waves, lengths, torch.tensor([[3, 3]]), torch.tensor([2]))["loss"]
    assert loss.item() == math.inf


def test_log_probabilities_are_of_full_precision_under_autocast() -> None:
    _, model = task_and_model(SPEECH["hf-wav2vec2-stable"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = model.log_probs(*batch())
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:2]))


@every_encoder
def test_training_reaches_adapter_and_head_and_no_part_of_the_encoder(family: Family) -> None:
    _, model = task_and_model(family)
    model.encoder.train_adapter("a")
    model.train()
    graphs = []
    # What the convolutions hand on must not hang on a graph, or they are differentiated too.
    norm = next(m for n, m in model.encoder.backbone.named_modules() if n.endswith("layer_norm"))
    norm.register_forward_pre_hook(lambda _, args: graphs.append(args[0].requires_grad))
    waves, lengths = batch((3300, 2411))
    labels, sizes = torch.tensor([[2, 3], [4, 5]]), torch.tensor([2, 2])
    for _ in range(2):
        model(waves, lengths, labels, sizes)["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == wanted
    assert all(name.startswith(("encoder.adapters.a", "head.")) for name in wanted)
    if family.name != "hf-whisper":
        assert graphs
        assert not any(graphs)


@pytest.mark.parametrize("freeze_front_end", [True, False])
@pytest.mark.parametrize(
    "method", ["e_adapter", "mms_adapter", "conformer_adapter", "l_adapter", "conv_front_end"]
)
@pytest.mark.parametrize("name", ["hf-wav2vec2", "hf-wav2vec2-stable", "torchaudio-wav2vec2"])
def test_speech_adapters_train_from_a_config_by_name(
    name: str, method: str, freeze_front_end: bool
) -> None:
    job = config(
        backbone={"name": "nano/wav2vec2", "freeze_front_end": freeze_front_end},
        trainer={"mode": method},
    )
    encoder = mmadapters.init(SPEECH[name].build())
    add_adapters(job, encoder)
    model = CTCModel(encoder, nn.Linear(32, 11), dropout=0.0, normalise=False, blank=0).train()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    waves, lengths = batch((3300, 2411))
    labels, sizes = torch.tensor([[2, 3], [4, 5]]), torch.tensor([2, 2])
    trained: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model(waves, lengths, labels, sizes)["loss"].backward()
        optimizer.step()
        trained |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == wanted
    assert any(name.startswith(f"encoder.adapters.{job.name}.") for name in wanted)


def local(name: str) -> CTCModel:
    """An encoder without attention, so that a frame knows no more than 8 frames to each side."""
    _, model = task_and_model(SPEECH[name])
    for leaf in model.encoder.sites.leaves():
        if leaf.name.endswith("attn.o"):
            assert leaf.weight is not None
            leaf.weight.zero_()
    return model


@torch.no_grad()
def test_pieces_with_enough_context_give_what_the_whole_gives() -> None:
    model = local("hf-wav2vec2-stable")
    for samples in (9000, 16_001, 16_320, 31_999):
        wave = torch.randn(samples)
        whole, counts = model.log_probs(wave[None], torch.tensor([samples]))
        for seconds in (0.5, 0.77, 1.0):
            pieces = model.long_log_probs(wave, ChunkConfig(seconds=seconds, stride=0.18))
            assert len(pieces) == int(counts)
            torch.testing.assert_close(pieces, whole[0], atol=1e-4, rtol=1e-4)


@every_encoder
@torch.no_grad()
def test_short_audio_in_one_piece_is_the_whole(family: Family) -> None:
    _, model = task_and_model(family)
    wave = torch.randn(3300)
    whole, counts = model.log_probs(wave[None], torch.tensor([3300]))
    piece = model.long_log_probs(wave, ChunkConfig(seconds=30.0, stride=5.0))
    assert len(piece) == int(counts)
    torch.testing.assert_close(piece, whole[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["hf-wav2vec2", "hf-whisper", "torchaudio-wavlm"])
@torch.no_grad()
def test_every_frame_of_long_audio_is_there_once(name: str) -> None:
    _, model = task_and_model(SPEECH[name])
    for samples in (3841, 6400, 10_007):
        for stride in (0.0, 0.02, 0.06, 0.119):
            found = model.long_log_probs(
                torch.randn(samples), ChunkConfig(seconds=0.24, stride=stride)
            )
            assert len(found) == model.tower.frames(samples)


@torch.no_grad()
def test_pieces_are_no_longer_than_the_encoder_takes() -> None:
    _, model = task_and_model(SPEECH["hf-whisper"])
    assert model.is_long(3841, ChunkConfig())
    assert not model.is_long(3840, ChunkConfig())
    found = model.long_log_probs(torch.randn(9000), ChunkConfig(seconds=30.0, stride=5.0))
    assert len(found) == model.tower.frames(9000)


@torch.no_grad()
def test_long_utterances_among_short_ones_are_recognised_in_pieces() -> None:
    task, model = task_and_model(SPEECH["hf-whisper"], chunks={"seconds": 0.24, "stride": 0.04})
    waves, lengths = batch((9000, 1700, 3840))
    found = task.transcribe(model, waves, lengths)
    for row, length in enumerate(lengths.tolist()):
        (alone,) = task.transcribe(model, waves[row : row + 1, :length], lengths[row : row + 1])
        assert alone == found[row]
    assert found[0][1].frames is not None
    assert max(found[0][1].frames) > model.tower.frames(3840)


def test_hop_and_field_of_the_usual_convolutions() -> None:
    layers = list(zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True))
    assert hop_and_field(layers) == (320, 400)  # 20 ms and 25 ms: wav2vec 2.0, section 4.2
