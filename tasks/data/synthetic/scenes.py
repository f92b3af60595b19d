"""Drawn scenes with captions, masks and an exact description: synthetic pictures for CLIP and VQA.

A scene is a function of a seed and a `Vocabulary` (its shapes, colours, sizes and phrasings), so a
task can ask for scenes with words and shapes that pretraining never saw. Things stand in the cells
of a 3×3 grid and never overlap, so everything that the caption names is visible.

Pretraining and all measurements keep to these seed ranges:

| range               | for                                                        |
|---------------------|------------------------------------------------------------|
| `TEST_SEEDS`        | reported figures only; nothing is ever trained on them      |
| `VALIDATION_SEEDS`  | early stopping and the choice of hyper-parameters           |
| `TASK_SEEDS`        | training of adapters and heads on downstream tasks          |
| `PRETRAINING_SEEDS` | pretraining of `nano/clip`                                  |

Shape legend: N scenes, T things in all of them, S image side in pixels, W window side in pixels.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .shapes import SHAPES

TEST_SEEDS = range(0, 100_000)
VALIDATION_SEEDS = range(100_000, 200_000)
TASK_SEEDS = range(200_000, 1_000_000)
PRETRAINING_SEEDS = range(1_000_000, 100_000_000)

RGB = tuple[float, float, float]
GRID = 3
LARGEST_RADIUS = 0.155  # as a share of the image side; leaves a margin inside a cell of 1/3


@dataclass(frozen=True)
class Vocabulary:
    """The things that may be drawn and the phrases that describe them.

    Every field can be replaced, to get scenes or captions that pretraining never saw.
    """

    shapes: tuple[str, ...]  # keys of SHAPES; a mask's class id is the index here plus one
    colours: Mapping[str, RGB]  # name -> red, green, blue in [0, 1]
    sizes: Mapping[str, float]  # name -> radius as a share of the image side
    numbers: tuple[str, ...] = ("one", "two", "three", "four")
    places: tuple[str, ...] = (  # the cells, row by row
        *("top left", "top", "top right"),
        *("left", "centre", "right"),
        *("bottom left", "bottom", "bottom right"),
    )
    one: tuple[str, ...] = ("a {size} {colour} {shape}", "one {size} {colour} {shape}")
    many: tuple[str, ...] = ("{count} {size} {colour} {shapes}",)
    placed: tuple[str, ...] = ("{thing} at the {place}", "{thing} towards the {place}")
    left_of: tuple[str, ...] = ("{a} to the left of {b}", "{a} left of {b}")
    right_of: tuple[str, ...] = ("{a} to the right of {b}", "{a} right of {b}")
    above: tuple[str, ...] = ("{a} above {b}", "{a} over {b}")
    below: tuple[str, ...] = ("{a} below {b}", "{a} under {b}")
    joint: str = " and "
    sentence: tuple[str, ...] = ("{body}", "a drawing of {body}", "a picture with {body}")

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.shapes) - set(SHAPES)):
            raise ValueError(f"no drawing for the shapes {unknown}; known: {sorted(SHAPES)}")
        if too_large := {k: r for k, r in self.sizes.items() if not 0 < r <= LARGEST_RADIUS}:
            raise ValueError(f"radii must lie in (0, {LARGEST_RADIUS}], got {too_large}")
        if len(self.places) != GRID * GRID:
            raise ValueError(f"places must name {GRID * GRID} cells, got {len(self.places)}")


@dataclass(frozen=True)
class Thing:
    """One drawn shape. Lengths are shares of the image side; x points right and y down."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    angle: float  # radians
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """Groups of equal things (same shape, colour and size) on a gradient between two greys."""

    seed: int
    groups: tuple[tuple[Thing, ...], ...]
    background: tuple[RGB, RGB]
    slope: float  # direction of the gradient, radians

    @property
    def things(self) -> list[Thing]:
        """The things of all groups."""
        return [thing for group in self.groups for thing in group]

    def count(self, *, shape: str | None = None, colour: str | None = None) -> int:
        """Returns the number of things with this shape and colour (None: any)."""
        return sum(
            shape in (None, thing.shape) and colour in (None, thing.colour) for thing in self.things
        )


def make_scene(seed: int, vocabulary: Vocabulary) -> Scene:
    """Makes the scene of a seed: one to three groups of one to three equal things each."""
    rng = random.Random(seed)
    cells = rng.sample(range(GRID * GRID), GRID * GRID)
    kinds: set[tuple[str, str]] = set()
    groups = []
    for _ in range(rng.choices((1, 2, 3), weights=(15, 50, 35))[0]):
        kind = (rng.choice(vocabulary.shapes), rng.choice(list(vocabulary.colours)))
        if kind in kinds:  # the same words would describe both groups
            continue
        kinds.add(kind)
        size = rng.choice(list(vocabulary.sizes))
        count = rng.choices((1, 2, 3), weights=(70, 20, 10))[0]
        groups.append(
            tuple(_make_thing(rng, vocabulary, *kind, size, cells.pop()) for _ in range(count))
        )
    colours = [thing.rgb for group in groups for thing in group]
    grey = max((_random_grey(rng) for _ in range(12)), key=lambda rgb: _contrast(rgb, colours))
    other = _jitter(rng, grey, 0.06)
    return Scene(seed, tuple(groups), (grey, other), rng.uniform(0, 2 * math.pi))


