"""Errors of commands: each is one sentence, and a mistake of ours leaves a file to report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from safetensors import SafetensorError

from mmadapters.tasks.artifact import check_size, make_backbone
from mmadapters.tasks.cli.shared import friendly
from mmadapters.tasks.config.schema import BackboneConfig


def said(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    @friendly
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.startswith("error: ")
    return text


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("no"), RecursionError("deep"), AssertionError()]
)
def test_a_mistake_of_ours_is_one_sentence_and_a_file(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(error, capsys)
    match = re.search(r"its traceback is in (\S+\.txt): please report it", text)
    assert match is not None
    file = Path(match[1])
    assert type(error).__name__ in text
    assert "Traceback (most recent call last)" in file.read_text("utf-8")
    file.unlink()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "adapter.safetensors"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_told(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the disk is full" in said(error, capsys)


def test_options_that_an_encoder_does_not_have_are_told() -> None:
    config = BackboneConfig(name="timm/vit_tiny_patch16_224", options={"dpeth": 2})
    with pytest.raises(ValueError, match=r"backbone.options \(dpeth\) do not fit timm/vit_tiny"):
        make_backbone(config)


@pytest.mark.parametrize("options", [{"depth": 10**8}, {"embed_dim": 3_000_000}])
def test_an_encoder_that_no_machine_holds_is_refused(options: dict[str, int]) -> None:
    config = BackboneConfig(name="timm/vit_tiny_patch16_224", options=options)
    with pytest.raises(ValueError, match=r"backbone\.options.* asks? for .*limit"):
        check_size(config, "adapter.json")
