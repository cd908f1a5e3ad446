"""Computes what a policy sees of a row at an exit, short of running the rest of the model."""

from offramp.worker.probes.candidates.candidate_probe import CandidateProbe
from offramp.worker.probes.candidates.device_probe import DeviceProbe
from offramp.worker.probes.candidates.fused import FusedProbe
from offramp.worker.probes.factory import PROBES, ProbeFactory, make_probe
from offramp.worker.probes.probe import BlankProbe, Candidates, Decider, Probe, ProbeInputs, part_of
from offramp.worker.probes.readout import Readout
from offramp.worker.probes.sketch import Sketch, SketchProbe
from offramp.worker.probes.softmax import SoftmaxProbe, softmax_features
from offramp.worker.probes.state import StateProbe

__all__ = [
    "PROBES",
    "BlankProbe",
    "CandidateProbe",
    "Candidates",
    "Decider",
    "DeviceProbe",
    "FusedProbe",
    "Probe",
    "ProbeFactory",
    "ProbeInputs",
    "Readout",
    "Sketch",
    "SketchProbe",
    "SoftmaxProbe",
    "StateProbe",
    "make_probe",
    "part_of",
    "softmax_features",
]
