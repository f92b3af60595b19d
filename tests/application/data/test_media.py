"""Every kind of picture, mask and recording is read right, or refused with a sentence."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.data import media

RATE = 16_000


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sound(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def sine(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


@pytest.fixture
def picture() -> np.ndarray:
    """(5, 7, 3) uint8, every pixel another."""
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


# Images


def test_image_is_the_same_from_path_bytes_struct_array_and_pil(
    picture: np.ndarray, tmp_path: Path
) -> None:
    data = encoded(Image.fromarray(picture))
    file = tmp_path / "a.png"
    file.write_bytes(data)
    values = (
        *(file, str(file), data, {"bytes": data, "path": None}),
        {"bytes": None, "path": str(file)},
        *(picture, picture.transpose(2, 0, 1), picture / 255, Image.fromarray(picture)),
    )
    for value in values:
        image = media.read_image(value)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture: np.ndarray, orientation: int) -> None:
    """The eight cases of the EXIF standard, each undone by hand."""
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = media.read_image(encoded(Image.fromarray(picture), exif=exif))
    np.testing.assert_array_equal(np.asarray(image), undo[orientation](picture))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_image_usable(picture: np.ndarray) -> None:
    data = encoded(Image.fromarray(picture), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert media.read_image(data).size == (7, 5)


def test_transparency_lies_on_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0, 255, 128
    image = np.asarray(media.read_image(encoded(Image.fromarray(rgba))))
    assert image[0, :, 0].tolist() == [255, 0, 127]
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], dtype=np.uint8), "LA")
    assert np.asarray(media.read_image(encoded(grey)))[0].tolist() == [[7] * 3, [255] * 3]


def test_indexed_image_is_shown_by_its_palette() -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert np.asarray(media.read_image(encoded(image)))[0].tolist() == [
        [10, 20, 30],
        [200, 100, 50],
    ]
    seen = np.asarray(media.read_image(encoded(image, transparency=1)))
    assert seen[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = np.asarray(media.read_image(encoded(image, "JPEG")))[4, 4]
    assert red > 230 and green < 30 and blue < 30  # noqa: PT018


def test_16_bit_image_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = [0, 1, 128, 255]
    for data in (
        encoded(Image.fromarray(values)),
        values,
        encoded(Image.fromarray(values), "TIFF"),
    ):
        assert np.asarray(media.read_image(data))[0, :, 0].tolist() == expected
    wide = Image.fromarray(values.astype(np.int32))
    assert np.asarray(media.read_image(wide))[0, :, 1].tolist() == expected


def test_the_bits_in_use_scale_a_16_bit_image(tmp_path: Path) -> None:
    values = np.array([[0, 1024, 2048, 4095]], dtype=np.uint16)
    for data in (encoded(Image.fromarray(values)), values, Image.fromarray(values)):
        assert np.asarray(media.read_image(data))[0, 3, 0] == 16
        seen = np.asarray(media.read_image(data, bits=12))[0, :, 0]
        assert seen.tolist() == [0, 64, 128, 255]
        with pytest.raises(BadRow, match=r"holds 4095, above 1023.* 10 bits: .*data\.bits"):
            media.read_image(data, bits=10)
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    assert np.asarray(media.read_image(grey, bits=12))[0, :, 0].tolist() == [0, 100, 255]


def test_colours_of_16_bits_keep_their_bits() -> None:
    """PIL keeps the upper byte alone, which is black for 12 bits."""
    values = np.array([[[4095, 2048, 0], [16, 32, 4095]]])
    data = deep_png(values, 2)
    assert np.asarray(media.read_image(data, bits=12))[0].tolist() == [[255, 128, 0], [1, 2, 255]]
    assert media.highest_value(data) == 4095
    assert np.asarray(media.read_image(deep_png(values * 16, 2)))[0, 0].tolist() == [255, 128, 0]
    clear = np.dstack([values, np.array([[0, 65535]])])
    shown = np.asarray(media.read_image(deep_png(clear * 16, 6)))
    assert shown[0, 0].tolist() == [255, 255, 255]
    keyed = deep_png(values, 2, key=(16, 32, 4095))
    assert np.asarray(media.read_image(keyed, bits=12))[0].tolist() == [[255, 128, 0], [255] * 3]


def deep_png(values: np.ndarray, kind: int, *, key: tuple[int, ...] = ()) -> bytes:
    """A PNG of 16 bits a channel; `kind` is the colour type of its header."""
    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = [(b"IHDR", header)]
    chunks += [(b"tRNS", struct.pack(f">{len(key)}H", *key))] if key else []
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "I;16"])
def test_a_transparent_colour_lies_on_white(mode: str) -> None:
    """A tRNS chunk names one colour that is not seen."""
    key: int | tuple[int, ...] = {"RGB": (9, 9, 9), "L": 9, "1": 0, "I;16": 9}[mode]
    if mode == "I;16":
        data = deep_png(np.array([[[9], [0x8000]]]), 0, key=(9,))
    else:
        picture = Image.new(mode, (2, 1), key)
        picture.putpixel((1, 0), {"RGB": (200, 0, 0), "L": 128, "1": 1}[mode])
        data = encoded(picture, transparency=key)
    seen = np.asarray(media.read_image(data))[0].tolist()
    other = {"RGB": [200, 0, 0], "L": [128] * 3, "1": [255] * 3, "I;16": [128] * 3}
    assert seen == [[255] * 3, other[mode]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_pixels_are_turned_as_their_picture(picture: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(picture), exif=exif)
    upright = media.read_image(data)
    np.testing.assert_array_equal(media.turned(picture, orientation), np.asarray(upright))
    assert media.exif_orientation(data) == orientation
    assert media.upright_size(data) == (upright.height, upright.width)


def test_float_tiff_is_scaled_by_its_range() -> None:
    for values in (np.array([[0, 0.5, 1]]), np.array([[0, 127.5, 255]])):
        data = encoded(Image.fromarray(values.astype(np.float32)), "TIFF")
        assert np.asarray(media.read_image(data))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(BadRow, match="no known range"):
        media.read_image(np.array([[-1.0, 0.5]]))
    with pytest.raises(BadRow, match="not finite"):
        media.read_image(np.array([[np.nan, 0.5]]))


def test_one_bit_and_animated_images() -> None:
    assert np.asarray(media.read_image(Image.new("1", (2, 2), 1))).min() == 255
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(media.read_image(data))[0, 0].tolist() == [255, 0, 0]


def png_with_broken_checksum(data: bytes) -> bytes:
    at = data.index(b"IDAT")
    return data[: at + 8] + bytes([data[at + 8] ^ 255]) + data[at + 9 :]


def png_of_declared_size(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def test_unreadable_images_are_bad_rows(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    png, jpeg = encoded(noise), encoded(noise, "JPEG")
    empty, folder = tmp_path / "empty.png", tmp_path / "folder.png"
    empty.touch()
    folder.mkdir()
    cases = {
        "cannot be decoded: .*truncated": png[: len(png) // 2],
        "cannot be decoded: image file is truncated": jpeg[: len(jpeg) // 2],
        "cannot be decoded": png_with_broken_checksum(png),
        "no format that can be read": b"this is no image at all",
        "exceeds limit": png_of_declared_size(60_000),
        "no bytes": b"",
        r"empty \(0 bytes\)": empty,
        "no such file: .*missing.png": tmp_path / "missing.png",
        "cannot open .*Is a directory": folder,
        "no such file": "a\0b",
        "there is no image": None,
        "there is no image$": {"bytes": None, "path": None},
        "type int is no image": 3,
        r"shape \(2, 3, 5\)": np.zeros((2, 3, 5), dtype=np.uint8),
        r"shape \(0, 3\)": np.zeros((0, 3), dtype=np.uint8),
        "an array of <U1": np.array([["a"]]),
    }
    for message, value in cases.items():
        with pytest.raises(BadRow, match=message) as caught:
            media.read_image(value)
        assert "\n" not in str(caught.value)
    truncated = Image.open(io.BytesIO(png[: len(png) // 2]))
    with pytest.raises(BadRow, match="truncated"):
        media.read_image(truncated)


def test_files_are_closed(picture: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(picture).save(file)
    (tmp_path / "b.wav").write_bytes(sound(sine(100, RATE)))
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("open files cannot be counted here")
    before = len(list(descriptors.iterdir()))
    for _ in range(3):
        media.read_image(file)
        media.read_mask(file)
        media.read_audio(tmp_path / "b.wav", 8000)
        media.media_digest(file)
    assert len(list(descriptors.iterdir())) == before


# Masks


@pytest.mark.parametrize("kind", ["P", "L"])
def test_mask_keeps_its_indices(kind: str, tmp_path: Path) -> None:
    ids = np.array([[0, 1, 2], [20, 254, 255]], dtype=np.uint8)
    image = Image.fromarray(ids, kind)
    if kind == "P":
        image.putpalette([value for i in range(256) for value in (255 - i, 7, i)])
        image.info["transparency"] = 0
    image.save(tmp_path / "mask.png")
    mask = media.read_mask({"bytes": None, "path": str(tmp_path / "mask.png")})
    assert mask.dtype == np.int64
    np.testing.assert_array_equal(mask, ids)


def test_mask_of_16_bits_one_bit_and_two_channels() -> None:
    ids = np.array([[0, 300, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(media.read_mask(encoded(Image.fromarray(ids))), ids)
    np.testing.assert_array_equal(media.read_mask(encoded(Image.fromarray(ids), "TIFF")), ids)
    bits = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(media.read_mask(encoded(bits)), [[1, 0]])
    grey = Image.fromarray(np.array([[[7, 255], [9, 0]]], dtype=np.uint8), "LA")
    np.testing.assert_array_equal(media.read_mask(encoded(grey)), [[7, 9]])


def test_colour_masks_stay_colours(picture: np.ndarray) -> None:
    mask = media.read_mask(encoded(Image.fromarray(picture)))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, picture)
    opaque = np.dstack([picture, np.full((5, 7), 255, np.uint8)])
    np.testing.assert_array_equal(media.read_mask(encoded(Image.fromarray(opaque))), picture)


def test_mask_is_turned_with_its_image(picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = media.read_image(encoded(Image.fromarray(picture), exif=exif))
    mask = media.read_mask(encoded(Image.fromarray(picture[:, :, 0]), exif=exif))
    np.testing.assert_array_equal(mask, np.asarray(image)[:, :, 0])


def test_mask_arrays() -> None:
    for values in (np.array([[0, 255]]), np.array([[[0], [255]]]), np.array([[0.0, 255.0]])):
        np.testing.assert_array_equal(media.read_mask(values), [[0, 255]])
    with pytest.raises(BadRow, match="no whole numbers"):
        media.read_mask(np.array([[0.5]]))
    with pytest.raises(BadRow, match="no mask"):
        media.read_mask(np.zeros((2, 2, 5)))
    with pytest.raises(BadRow, match="there is no mask"):
        media.read_mask(None)


# Recordings


def test_audio_is_the_same_from_path_bytes_and_array(tmp_path: Path) -> None:
    samples = np.round(sine(440, RATE) * 32768).astype(np.int16)
    file = tmp_path / "a.wav"
    file.write_bytes(sound(samples))
    flac = sound(samples, kind="FLAC", subtype="PCM_16")
    expected = samples / np.float32(32768)
    values = (
        *(file, str(file), file.read_bytes(), flac, {"bytes": None, "path": str(file)}),
        *({"bytes": flac, "path": "x"}, {"array": samples, "sampling_rate": RATE}),
        {"array": expected.tolist(), "sampling_rate": RATE},
    )
    for value in values:
        read = media.read_audio(value, RATE)
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, expected)


def test_channels_are_averaged() -> None:
    left, right = sine(200, RATE).astype(np.float32), sine(300, RATE).astype(np.float32)
    stereo = np.stack([left, right], axis=1)
    expected = (left + right) / 2
    for value in (
        sound(stereo, subtype="FLOAT"),
        {"array": stereo, "sampling_rate": RATE},
        {"array": stereo.T, "sampling_rate": RATE},
    ):
        np.testing.assert_allclose(media.read_audio(value, RATE), expected, atol=1e-7)


@pytest.mark.parametrize("original", [8000, 11_025, 22_050, 44_100, 48_000, 44_101, 15_999, 11_111])
@pytest.mark.parametrize("rate", [16_000, 8000])
def test_any_rate_to_any_rate(original: int, rate: int) -> None:
    """A resampled sine is the sine sampled at the other rate."""
    frequency, seconds = 440.0, 0.8
    read = media.read_audio(
        {"array": sine(frequency, original, seconds), "sampling_rate": original}, rate
    )
    assert len(read) == -(-int(original * seconds) * rate // original)
    expected = sine(frequency, rate, seconds + 1)[: len(read)]
    inner = slice(rate // 20, -rate // 20)
    np.testing.assert_allclose(read[inner], expected[inner], atol=1e-3)


def test_what_lies_above_the_new_rates_half_is_gone() -> None:
    for original in (16_000, 15_999):
        read = media.read_audio({"array": sine(6000, original), "sampling_rate": original}, 8000)
        assert np.abs(read[400:-400]).max() < 1e-3


def test_unreadable_recordings_are_bad_rows(tmp_path: Path) -> None:
    samples = sine(440, RATE)
    wav, flac = sound(samples), sound(samples, kind="FLAC")
    ogg, mp3 = sound(samples, kind="OGG"), sound(samples, kind="MP3")
    empty = tmp_path / "empty.wav"
    empty.touch()
    nothing = {"array": np.zeros(0, dtype=np.float32), "sampling_rate": RATE}
    cases = [
        ("cut off: 0.60 s are there of 1.00 s", wav[: 44 + 2 * 9600]),
        ("cut off", sound(samples, kind="AIFF")[:20_000]),
        ("cannot be decoded: .*lost sync", flac[: len(flac) // 2]),
        ("cannot be decoded", ogg[: len(ogg) // 2]),
        ("cut off", mp3[: len(mp3) // 2]),
        ("cannot be decoded", mp3[:40]),
        ("cannot be decoded: .*No 'data' chunk", wav[:40]),
        ("cannot be decoded: Format not recognised$", b"this is no recording at all"),
        (r"empty \(no samples\)", sound(np.zeros(0))),
        (r"empty \(no samples\)", nothing),
        (r"empty \(0 bytes\)", empty),
        ("no bytes", {"bytes": b"", "path": "a.wav"}),
        ("no such file: .*missing.wav", tmp_path / "missing.wav"),
        ("there is no audio", {"bytes": None, "path": None}),
        ("not finite", sound(np.array([0, np.nan, 0]), subtype="FLOAT")),
        ("not finite", {"array": [0.0, np.inf], "sampling_rate": RATE}),
        ("sampling_rate above 0, got None", {"array": [0.0], "sampling_rate": None}),
        ("sampling_rate above 0, got 0", {"array": [0.0], "sampling_rate": 0}),
        ("no recording", {"array": np.zeros((2, 2, 2)), "sampling_rate": RATE}),
        ("no array", {"array": [[0.0], [0.0, 1.0]], "sampling_rate": RATE}),
        ("unsigned", {"array": np.zeros(4, np.uint8), "sampling_rate": RATE}),
    ]
    for message, value in cases:
        with pytest.raises(BadRow, match=message) as caught:
            media.read_audio(value, RATE)
        assert "\n" not in str(caught.value)
    file = tmp_path / "broken.wav"
    file.write_bytes(b"this is no recording at all")
    with pytest.raises(BadRow, match=r"decoded: Format not recognised$"):
        media.read_audio(file, RATE)


def test_broken_mp3_prints_no_stack(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadRow):
        media.read_audio(sound(sine(440, RATE), kind="MP3")[:40], RATE)
    assert "Traceback" not in capfd.readouterr().err


def test_wav_written_to_a_pipe_is_whole() -> None:
    """Such a file says that it has gigabytes of samples."""
    wav = sound(np.full(100, 0.25), subtype="PCM_16")
    at = wav.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        piped = wav[:at] + struct.pack("<I", size) + wav[at + 4 :]
        assert len(media.read_audio(piped, RATE)) == 100


# Names and digests


def test_names_and_digests(picture: np.ndarray, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(picture))
    (tmp_path / "a.png").write_bytes(data)
    embedded = {"bytes": data, "path": "b.png"}
    linked = {"bytes": None, "path": str(tmp_path / "a.png")}
    assert media.media_name(embedded) == "b.png"
    assert media.media_name(linked) == "a.png"
    assert media.media_name({"bytes": data, "path": None}) is None
    assert media.media_digest(embedded) == media.media_digest(linked) is not None
    assert media.media_digest(data[:-1]) != media.media_digest(data)
    assert media.media_digest({"bytes": None, "path": "missing.png"}) is None
    recorded = {"array": [0.0, 0.5], "sampling_rate": RATE}
    assert media.media_digest(recorded) != media.media_digest({**recorded, "array": [0.0, 0.25]})


@pytest.mark.parametrize("loudest", [3e38, -3e38])
def test_samples_that_would_overflow_are_a_bad_row(loudest: float, tmp_path: Path) -> None:
    samples = np.zeros((800, 2), np.float32)
    samples[7] = loudest
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(BadRow, match=r"holds samples of 3e\+38, and the largest is 1"):
        media.read_audio(str(tmp_path / "a.wav"), 16000)
    array = {"array": np.full(800, 2.0**31, np.float32), "sampling_rate": 8000}
    loud = media.read_audio(array, 16000)
    assert np.isfinite(np.square(loud).sum())
