"""Reads pictures, masks and recordings from the values of a row, in one form for every task.

A value is a path, the `{"bytes", "path"}` of an undecoded `datasets.Image` or `Audio` column, or
a decoded picture or recording. Every problem with a value is a `BadRow`: decoders raise some twenty
different errors on broken files, and none of them may end a run.
"""

from .audio import audio_samples, read_audio
from .depth import bits_in_use, picture_bits, picture_to_show, spread
from .files import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    MEDIA_SUFFIXES,
    media_digest,
    media_file,
    media_name,
    tar_reference,
)
from .images import highest_value, image_size, read_image, read_mask
from .orientation import SIDEWAYS, exif_orientation, turned, upright_size

__all__ = [
    "AUDIO_SUFFIXES",
    "IMAGE_SUFFIXES",
    "MEDIA_SUFFIXES",
    "SIDEWAYS",
    "audio_samples",
    "bits_in_use",
    "exif_orientation",
    "highest_value",
    "image_size",
    "media_digest",
    "media_file",
    "media_name",
    "picture_bits",
    "picture_to_show",
    "read_audio",
    "read_image",
    "read_mask",
    "spread",
    "tar_reference",
    "turned",
    "upright_size",
]
