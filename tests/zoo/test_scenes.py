"""Facts about the drawn scenes."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from timing import ratio

from mmadapters.tasks.data.synthetic import scenes, shapes
from mmadapters.tasks.data.synthetic.scenes import (
    PRETRAINING,
    RETOLD,
    UNSEEN,
    describe,
    make_scene,
    render,
)

VOCABULARIES = pytest.mark.parametrize(
    "vocabulary", [PRETRAINING, UNSEEN], ids=["pretraining", "unseen"]
)


@VOCABULARIES
def test_a_seed_gives_the_same_scene_caption_and_pixels(vocabulary):
    first, second = make_scene(7, vocabulary), make_scene(7, vocabulary)
    assert first == second
    assert describe(first, vocabulary) == describe(second, vocabulary)
    assert torch.equal(render([first], vocabulary)[0], render([second], vocabulary)[0])


def test_a_scene_is_drawn_the_same_alone_and_in_a_batch():
    batch = [make_scene(seed, PRETRAINING) for seed in range(5)]
    images, masks = render(batch, PRETRAINING)
    alone, mask = render(batch[3:4], PRETRAINING)
    assert torch.equal(images[3:4], alone)
    assert torch.equal(masks[3:4], mask)


def test_seed_ranges_do_not_overlap():
    ranges = [
        scenes.TEST_SEEDS,
        scenes.VALIDATION_SEEDS,
        scenes.TASK_SEEDS,
        scenes.PRETRAINING_SEEDS,
    ]
    assert all(a.stop <= b.start for a, b in pairwise(ranges))


def test_unseen_shares_no_shape_colour_or_size_with_pretraining():
    for field in ("shapes", "colours", "sizes"):
        assert not set(getattr(PRETRAINING, field)) & set(getattr(UNSEEN, field))
    assert set(PRETRAINING.shapes) | set(UNSEEN.shapes) <= set(shapes.SHAPES)


def test_retold_tells_the_same_scenes_in_the_same_words_otherwise():
    told, retold = (
        [describe(make_scene(seed, vocabulary), vocabulary) for seed in range(2000)]
        for vocabulary in (PRETRAINING, RETOLD)
    )
    assert make_scene(7, PRETRAINING) == make_scene(7, RETOLD)
    assert {word for text in retold for word in text.split()} <= {
        word for text in told for word in text.split()
    }
    assert not set(told) & set(retold)


@VOCABULARIES
def test_captions_use_only_the_words_of_their_vocabulary(vocabulary):
    other = UNSEEN if vocabulary is PRETRAINING else PRETRAINING
    foreign = {*other.shapes, *other.colours, *other.sizes}
    for seed in range(300):
        words = describe(make_scene(seed, vocabulary), vocabulary).replace("-", " ").split()
        assert not foreign & set(words)


@VOCABULARIES
def test_masks_agree_with_the_description(vocabulary):
    size = 96
    drawn = [make_scene(seed, vocabulary) for seed in range(60)]
    _, masks = render(drawn, vocabulary, size=size)
    for scene, mask in zip(drawn, masks, strict=True):
        found = {vocabulary.shapes[i - 1] for i in mask.unique().tolist() if i}
        assert found == {thing.shape for thing in scene.things}
        for thing in scene.things:
            index = vocabulary.shapes.index(thing.shape) + 1
            top, left = thing.row * size // 3, thing.column * size // 3
            cell = mask[top : top + size // 3 + 1, left : left + size // 3 + 1]
            assert (cell == index).any(), f"no {thing.shape} in its cell of scene {scene.seed}"


def test_pixels_inside_a_thing_have_its_colour_and_edges_are_antialiased():
    scene = next(
        s
        for s in (make_scene(i, PRETRAINING) for i in range(500))
        if [t.shape for t in s.things] == ["circle"] and s.things[0].size == "large"
    )
    images, _ = render([scene], PRETRAINING)
    thing = scene.things[0]
    centre = images[0, :, int(thing.y * 64), int(thing.x * 64)].float() / 255
    assert torch.allclose(centre, torch.tensor(thing.rgb), atol=0.01)
    ground = torch.tensor(scene.background[0])
    whole = (ground - centre).abs().sum()
    share = (images[0].float() / 255 - centre[:, None, None]).abs().sum(dim=0) / whole
    assert ((share > 0.3) & (share < 0.7)).sum() > 8, "no pixels between thing and ground"


def test_relations_and_counts_in_captions_are_true():
    for seed in range(400):
        scene = make_scene(seed, PRETRAINING)
        caption = describe(scene, PRETRAINING)
        for group in scene.groups:
            assert scene.count(shape=group[0].shape, colour=group[0].colour) == len(group)
            if len(group) > 1:
                assert PRETRAINING.numbers[len(group) - 1] in caption
        if " left of " in caption:
            a, b = caption.split(" left of ")
            left = next(t for t in scene.things if f"{t.colour} {t.shape}" in a)
            right = next(t for t in scene.things if f"{t.colour} {t.shape}" in b)
            assert left.x < right.x


def test_captions_tell_scenes_apart():
    captions = {describe(make_scene(s, PRETRAINING), PRETRAINING) for s in scenes.TEST_SEEDS[:1000]}
    assert len(captions) > 990


def test_a_vocabulary_can_be_narrowed():
    only = replace(PRETRAINING, shapes=("star",), colours={"red": (0.9, 0.1, 0.1)})
    drawn = [make_scene(seed, only) for seed in range(20)]
    assert {(t.shape, t.colour) for s in drawn for t in s.things} == {("star", "red")}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shapes", ("circle", "sofa"), "sofa"),
        ("sizes", {"gigantic": 0.5}, "gigantic"),
        ("places", ("here", "there"), "9 cells"),
    ],
)
def test_a_vocabulary_that_cannot_be_drawn_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(PRETRAINING, **{field: value})


def test_scenes_are_drawn_fast():
    """500 a second of one core where a loop of a million steps takes 56 ms of it."""

    def draw():
        drawn = [make_scene(seed, PRETRAINING) for seed in range(500)]
        for scene in drawn:
            describe(scene, PRETRAINING)
        render(drawn, PRETRAINING)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loops = ratio(
            draw,
            lambda: sum(i * i for i in range(1_000_000)),
            repeats=2,
            clock=time.process_time,
        )
    finally:
        torch.set_num_threads(threads)
    assert loops < 1 / 0.056
