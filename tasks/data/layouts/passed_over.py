"""Says which files of a folder are in no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from ...core.findings import Finding, quoted

SHOWN = 3  # files that a sentence names

SOUNDS = frozenset((".m4a", ".aac", ".wma", ".amr", ".ac3", ".mka", ".ape", ".mp4", ".mov"))
PICTURES = frozenset((".heic", ".heif", ".avif", ".svg", ".psd", ".dcm", ".nii", ".cr2", ".nef"))


def counted_suffixes(files: Sequence[str]) -> str:
    """Returns the words for the number of files of each suffix: "12 .m4a, 1 .txt"."""
    counts = Counter(_suffix(file) for file in files)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


def unread_findings(folder: Path, files: Sequence[str]) -> tuple[Finding, ...]:
    """Returns a finding for each suffix of files that are passed over.

    Args:
        files: their paths relative to the folder.
    """
    by_suffix: dict[str, list[str]] = {}
    for file in files:
        by_suffix.setdefault(_suffix(file), []).append(file)
    return tuple(
        Finding(
            passed(f"{suffix} file", folder, some),
            remedy(some[0]),
        )
        for suffix, some in sorted(by_suffix.items(), key=lambda item: -len(item[1]))
    )


def lost_classes(read: Mapping[str, set[str]], unread: Mapping[str, list[str]]) -> list[Finding]:
    """Returns a finding for each split that loses classes, since none of their files can be read.

    Args:
        read: the classes of each split that have rows.
        unread: the files that are passed over, by "split/class".
    """
    lost: dict[str, dict[str, list[str]]] = {}
    for place, files in unread.items():
        split, _, name = place.partition("/")
        if name not in read.get(split, ()):
            lost.setdefault(split, {})[name] = files
    results = []
    for split, classes in lost.items():
        of_split = f" of {split}" if split else ""
        files = [file for some in classes.values() for file in some]
        noun = "class" if len(classes) == 1 else f"{len(classes):,} classes"
        verb = "has" if len(classes) == 1 else "have"
        results.append(
            Finding(
                f"the {noun} {quoted(sorted(classes))}{of_split} {verb} no row: of "
                f"{counted(len(files), 'file')} there ({counted_suffixes(files)}) none can be read",
                remedy(files[0]),
            )
        )
    return results


def remedy(file: str) -> str:
    """Returns the words for what to do with a file that is not read."""
    path = PurePosixPath(file)
    if path.suffix.lower() in SOUNDS:
        return f"convert them, as by ffmpeg -i {path.name} {path.stem}.flac"
    if path.suffix.lower() in PICTURES:
        return f"convert them, as by magick {path.name} {path.stem}.png"
    return "move them elsewhere, or convert them if they are data"


def passed(noun: str, folder: Path, files: Sequence[str], reason: str = "") -> str:
    """Returns the sentence for files that are passed over."""
    verb = "is" if len(files) == 1 else "are"
    reason = f", since {reason}" if reason else ""
    number = counted(len(files), noun)
    return f"{number} in {folder} {verb} passed over{reason} ({shown(files)})"


def shown(files: Sequence[str]) -> str:
    """Returns the words for the first files."""
    return ", ".join(files[:SHOWN]) + (", …" if len(files) > SHOWN else "")


def _suffix(file: str) -> str:
    return PurePosixPath(file).suffix.lower() or "nameless"


def counted(count: int, noun: str) -> str:
    """Returns the words for a number of things: "1 file", "2 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
