"""A task without a capability has the answers of the capability's class."""

from __future__ import annotations

from application.training.tints import Pictures, TintTask, job

from mmadapters.tasks.core.capabilities import (
    BatchGrouping,
    CacheableInputs,
    Calibration,
    DataChecks,
    ReportPictures,
    capability,
)
from mmadapters.tasks.core.errors import Problem
from mmadapters.tasks.core.rows import Rows


class SortedTints(TintTask, BatchGrouping):
    def lengths(self, rows: Rows) -> list[int]:
        return list(range(len(rows)))


def test_a_task_that_has_a_capability_is_asked_itself() -> None:
    task = SortedTints(job())
    grouping = capability(task, BatchGrouping)
    assert grouping is task
    assert grouping.lengths(Pictures(3)) == [0, 1, 2]
    assert grouping.groups(Pictures(3)) is None


def test_a_task_without_capabilities_groups_checks_and_calibrates_nothing() -> None:
    task, rows = TintTask(job()), Pictures(3)
    assert capability(task, BatchGrouping).lengths(rows) is None
    assert capability(task, Calibration).choose(rows) is rows
    problems: list[Problem] = capability(task, DataChecks).check(rows)
    assert problems == []
    assert not isinstance(task, ReportPictures)


def test_inputs_of_a_task_that_says_nothing_of_them_are_pictures_and_recordings() -> None:
    cacheable = capability(TintTask(job()), CacheableInputs)
    assert cacheable.cacheable_inputs == {"pixels": "vision", "wave": "audio"}
    assert cacheable.randomness(Pictures(1)) is not None
    assert cacheable.one_pass(Pictures(1)) is None
    assert len(cacheable.tower_rows("vision", {})) == 1
