"""The identity of an encoder: what its adapters depend on, as numbers that fit into a file.

Each tower is described by its width, its depth, a hash of the weights of its blocks under canonical
names, and a hash of each other part that the states of its last block depend on: front end,
projection, embeddings, norms, biases, language adapters. The first hash is the same for the same
weights in any library. Parts go by their names in the encoder, so they are compared within a
library alone. Heads and poolers are no part of it.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sites.sitemap import Leaf, SiteMap, Tower

_SAMPLED = 256  # the least number of weights of a tower that its identity holds
_PART_SAMPLED = 3  # the number of values of each other part
_HALVES = ("bfloat16", "float16")
# Tables of positions, which libraries resize for inputs of another size.
_POSITIONS = re.compile(r"pos_embed$|position_embedding|positional_embedding|relative_|rel_pos")


def encoder_identity(
    sites: SiteMap, behind: Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, Any]:
    """Returns the identity of an encoder, `{library, architecture, towers}`.

    Args:
        behind: see `tower_identity`, by the name of the tower.
    """
    towers = {
        name: tower_identity(tower, None if behind is None else behind[name])
        for name, tower in sites.towers.items()
    }
    return {"library": sites.library, "architecture": sites.architecture, "towers": towers}


def tower_identity(tower: Tower, behind: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Returns the identity of a tower as data that JSON can hold.

    The weights of its blocks without biases, as some libraries have zero biases where others have
    none, are under "weights" (SHA-256 in float32) and "sample" (some of them, float32). "parts" has
    the same of the other tensors, by a name that they share.

    Args:
        behind: the tensors that the states of the last block depend on, by their names in the
            encoder (see `tensors_behind`). None if they are not known: there are no "parts" then.
    """
    leaves = list(_leaves(tower))
    digest = hashlib.sha256()
    sample = []
    each = -(-_SAMPLED // max(len(leaves), 1))
    for leaf in leaves:
        assert leaf.weight is not None
        digest.update(leaf.name.encode())
        weight = _float32(leaf.weight)
        digest.update(weight.numpy().data)
        sample.append(_evenly(weight.flatten(), each))
    identity = {
        "width": tower.width,
        "depth": len(tower.blocks),
        "weights": digest.hexdigest(),
        "sample": _encoded(torch.cat(sample) if sample else torch.zeros(0)),
        **_dtypes(leaf.weight for leaf in leaves if leaf.weight is not None),
    }
    if behind is not None:
        hashed = {id(leaf.weight_at.whole) for leaf in leaves if leaf.weight_at is not None}
        others = {name: t for name, t in behind.items() if id(t) not in hashed}
        parts = _parts(others) | _ends(tower, behind)
        identity["parts"] = {
            part: _part_identity(tensors) for part, tensors in sorted(parts.items())
        }
    return identity


def _ends(tower: Tower, behind: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns what stands behind the last block, by its site: the norm, and a linear projection."""
    known = {id(tensor) for tensor in behind.values()}
    modules = {} if tower.norm is None else {tower.norm.name: tower.norm.module}
    if tower.embedding is not None and isinstance(tower.embedding.module, torch.nn.Linear):
        modules[tower.embedding.name] = tower.embedding.module
    ends: dict[str, dict[str, Tensor]] = {}
    for site, module in modules.items():
        tensors: dict[str, Tensor] = {
            name: p for name, p in module.named_parameters() if id(p) not in known
        }
        if tensors:
            ends[site] = tensors
    return ends


def _leaves(tower: Tower) -> Iterator[Leaf]:
    for block in tower.blocks:
        for sublayer in block.sublayers.values():
            for leaf in sorted(sublayer.leaves.values(), key=lambda leaf: leaf.role):
                if leaf.weight is not None:
                    yield leaf


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups tensors by the module that they belong to; a stack of blocks counts as one.

    Names begin below the innermost module that holds all tensors, so that a model with a head has
    the names of the one without.
    """
    paths = [name.split(".") for name in tensors]
    modules = {tuple(path[:-1]) for path in paths}
    columns = zip(*modules, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    parts: dict[str, dict[str, Tensor]] = {}
    for path, (name, tensor) in zip(paths, tensors.items(), strict=True):
        words = path[shared:]
        number = next((place for place, word in enumerate(words) if word.isdecimal()), 0)
        kept = words[: number + 2]
        if len(kept) == len(words) > 1 and kept[-1] in ("weight", "bias"):
            kept.pop()
        part = ".".join("*" if word.isdecimal() else word for word in kept)
        parts.setdefault(part, {})[name] = tensor
    return parts


def _part_identity(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the identity of a part, or None if some of it is trainable and so no fixed fact.

    It is a line of the hash, the dtypes, a sample, and the number of values in tables of positions.
    """
    if any(tensor.requires_grad for tensor in tensors.values()):
        return None
    digest, flat, positions = hashlib.sha256(), [], 0
    for name in sorted(tensors):
        values = _float32(tensors[name])
        if values.any():  # zero biases are as good as none
            digest.update(str(tuple(values.shape)).encode())
            digest.update(values.numpy().data)
            flat.append(values.flatten())
        if _POSITIONS.search(name):
            positions += values.numel()
    sample = _encoded(_evenly(torch.cat(flat) if flat else torch.zeros(0), _PART_SAMPLED))
    dtypes = ",".join(_names(tensors.values()))
    return f"{digest.hexdigest()[:16]} {dtypes} {sample or '-'} {positions}"


def _read_part(line: Any) -> dict[str, Any]:
    """Returns the fields of a line that `_part_identity` made; none if it is none."""
    if not isinstance(line, str) or len(words := line.split(" ")) != 4:
        return {}
    names = words[1].split(",")
    return {"hash": words[0], "dtypes": names, "sample": words[2], "positions": words[3]}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _evenly(values: Tensor, count: int) -> Tensor:
    return values[:: max(values.numel() // count, 1)][:count]


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def _decoded(text: Any) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())


def _names(tensors: Iterable[Tensor]) -> list[str]:
    """Returns the names of the dtypes of tensors, without "torch."."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def _dtypes(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Returns the dtype of tensors by name; "several" and their list if there is more than one."""
    names = _names(tensors)
    return {"dtype": names[0]} if len(names) == 1 else {"dtype": "several", "dtypes": names}


def _differ_by_rounding(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two identities are of the same values, some of them in half precision.

    Every value of the sample must be equal after it was rounded to the half precision.
    """
    held = [set(each.get("dtypes") or [str(each.get("dtype"))]) for each in (one, other)]
    halves = sorted((held[0] | held[1]) & set(_HALVES))
    if len(halves) != 1 or held[0] == held[1]:
        return False
    try:
        samples = [_decoded(each["sample"]) for each in (one, other)]
    except (KeyError, TypeError, ValueError):
        return False
    first, second = (sample.to(getattr(torch, halves[0])) for sample in samples)
    return bool(len(first)) and torch.equal(first, second)


def check_backbone(
    stored: Mapping[str, Any], present: Mapping[str, Any], *, allow_different_weights: bool
) -> None:
    """Checks that an adapter was made for an encoder like this one.

    The same weights in half precision are no other weights: what rounding changes is passed over.
    A `UserWarning` says what could not be compared: all but the blocks' weights, if an older
    version wrote the file, or tables of positions for another input size.

    Args:
        stored: the identity of the adapter's encoder, `{library, architecture, towers}`.
        present: the identity of this encoder, of the same form.
        allow_different_weights: compare width and depth alone.

    Raises:
        ValueError: a tower is missing, has another width or depth, or other weights.
    """
    what = f"this adapter was made for {stored.get('architecture')} ({stored.get('library')})"
    remedy = (
        "load the same pretrained weights, or pass allow_different_weights=True if the difference "
        "is meant"
    )
    unknown: list[str] = []
    for name, tower in stored.get("towers", {}).items():
        here = present["towers"].get(name)
        if here is None:
            raise ValueError(f"{what}, tower {name!r}, which {present['architecture']} lacks")
        for key in ("width", "depth"):
            if tower.get(key) != here[key]:
                raise ValueError(
                    f"{what} of {key} {tower.get(key)} in tower {name!r}; this "
                    f"{present['architecture']} has {here[key]}"
                )
        if allow_different_weights:
            continue
        if tower.get("weights") != here["weights"] and not _differ_by_rounding(tower, here):
            half = here.get("dtype") in _HALVES and "sample" not in tower
            raise ValueError(
                f"{what} with other weights in tower {name!r}; load the same pretrained weights"
                + (f" in float32 (here they are in {here['dtype']})" if half else "")
                + ", or pass allow_different_weights=True if the difference is meant"
            )
        if stored.get("library") != present["library"] or here.get("parts") is None:
            continue
        parts = tower.get("parts")
        if not isinstance(parts, Mapping):
            unknown.append(f"all of tower {name!r} but the weights of its blocks")
            continue
        differ, unclear = _compare(parts, here["parts"])
        if differ:
            raise ValueError(f"{what} with another {', '.join(differ)} in tower {name!r}; {remedy}")
        unknown += [f"{part} of tower {name!r}" for part in unclear]
    if unknown:
        warnings.warn(
            f"nothing shows whether the encoder has the values that {what.removeprefix('this ')} "
            f"with in {', '.join(unknown)}: save the adapter again once it gives what it gave",
            stacklevel=2,
        )


def _compare(stored: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the parts that differ, and those of which this is not known."""
    differ: list[str] = []
    unclear: list[str] = []
    for part in sorted({*stored, *here}):
        if part not in stored or part not in here:
            # A model without its library's projection, or with its norm elsewhere, has no end.
            unclear += [] if part.endswith((".norm", ".embedding")) else [part]
        # An adapter file does not hold what was trained beside the adapter.
        elif stored[part] is not None and here[part] is not None and stored[part] != here[part]:
            one, other = _read_part(stored[part]), _read_part(here[part])
            if one.get("hash") != other["hash"] and not _differ_by_rounding(one, other):
                resized = one.get("positions") != other["positions"]
                (unclear if resized else differ).append(part)
    return differ, unclear
