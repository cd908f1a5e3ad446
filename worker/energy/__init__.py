"""Reads how many joules some work takes, and says how that figure was come by.

``open_meter`` picks the best source that is really there: a GPU's counter (NVML), the processor's
(RAPL), or a model with named coefficients.
"""

from offramp.worker.energy.meter import EnergySource, Meter, Span, open_meter
from offramp.worker.energy.modelled import COEFFICIENTS, Coefficient, EnergyModel

__all__ = [
    "COEFFICIENTS",
    "Coefficient",
    "EnergyModel",
    "EnergySource",
    "Meter",
    "Span",
    "open_meter",
]
