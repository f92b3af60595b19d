"""The first run, on a few scenes."""

from __future__ import annotations

from pathlib import Path

import torch

import mmadapters
from mmadapters.tasks import demo
from mmadapters.tasks.synthetic.scenes import TEST_SEEDS


def test_adapters_and_heads_of_the_demo_give_their_answers_again(tmp_path: Path) -> None:
    shares: dict[str, list[float]] = {way: [] for way in demo.WAYS}
    results = demo.run(
        tmp_path,
        lambda way, share: shares[way].append(share),
        train_scenes=100,
        test_scenes=60,
        epochs=1,
    )
    assert [result.name for result in results] == list(demo.WAYS)
    assert all(told == [0.5, 1.0] for told in shares.values())
    images, labels = demo.scenes(TEST_SEEDS[:60])
    for result in results[1:]:
        model = mmadapters.init(mmadapters.load_backbone("nano/vit"))
        stored = model.load_adapter(tmp_path / result.name)
        model.set_active_adapters("count")
        with torch.no_grad():
            features = model.forward_features(images).mean(dim=1)
        logits = features @ stored.head["weight"].T + stored.head["bias"]
        assert torch.equal(logits.argmax(1) == labels, result.correct)
        assert result.trained == sum(
            t.numel() for t in (*stored.tensors.values(), *stored.head.values())
        )
