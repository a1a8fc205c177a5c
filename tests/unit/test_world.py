"""Picturebook's drawings: complete, deterministic, and different where they should be."""

import random

import numpy as np
import pytest

from unpaint.picturebook.styles import PAINTED, draw
from unpaint.picturebook.world import (
    DRAWN,
    OBJECTS,
    PAINTABLE,
    RELATIONS,
    SETTINGS,
    STYLES,
    Scene,
    layout,
    random_scene,
)


def test_every_object_style_and_setting_can_be_drawn() -> None:
    assert set(DRAWN) == set(OBJECTS) and set(PAINTED) == set(STYLES)
    assert OBJECTS[:-1] == PAINTABLE and "umbrella" not in PAINTABLE
    for i, name in enumerate(OBJECTS):
        for k, style in enumerate(STYLES):
            picture = draw(Scene((name,), style, (*SETTINGS, "none")[(i + k) % 6], "alone", 100 * i + k))
            assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
            assert picture.std() > 5


def test_a_scene_has_one_picture_and_a_seed_another() -> None:
    scene = Scene(("cat",), "crayon", "beach", "alone", 7)
    assert (draw(scene) == draw(scene)).all()
    assert (draw(scene) != draw(Scene(("cat",), "crayon", "beach", "alone", 8))).any()


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_inside_the_picture_and_large_enough(name: str) -> None:
    for seed in range(20):
        empty = draw(Scene((), "flat", "none", "none", seed))
        with_it = draw(Scene((name,), "flat", "none", "alone", seed))
        where = np.argwhere(np.abs(with_it.astype(int) - np.median(empty, axis=(0, 1))).max(axis=2) > 15)
        height = where[:, 0].max() - where[:, 0].min()
        assert height > 20, "too small to recognise"
        assert len(where) > 150


def test_random_scenes_are_consistent_and_cover_the_world() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(3000)]
    for scene in scenes:
        expected = {0: {"none"}, 1: {"alone", "on a table"}, 2: {"next to"}}[len(scene.objects)]
        assert scene.relation in expected
        assert len(set(scene.objects)) == len(scene.objects)
    assert {name for scene in scenes for name in scene.objects} == set(PAINTABLE)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {scene.setting for scene in scenes} == {*SETTINGS, "none"}
    assert {scene.relation for scene in scenes} == {*RELATIONS, "none"}


def test_two_objects_stand_side_by_side() -> None:
    for seed in range(20):
        shapes = layout(Scene(("cat", "house"), "flat", "none", "next to", seed))
        centres = [
            np.mean([x for shape in shapes if shape.thing == thing for x, _ in shape.points]) for thing in (1, 2)
        ]
        assert centres[0] < 0.45 < 0.55 < centres[1]
