"""Layouts of recordings.

A layout is a function that is given a request and the path of a folder or a file. It returns the
splits, or None if the path is laid out in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...parts import Parts
from ...wanted import Wanted
from .class_folders import speech_commands, timit, voxceleb
from .kaldi import kaldi
from .librispeech import librispeech
from .tables import common_voice, esc50, ljspeech, nemo, urbansound8k

LAYOUTS: tuple[Callable[[Wanted, Path], Parts | None], ...] = (
    *(common_voice, ljspeech, esc50, urbansound8k, nemo),
    *(librispeech, kaldi, speech_commands, timit, voxceleb),
)
