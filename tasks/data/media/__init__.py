"""Reads pictures, masks and recordings from the values of a row, in one form for every task.

A value is a path, the `{"bytes", "path"}` of an undecoded `datasets.Image` or `Audio` column, or
a decoded picture or recording. Every problem with a value is a `BadRow`: decoders raise some twenty
different errors on broken files, and none of them may end a run.
"""

from .audio import audio_samples, read_audio
from .files import AUDIO_SUFFIXES, IMAGE_SUFFIXES, MEDIA_SUFFIXES, media_digest, media_name
from .images import image_size, read_image, read_mask

__all__ = [
    "AUDIO_SUFFIXES",
    "IMAGE_SUFFIXES",
    "MEDIA_SUFFIXES",
    "audio_samples",
    "image_size",
    "media_digest",
    "media_name",
    "read_audio",
    "read_image",
    "read_mask",
]
