"""Which pairs of a method and a family the tests run.

The whole product of methods and families takes long and is for `make test-all`. `make test` runs a
cover of it, chosen by a rule and never at random, and the oldest versions of the libraries run each
mechanism over all families. `--pairs` says which, see tests/conftest.py;
`test_selection.py` proves what a cover holds.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from families import Family

Pair = TypeVar("Pair")
SCOPES = ("cover", "all", "mechanisms")
SCOPE = os.environ.get("MMADAPTERS_TEST_PAIRS") or "cover"
assert SCOPE in SCOPES, f"--pairs and MMADAPTERS_TEST_PAIRS are one of {SCOPES}, not {SCOPE!r}"

# How a method acts.
MECHANISMS: dict[str, tuple[str, ...]] = {
    "branch at a sublayer": (
        *("bottleneck-after", "bottleneck", "bottleneck-normed", "double_seq_bn", "seq_bn"),
        *("par_bn", "adaptformer", "adapter_plus", "compacter", "e_adapter", "mms_adapter"),
    ),
    "branch over neighbours": ("convpass", "mona"),
    "branch over frames": ("conformer_adapter",),
    "low-rank change of a map": ("lora", "lora-dropout", "dora", "fact", "fact-tk", "repadapter"),
    "scale and shift": ("ia3", "ssf", "bitfit"),
    "prefix": ("prefix", "prefix-reparametrised"),
    "prompt": ("prompt", "prompt-shallow"),
    "readout of layers": ("ladder", "l_adapter", "l_adapter-replacing"),
    "front end": ("conv_front_end",),
    "embedding": ("clip_adapter", "clip_adapter-both"),
    "inside of cross-attention": ("cross_modal",),
    "new cross-attention": ("gated_cross_attention", "gated_cross_attention-ffn"),
    "coupled towers": ("mma", "uniadapter"),
    "several at once": ("union", "union-of-weights", "mam", "unipelt"),
}
MECHANISM = {method: name for name, methods in MECHANISMS.items() for method in methods}

KINDS = {
    "timm": ("timm-",),
    "open_clip": ("open_clip-",),
    "transformers' CLIP": ("hf-clip", "hf-siglip"),
    "BLIP": ("hf-blip",),
    "transformers' speech": ("hf-wav2vec2", "hf-hubert", "hf-wavlm", "hf-whisper"),
    "torchaudio": ("torchaudio-",),
    "text": ("hf-bert", "hf-roberta", "hf-t5"),
    "transformers' vision": ("hf-",),
}


def kind(family: str) -> str:
    """Returns the kind of encoder that a family is, by its name."""
    return next(kind for kind, starts in KINDS.items() if family.startswith(starts))


def facts(family: str, method: str) -> dict[Hashable, int]:
    """Returns what a pair shows, and how many pairs should show it: a method on a kind of encoder,
    on two families of that kind, and a mechanism on a family, with one of its methods."""
    return {
        ("method", method, kind(family)): 2,
        ("mechanism", MECHANISM[method], family): 1,
    }


def facts_of_mechanisms(family: str, method: str) -> dict[Hashable, int]:
    """Returns the second of these alone."""
    return {("mechanism", MECHANISM[method], family): 1}


def facts_of_copies(family: str, method: str) -> dict[Hashable, int]:
    """Returns the facts of what costs a second model: a method on one family of each kind, and each
    family with two methods."""
    return {("method", method, kind(family)): 1, ("family", family): 2}


def cover(
    pairs: Sequence[Pair],
    shown: Callable[[Pair], dict[Hashable, int]],
    *,
    first: Iterable[Pair] = (),
) -> list[Pair]:
    """Returns pairs that show each fact as often as it should be shown, or as often as any do.

    The pair that adds most is taken next, and of equals one that is in `first`, then the earliest.
    The pairs keep their order.
    """
    every = [shown(pair) for pair in pairs]
    there = Counter(fact for told in every for fact in told)
    missing = {fact: min(n, there[fact]) for told in every for fact, n in told.items()}
    preferred, taken = set(first), set()
    # What a pair adds only falls while others are taken, so that the old figures are bounds.
    queue = [(-len(told), pairs[i] not in preferred, i) for i, told in enumerate(every)]
    heapq.heapify(queue)
    while queue:
        bound, later, index = heapq.heappop(queue)
        adds = sum(missing[fact] > 0 for fact in every[index])
        if adds == 0:
            continue
        if adds < -bound:
            heapq.heappush(queue, (-adds, later, index))
            continue
        taken.add(pairs[index])
        for fact in every[index]:
            missing[fact] = max(0, missing[fact] - 1)
    return [pair for pair in pairs if pair in taken]


def select(
    pairs: Sequence[tuple[Family, str]],
    shown: Callable[[str, str], dict[Hashable, int]] = facts,
    *,
    first: Iterable[tuple[Family, str]] = (),
    scope: str = SCOPE,
) -> list[tuple[Family, str]]:
    """Returns the pairs of the product that are run, in their order."""
    if scope == "all":
        return list(pairs)
    if scope == "mechanisms":
        shown = facts_of_mechanisms
    return cover(pairs, lambda pair: shown(pair[0].name, pair[1]), first=first)