def describe(scene: Scene, vocabulary: Vocabulary, *, seed: int | None = None) -> str:
    """Returns a caption of the scene; `seed` chooses the phrasing, by default the scene's own."""
    rng = random.Random(scene.seed if seed is None else seed)
    groups = rng.sample(scene.groups, len(scene.groups))
    relation = _relation(groups, vocabulary) if rng.random() < 0.5 else None
    if relation is None:
        body = vocabulary.joint.join(_tell(rng, vocabulary, group) for group in groups)
    else:
        a, b = (_tell(rng, vocabulary, group, placed=False) for group in groups)
        body = rng.choice(relation).format(a=a, b=b)
    return rng.choice(vocabulary.sentence).format(body=body)


def wordings(scene: Scene, vocabulary: Vocabulary, numbers: Iterable[int], *, of: int) -> list[str]:
    """Returns the captions with these numbers, each below `of`; no two scenes share a seed."""
    return [describe(scene, vocabulary, seed=of * scene.seed + number) for number in numbers]


def render(
    scenes: Sequence[Scene],
    vocabulary: Vocabulary,
    *,
    size: int = 64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draws the scenes with antialiased edges.

    Returns:
        images: (N, 3, S, S) uint8.
        masks: (N, S, S) uint8, 0 for background, else the shape's index in the vocabulary + 1.
    """
    background = _draw_backgrounds(scenes, size, device)
    paint = torch.zeros(4, len(scenes) * size * size, device=device)  # alpha, alpha * rgb
    masks = torch.zeros(len(scenes) * size * size, dtype=torch.uint8, device=device)
    for index, shape in enumerate(vocabulary.shapes):
        drawn = [(n, t) for n, scene in enumerate(scenes) for t in scene.things if t.shape == shape]
        if not drawn:
            continue
        rows = [[n, t.x * size, t.y * size, t.radius * size, t.angle, *t.rgb] for n, t in drawn]
        table = torch.tensor(rows, dtype=torch.float32).to(device)  # (T, 8)
        pixels, alpha = _coverage(SHAPES[shape], table[:, :5], size)
        rgba = torch.cat([torch.ones_like(table[:, :1]), table[:, 5:]], dim=1)  # (T, 4)
        values = alpha[None] * rgba.T[:, :, None, None]  # (4, T, W, W)
        paint.index_add_(1, pixels.flatten(), values.flatten(1))
        masks[pixels[alpha > 0.5]] = index + 1
    paint = paint.view(4, len(scenes), size, size).transpose(0, 1)  # (N, 4, S, S)
    images = background * (1 - paint[:, :1]) + paint[:, 1:]
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return images, masks.view(len(scenes), size, size)


def _make_thing(
    rng: random.Random, vocabulary: Vocabulary, shape: str, colour: str, size: str, cell: int
) -> Thing:
    row, column = divmod(cell, GRID)
    radius = min(vocabulary.sizes[size] * rng.uniform(0.92, 1.08), LARGEST_RADIUS)
    slack = 0.5 / GRID - radius
    return Thing(
        shape=shape,
        colour=colour,
        size=size,
        row=row,
        column=column,
        x=(column + 0.5) / GRID + rng.uniform(-slack, slack),
        y=(row + 0.5) / GRID + rng.uniform(-slack, slack),
        radius=radius,
        angle=rng.uniform(-0.2, 0.2),  # more would turn a square into a diamond
        rgb=_jitter(rng, vocabulary.colours[colour], 0.05),
    )


def _tell(
    rng: random.Random, vocabulary: Vocabulary, group: tuple[Thing, ...], *, placed: bool = True
) -> str:
    first = group[0]
    phrase = rng.choice(vocabulary.one if len(group) == 1 else vocabulary.many).format(
        size=first.size,
        colour=first.colour,
        shape=first.shape,
        shapes=plural(first.shape),
        count=vocabulary.numbers[len(group) - 1],
    )
    if len(group) > 1 or not placed:
        return phrase
    place = vocabulary.places[first.row * GRID + first.column]
    return rng.choice(vocabulary.placed).format(thing=phrase, place=place)


def _relation(groups: list[tuple[Thing, ...]], vocabulary: Vocabulary) -> tuple[str, ...] | None:
    """Returns the phrasings of the relation between two single things, or None."""
    if [len(group) for group in groups] != [1, 1]:
        return None
    (a,), (b,) = groups
    if abs(a.column - b.column) >= abs(a.row - b.row):
        return vocabulary.left_of if a.column < b.column else vocabulary.right_of
    return vocabulary.above if a.row < b.row else vocabulary.below


def plural(shape: str) -> str:
    """Returns the English plural of a shape's name: crosses, not crosss."""
    return shape + ("es" if shape.endswith(("s", "x", "ch", "sh")) else "s")


def _jitter(rng: random.Random, rgb: RGB, spread: float) -> RGB:
    red, green, blue = (min(max(v + rng.uniform(-spread, spread), 0.0), 1.0) for v in rgb)
    return red, green, blue


def _random_grey(rng: random.Random) -> RGB:
    level = rng.uniform(0.08, 0.92)
    return _jitter(rng, (level, level, level), 0.06)


def _contrast(rgb: RGB, others: Sequence[RGB]) -> float:
    """Returns the smallest distance to the others, at most 0.4: more contrast is not needed."""
    return min(0.4, *(math.dist(rgb, other) for other in others))


def _draw_backgrounds(scenes: Sequence[Scene], size: int, device: torch.device | str) -> Tensor:
    """Returns (N, 3, S, S) in [0, 1]: a linear gradient between the scene's two greys."""
    rows = [
        [*s.background[0], *s.background[1], math.cos(s.slope), math.sin(s.slope)] for s in scenes
    ]
    table = torch.tensor(rows, dtype=torch.float32).to(device)[:, :, None, None]  # (N, 8, 1, 1)
    ramp = (torch.arange(size, device=device) + 0.5) / size - 0.5
    along = 0.5 + 0.7 * (table[:, 6:7] * ramp + table[:, 7:8] * ramp[:, None])  # (N, 1, S, S)
    return torch.lerp(table[:, :3], table[:, 3:6], along.clamp(0, 1))


def _coverage(
    distance: Callable[[Tensor, Tensor], Tensor], table: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Returns the share of each pixel that a thing covers, in a window around the thing.

    Args:
        distance: signed distance of a shape of radius 1, negative inside.
        table: (T, 5) scene index, x, y, radius in pixels, angle.

    Returns:
        pixels: (T, W, W) indices into the flattened (N, S, S) canvas.
        alpha: (T, W, W) in [0, 1].
    """
    scene, x, y, radius, angle = (column[:, None, None] for column in table.T)
    reach = math.ceil(LARGEST_RADIUS * size) + 1
    steps = torch.arange(-reach, reach + 1, device=table.device, dtype=torch.float32)
    column, row = x.floor() + steps, y.floor() + steps[:, None]
    u, v = column + 0.5 - x, row + 0.5 - y  # pixel centres, from the thing's centre
    cos, sin = angle.cos() / radius, angle.sin() / radius
    alpha = 0.5 - distance(cos * u + sin * v, cos * v - sin * u) * radius
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    row, column = row.clamp(0, size - 1), column.clamp(0, size - 1)
    pixels = (scene.long() * size + row.long()) * size + column.long()
    return pixels, alpha.clamp(0, 1) * inside


PRETRAINING = Vocabulary(
    shapes=(
        *("circle", "square", "triangle", "star", "cross"),
        *("ring", "diamond", "hexagon", "heart", "crescent"),
    ),
    colours={
        "red": (0.86, 0.12, 0.12),
        "green": (0.12, 0.62, 0.20),
        "blue": (0.12, 0.28, 0.86),
        "yellow": (0.96, 0.88, 0.14),
        "orange": (0.97, 0.52, 0.08),
        "purple": (0.52, 0.16, 0.66),
        "pink": (0.97, 0.60, 0.76),
        "brown": (0.48, 0.28, 0.12),
        "black": (0.05, 0.05, 0.05),
        "white": (0.96, 0.96, 0.96),
    },
    sizes={"small": 0.07, "medium": 0.105, "large": 0.145},
)

# The things and words of PRETRAINING in the style of a telegram, which an adapter must learn.
RETOLD = replace(
    PRETRAINING,
    one=("{shape} {colour} {size}",),
    many=("{shapes} {colour} {size} {count}",),
    placed=("{place} {thing}",),
    left_of=("right of {a} {b}",),
    right_of=("left of {a} {b}",),
    above=("under {a} {b}",),
    below=("over {a} {b}",),
    joint=" with ",
    sentence=("{body}", "picture {body}"),
)

# Shares no shape, colour or size with PRETRAINING: an adapter must learn all of them. Its words
# take more tokens of nano/clip, so its phrasings are short enough for nano/clip's context.
UNSEEN = Vocabulary(
    shapes=("pentagon", "dome", "drop", "trapezoid", "arrow", "arch"),
    colours={
        "teal": (0.05, 0.55, 0.55),
        "lime": (0.65, 0.95, 0.15),
        "gold": (0.80, 0.65, 0.15),
        "olive": (0.45, 0.48, 0.10),
        "cyan": (0.20, 0.88, 0.95),
        "maroon": (0.42, 0.04, 0.12),
    },
    sizes={"tiny": 0.055, "fair": 0.1, "big": 0.15},
    places=(
        *("upper left", "upper side", "upper right"),
        *("left side", "middle", "right side"),
        *("lower left", "lower side", "lower right"),
    ),
    one=("{size} {colour} {shape}",),
    many=("{count} {size} {colour} {shapes}",),
    placed=("{thing}, {place}", "{place}: {thing}"),
    left_of=("{a} with {b} on its right",),
    right_of=("{a} with {b} on its left",),
    above=("{a} with {b} beneath",),
    below=("{a} with {b} on top",),
    joint="; ",
    sentence=("{body}", "see {body}"),
)
