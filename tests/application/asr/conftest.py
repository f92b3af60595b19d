"""Tasks and models over the small speech encoders of `families`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Family, families

import mmadapters
from mmadapters.tasks.asr.config import ASRConfig
from mmadapters.tasks.asr.model import CTCModel
from mmadapters.tasks.asr.task import ASRTask
from mmadapters.tasks.asr.text import Vocabulary
from mmadapters.tasks.encoders.speech import SpeechTower

SPEECH = {
    name: family
    for name, family in families().items()
    if name.split("-")[1] in ("wav2vec2", "hubert", "wavlm", "whisper")
}
every_encoder = pytest.mark.parametrize("family", SPEECH.values(), ids=list(SPEECH))
LETTERS = Vocabulary.of_texts(["abcdefgh"])


def config(**sections: Any) -> ASRConfig:
    return ASRConfig(
        **{
            "backbone": {"name": "nano/wav2vec2"},
            "data": {"source": "builtin/speech"},
            **sections,
        }
    )


def task_and_model(family: Family, **sections: Any) -> tuple[ASRTask, CTCModel]:
    """With a fresh head over a few letters and an adapter that does something, in eval mode."""
    encoder = mmadapters.init(family.build())
    encoder.add_adapter("a", "double_seq_bn")
    for parameter in encoder.adapter("a").parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    encoder.set_active_adapters("a")
    tower = SpeechTower(encoder)
    state = {
        "vocabulary": LETTERS.to_state(),
        "rate": tower.sample_rate,
        "layers": tower.layers,
        "longest": tower.longest,
        "normalise": False,
    }
    task = ASRTask(config(**sections), state)
    model = task.build(encoder)
    output = model.head[-1]
    with torch.no_grad():
        frames, _ = tower(torch.randn(1, 3800), torch.tensor([3800]))
        # No two characters nearly as likely, and others in every frame.
        output.weight.mul_(20 / frames.std(dim=1).mean())
        output.bias.copy_(-output.weight @ frames[0].mean(dim=0))
    return task, model.eval()
