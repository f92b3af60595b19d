"""The table of functions that recompute the headline figures of each shipped encoder.

Importing it imports torch and the libraries of the encoders.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import blip_figures, clip_figures, vit_figures, wav2vec2_figures
from .figure import CardFigure

# Each takes the encoder's directory and the folder of the data sets, or None.
HEADLINES: dict[str, Callable[[Path, Path | None], list[CardFigure]]] = {
    "nano/vit": vit_figures.verify,
    "nano/wav2vec2": wav2vec2_figures.verify,
    "nano/clip": clip_figures.verify,
    "nano/blip-retrieval": partial(blip_figures.verify, kind="retrieval"),
    "nano/blip-caption": partial(blip_figures.verify, kind="caption"),
}
