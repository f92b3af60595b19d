"""Facts about loading and `mmadapters zoo verify`: quick, honest about what it did not check."""

import copy
import subprocess
import sys
import time

import pytest
import torch
from timing import ratio
from typer.testing import CliRunner

from mmadapters.tasks.cli.app import app
from mmadapters.tasks.zoo import photos
from mmadapters.tasks.zoo.verify import verify
from mmadapters.zoo import NANO, load_nano
from mmadapters.zoo.files import read_weights, write_weights

IMAGE_NAMES = ("nano/vit", "nano/clip")
BLIP_NAMES = ("nano/blip-retrieval", "nano/blip-caption")


@pytest.fixture(autouse=True)
def _small_gallery(monkeypatch):
    """200 scenes of the 1,000, to be quick; finding the right one is then a little easier."""
    from mmadapters.tasks.zoo import clip_figures

    monkeypatch.setattr(clip_figures, "GALLERY", 200)


@pytest.fixture
def tampered(tmp_path):
    """A copy of `nano/clip` with another first block."""
    directory = NANO["nano/clip"].directory
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = read_weights(directory)
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    weights[key] = torch.randn_like(weights[key])
    write_weights(weights, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "library"),
    [(name, library) for name in IMAGE_NAMES + BLIP_NAMES for library in NANO[name].libraries],
)
def test_loading_takes_as_long_as_25_copies(name, library):
    """That is a second where a copy takes 40 ms; without the libraries' imports."""
    model = load_nano(name, library=library)
    assert (
        ratio(
            lambda: load_nano(name, library=library),
            lambda: copy.deepcopy(model),
            repeats=3,
            clock=time.process_time,
        )
        < 25
    )


def test_the_drawn_scenes_are_checked_without_any_data():
    recall, zero_shot = verify(["nano/clip"])
    assert recall.holds is True
    assert zero_shot.holds is None
    assert "tiny_imagenet_64" in zero_shot.note


def test_a_figure_without_its_data_is_not_checked():
    (figure,) = verify(["nano/vit"])
    assert figure.measured is None
    assert figure.holds is None


def test_tampered_weights_do_not_hold(tampered):
    recall, _ = verify(["nano/clip"], directories={"nano/clip": tampered})
    assert recall.holds is False


def test_a_truncated_file_is_not_loaded(tampered):
    from mmadapters.zoo import clip

    path = tampered / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)incomplete|deserializ|invalid"):
        clip.load(tampered, "open_clip")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="nano/vit"):
        verify(["nano/resnet"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nano/vit"], 2, "not checked"),
        (["nano/clip"], 0, "holds"),
        (["nano/resnet"], 2, "nano/resnet"),
    ],
)
def test_the_command_line_exits_with_the_verdict(arguments, code, says):
    result = CliRunner().invoke(app, ["zoo", "verify", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code
    assert says in result.output


def test_the_command_line_exits_with_1_when_a_figure_does_not_hold(tampered, monkeypatch):
    from dataclasses import replace

    row = replace(NANO["nano/clip"], folder=str(tampered))  # an absolute path wins over the parent
    monkeypatch.setitem(NANO, "nano/clip", row)
    result = CliRunner().invoke(app, ["zoo", "verify", "nano/clip"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "does not hold" in result.output


def test_the_command_line_lists_every_encoder():
    result = CliRunner().invoke(app, ["zoo", "list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.output for name in NANO)


def test_the_command_line_and_the_zoo_import_no_library():
    code = "import sys, mmadapters.tasks.cli.app, mmadapters.tasks.zoo.verify; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    libraries = "torch timm transformers open_clip torchaudio matplotlib datasets"
    assert not set(libraries.split()) & set(done.stdout.split())


def test_loading_an_encoder_imports_nothing_of_the_application():
    names = ["nano/vit", "nano/clip", "nano/wav2vec2", "nano/blip-retrieval"]
    code = f"""
import sys, mmadapters
for name in {names}:
    mmadapters.load_backbone(name)
    taken = [module for module in sys.modules if module.startswith("mmadapters.tasks")]
    print(name, "mmadapters.zoo" in sys.modules, taken)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} True []" for name in names]


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_the_headlines_hold_on_a_part_of_the_real_photographs(name, shared_dir, monkeypatch):
    """400 of the 2,500 photographs, to be quick: three standard errors are 0.075."""
    whole = photos.read_photos
    monkeypatch.setattr(
        photos, "read_photos", lambda *a: tuple(tensor[:400] for tensor in whole(*a))
    )
    for figure in verify([name], data=shared_dir / "data"):
        assert figure.measured is not None
        assert abs(figure.measured - figure.expected) < 0.075
