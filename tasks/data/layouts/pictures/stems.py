"""Finds the picture that a mask belongs to by the names of both.

| picture                 | its mask, in another folder or in the same one                  |
|-------------------------|-----------------------------------------------------------------|
| a.jpg                   | a.png, a_mask.png, a-mask.gif, a_gt.png, a_seg.png, mask_a.png  |
| a_sat.jpg, a_0000.png   | a_mask.png, a.png                                               |
| a_leftImg8bit.png       | a_gtFine_labelTrainIds.png, or else a_gtFine_labelIds.png       |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

_SEPARATOR = re.compile(r"[ _.\-]+")
_TRAIN_IDS = re.compile(r".*trainids")
_IDS = re.compile(r".*labelids")
_MASK_KIND = re.compile(
    r"(gt|gtfine|gtcoarse)?[ _.\-]*"
    r"(masks?|gt|seg|segmentations?|labels?|labelids|label_?trainids|trainids|annotations?|matte|"
    r"ground_?truth|l|manual\d|\d(st|nd)ho)(?P<number>[ _.\-]*\d+)?"
)
# Pictures that show labels but hold none, and the ids of objects.
_SHOWN = re.compile(r".*(colou?r|instanceids|instancetrainids|instances?|overlay|vis|viz|preview)")
_IMAGE_KIND = re.compile(r"(.+?)[ _.\-]+(leftImg8bit|sat|image|img|im|rgb|training|test|0000)")
_IMAGE_PREFIX = re.compile(r"(?:images?|img|im|sat)[ _.\-]+(.+)", re.IGNORECASE)
_MASK_PREFIX = re.compile(r"(?:masks?|gt|labels?|seg|annotation)[ _.\-]+(.+)", re.IGNORECASE)


def mask_kind(stem: str, pictures: Mapping[str, object]) -> tuple[str, str] | None:
    """Returns the picture of a mask and the ending that makes it one, or None for another file.

    Args:
        pictures: the stems of all files of the same folder.
    """
    for base, kind in cuts(stem):
        if kind and (_MASK_KIND.fullmatch(kind) or _SHOWN.fullmatch(kind)):
            for name in (base, *(f"{base}{end}" for end in ("_sat", "_leftImg8bit", "_image"))):
                if name in pictures:
                    return name, kind
    return None


def cuts(stem: str) -> Iterator[tuple[str, str]]:
    """Yields (stem of a picture, ending of the mask in lower case), the longest stem first."""
    yield stem, ""
    for match in reversed(list(_SEPARATOR.finditer(stem))):
        if match.start():
            yield stem[: match.start()], stem[match.end() :].lower()
    if prefixed := _MASK_PREFIX.fullmatch(stem):
        yield prefixed[1], ""


def picture_index(stems: Sequence[str]) -> dict[str, str]:
    """Returns the stem of each picture by the names that its mask may have."""
    index = {stem: stem for stem in stems}
    short: dict[str, set[str]] = {}
    for stem in stems:
        for match in (_IMAGE_KIND.fullmatch(stem), _IMAGE_PREFIX.fullmatch(stem)):
            if match:
                short.setdefault(match[1], set()).add(stem)
    return index | {n: some.pop() for n, some in short.items() if n not in index and len(some) == 1}


def usual_ending(endings: Sequence[str]) -> str:
    """Returns the ending that most masks have, of those that are no words for masks; "" if there
    is none."""
    unknown = [end for end in endings if end and not _MASK_KIND.fullmatch(end)]
    counts = Counter(end for end in unknown if not _SHOWN.fullmatch(end)).most_common(1)
    return counts[0][0] if counts else ""


def is_strange(ending: str, usual: str) -> bool:
    """Returns whether an ending does not say that a file is a mask, or a picture of one."""
    known = not ending or ending == usual
    return not (known or _MASK_KIND.fullmatch(ending) or _SHOWN.fullmatch(ending))


def chosen(endings: Sequence[str], usual: str) -> list[str]:
    """Returns the endings of a picture's masks that are read: the best one, or several if they are
    equally good.

    Masks of train ids come before those of the same stem, and these before masks of other endings.
    """
    ranks: dict[int, list[str]] = {}
    for end in endings:
        if _SHOWN.fullmatch(end):
            continue
        if _TRAIN_IDS.fullmatch(end):
            rank = 0
        elif not end:
            rank = 1
        elif _IDS.fullmatch(end):
            rank = 2
        elif _MASK_KIND.fullmatch(end):
            rank = 3
        elif end == usual:
            rank = 4
        else:
            continue
        ranks.setdefault(rank, []).append(end)
    return ranks[min(ranks)] if ranks else []
