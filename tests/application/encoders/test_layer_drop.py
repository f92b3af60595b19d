"""LayerDrop of speech encoders: it acts where asked, in every library and under every head."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import forked
import numpy as np
import pytest
import soundfile
import torch
from application.asr.conftest import SPEECH
from families.speech import SMALL, STABLE
from torch import nn

import mmadapters
from mmadapters import AdapterModel
from mmadapters.tasks import artifact
from mmadapters.tasks.asr.config import ASRConfig
from mmadapters.tasks.asr.task import ASRTask
from mmadapters.tasks.classification.config import ClassificationConfig
from mmadapters.tasks.classification.task import ClassificationTask
from mmadapters.tasks.config.schema import BackboneConfig
from mmadapters.tasks.encoders.speech import SpeechTower, layer_drop
from mmadapters.tasks.jobs.model import build_model
from mmadapters.tasks.training.trainer import TaskTrainer

PROGRAM = Path(__file__).parent.parent / "training" / "train_dropped_layers.py"
POST, PRE = {**SMALL, "num_hidden_layers": 3}, {**SMALL, **STABLE, "num_hidden_layers": 3}
TORCHAUDIO = {
    "encoder_embed_dim": 32,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 48,
    "extractor_conv_layer_config": [
        (16, k, s) for k, s in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True)
    ],
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 20,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
ENCODERS = {
    "hf-post-norm": ("hf/wav2vec2", {**POST, "layerdrop": 0.5}),
    "hf-stable-norm": ("hf/wav2vec2", {**PRE, "layerdrop": 0.5}),
    "hf-stable-norm-ctc": ("hf/wav2vec2-ctc", {**PRE, "layerdrop": 0.5}),
    "hf-hubert-stable": ("hf/hubert", {**PRE, "layerdrop": 0.5}),
    "hf-wavlm-stable": ("hf/wavlm", {**PRE, "layerdrop": 0.5, "num_buckets": 8}),
    "whisper": ("hf/whisper", {**WHISPER, "encoder_layerdrop": 0.5}),
    "torchaudio": ("torchaudio/WAV2VEC2_BASE", {**TORCHAUDIO, "encoder_layer_drop": 0.5}),
}


def backbone_of(name: str, **changes: Any) -> BackboneConfig:
    library, options = ENCODERS[name]
    return BackboneConfig(name=library, options=options, **{"layerdrop": True, **changes})


def sound(samples: int, seed: int) -> dict[str, Any]:
    noise = 0.1 * np.random.default_rng(seed).standard_normal(samples)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 16_000, format="FLAC")
    return {"bytes": buffer.getvalue(), "path": None}


def spoken(count: int) -> datasets.Dataset:
    rows = [{"audio": sound(3200 + 320 * i, i), "text": "ab ba"[: 1 + i % 5]} for i in range(count)]
    return datasets.Dataset.from_list(rows)


def asr_job(name: str = "hf-stable-norm", **sections: Any) -> ASRConfig:
    trainer = {"max_steps": 6, "batch_size": 4, "device": "cpu", "tensorboard": False}
    return ASRConfig(
        **{
            "name": "a",
            "backbone": backbone_of(name),
            "data": {"source": "none"},
            "trainer": trainer,
            **sections,
        }
    )


def blocks_run(encoder: AdapterModel, run: Any) -> list[int]:
    """Returns how many blocks ran in each of some calls."""
    counts = []
    handles = [
        block.module.register_forward_pre_hook(lambda *_: counts.__setitem__(-1, counts[-1] + 1))
        for block in encoder.sites.towers["audio"].blocks
    ]
    for _ in range(12):
        counts.append(0)
        run()
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_are_dropped_in_training_and_never_after_it(name: str) -> None:
    torch.manual_seed(0)
    config = asr_job(name)
    encoder = mmadapters.init(artifact.make_backbone(config.backbone))
    task = ASRTask(config, None)
    task.fit(spoken(4), encoder.backbone)
    model = build_model(task, encoder)
    waves, lengths = torch.randn(2, 3200), torch.tensor([3200, 2400])

    def run() -> None:
        model.tower(waves, lengths)

    model.train()
    dropped = blocks_run(encoder, run)
    assert min(dropped) < 3
    assert sum(dropped) == pytest.approx(18, abs=9)
    assert not any(m.training for m in encoder.backbone.modules() if isinstance(m, nn.Dropout))
    model.eval()
    assert set(blocks_run(encoder, run)) == {3}


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_are_not_dropped_unless_asked(name: str) -> None:
    config = backbone_of(name, layerdrop=False)
    encoder = mmadapters.init(artifact.make_backbone(config), train_trunk=True).train()
    assert artifact.modules_active_in_training(config, encoder) == ()
    assert layer_drop(encoder)[1] == 0
    tower = SpeechTower(encoder)
    waves, lengths = torch.randn(1, 3200), torch.tensor([3200])
    assert set(blocks_run(encoder, lambda: tower(waves, lengths))) == {3}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("hf-stable-norm", "layerdrop"),
        ("whisper", "encoder_layerdrop"),
        ("torchaudio", "encoder_layer_drop"),
    ],
)
def test_an_encoder_that_drops_nothing_says_what_to_set(name: str, key: str) -> None:
    config = backbone_of(name)
    config = config.model_copy(update={"options": {**config.options, key: 0.0}})
    encoder = mmadapters.init(artifact.make_backbone(config))
    with pytest.raises(ValueError, match=rf"drops none: set backbone\.options\.{key} above 0"):
        artifact.modules_active_in_training(config, encoder)


def test_what_cannot_be_random_is_refused() -> None:
    config = BackboneConfig(name="timm/vit_tiny", layerdrop=True)
    vision = mmadapters.init(mmadapters.load_backbone("nano/vit"))
    with pytest.raises(ValueError, match=r"backbone\.layerdrop is for speech encoders"):
        artifact.modules_active_in_training(config, vision)
    config = backbone_of("torchaudio", spec_augment=True)
    encoder = mmadapters.init(artifact.make_backbone(config))
    with pytest.raises(ValueError, match=r"backbone\.spec_augment is for speech encoders of tran"):
        artifact.modules_active_in_training(config, encoder)


@pytest.mark.parametrize("name", ["hf-post-norm", "hf-stable-norm", "whisper", "torchaudio"])
def test_sums_over_layers_bear_layers_that_are_left_out(name: str) -> None:
    torch.manual_seed(0)
    config = ClassificationConfig(
        backbone=backbone_of(name),
        data={"source": "none", "kind": "audio"},
        head={"layers": "all"},
        trainer={"device": "cpu"},
    )
    rows = datasets.Dataset.from_list(
        [{"audio": sound(3200, i), "label": "ab"[i % 2]} for i in range(4)]
    )
    encoder = mmadapters.init(artifact.make_backbone(config.backbone))
    task = ClassificationTask(config)
    task.fit(rows, encoder.backbone)
    model = build_model(task, encoder).train()
    batch = task.collate([task.example(row, train=True) for row in rows])
    for _ in range(12):  # also without the first layer, and without any
        loss = model(**batch)["loss"]
        loss.backward()
        assert loss.isfinite()
    assert model.head.sum.weight.grad.ne(0).any()

    # A layer that is left out has the states that entered it.
    runner, _ = layer_drop(encoder)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.train()
    blocks = encoder.sites.towers["audio"].blocks
    ran: list[int] = []
    for number, block in enumerate(blocks):
        block.module.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    assert runner.training
    model.logits(waves=batch["waves"], lengths=batch["lengths"])
    while len(ran) in (0, 3):
        ran.clear()
        model.logits(waves=batch["waves"], lengths=batch["lengths"])
    states = seen[-1]
    for number in range(3):
        same = torch.equal(states[number], states[number + 1])
        assert same is (number not in ran)


def test_training_with_dropped_layers_runs_in_two_processes(tmp_path: Path) -> None:
    done = forked.run(PROGRAM, str(tmp_path), processes=2, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told == {"processes": 2, "steps": 6, "same": True}


def test_training_with_dropped_layers_runs_in_one_process(tmp_path: Path) -> None:
    config, rows = asr_job(), spoken(8)
    backbone = artifact.make_backbone(config.backbone)
    task = ASRTask(config)
    task.fit(rows, backbone)
    model = build_model(task, mmadapters.init(backbone))
    trainer = TaskTrainer(task, model, train=rows, validation=None, folder=tmp_path, quiet=True)
    trainer.fit(None)
    assert trainer.cache.train is None


def test_families_of_speech_encoders_have_a_runner_of_their_blocks() -> None:
    for family in SPEECH.values():
        encoder = mmadapters.init(family.build())
        runner, _ = layer_drop(encoder)
        first = encoder.sites.towers["audio"].blocks[0].module
        assert any(module is first for module in runner.layers)
