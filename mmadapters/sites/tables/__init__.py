"""Tables of the encoders of timm, transformers, open_clip and torchaudio that have a site map.

A supported architecture is a row of one of the tables in this folder. Nothing here imports those
libraries: `find_row` looks for the name of the module's class.
"""

from __future__ import annotations

from torch import nn

from ..resolve import resolve
from ..sitemap import SiteMap
from ..spec import Architecture, Example, TableRow, Unresolved
from . import audio, blip, clip, text, vision

ROWS: tuple[TableRow, ...] = (
    *vision.ROWS,
    *audio.ROWS,
    *clip.ROWS,
    *blip.ROWS,
    *text.ROWS,
)


def find_row(backbone: nn.Module) -> TableRow | None:
    """Returns the first row that knows a class from which the backbone's inherits, or None.

    The backbone's own class is looked up first.
    """
    for cls in type(backbone).__mro__:
        qualified = f"{cls.__module__}.{cls.__name__}"
        for row in ROWS:
            if row.matches(qualified):
                return row
    return None


def describe(
    backbone: nn.Module, architecture: Architecture | None = None
) -> tuple[SiteMap, Example | None]:
    """Returns the sites of a backbone, and a function that makes the smallest input for it.

    Args:
        architecture: describes the backbone; None to look in the tables.

    Raises:
        ValueError: the class is unknown and no `architecture` is given, or a path of the given one
            does not exist, or a known class has a variant that adapters cannot enter.
    """
    name = type(backbone).__name__
    if architecture is not None:
        try:
            return resolve(backbone, architecture), architecture.example
        except Unresolved as error:
            raise ValueError(f"the given site map does not fit {name}: {error}") from None
    row = find_row(backbone)
    if row is None:
        inner = getattr(backbone, "model", None)
        if isinstance(inner, nn.Module) and find_row(inner) is not None:
            raise ValueError(
                f"{name} is a wrapper around {type(inner).__name__}, which mmadapters knows: adapt "
                "its inner model, init(encoder.model)"
            )
        raise ValueError(
            f"{name} is not a known encoder; describe where its blocks are with "
            "mmadapters.Architecture and pass it as init(backbone, sites=...)"
        )
    reasons: list[str] = []
    for candidate in row.architectures(backbone):
        try:
            return resolve(backbone, candidate), candidate.example
        except Unresolved as error:
            reasons.append(str(error))
    raise ValueError(
        f"this variant of {name} has a layout that mmadapters does not know "
        f"({'; '.join(dict.fromkeys(reasons))}); describe it with mmadapters.Architecture and pass "
        "it as init(backbone, sites=...)"
    )
