"""Finds the problems of a data set before anything is trained on it.

`examine` reads all of it. `look` reads a sample in about two seconds, at the start of training.
"""

from .examination import examine
from .printing import print_findings, print_report
from .results import DataReport, Group, RowPlace, SplitReport, Verdict
from .sampling import look

__all__ = [
    "DataReport",
    "Group",
    "RowPlace",
    "SplitReport",
    "Verdict",
    "examine",
    "look",
    "print_findings",
    "print_report",
]
