"""Networks: named stages of units, as an ANN teacher and as a spiking student."""

from lasnn.network.staged import Staged, StagedView, build
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import Add, NormActivate, NormSpike, Product, ann_units, snn_units
from lasnn.network.whole import HookedView

__all__ = [
    "Add",
    "HookedView",
    "NormActivate",
    "NormSpike",
    "Product",
    "Staged",
    "StagedView",
    "Student",
    "Teacher",
    "ann_units",
    "build",
    "snn_units",
]
