"""Structure to energy, by real calculators.

``energy_model("MoS2")`` answers descriptors with strain energies, with ``quantity="defect_energy"`` with the
formation energies of what is found at a site. Inside this room ASE's units hold: [A] and [eV].
"""

from stemloop.energetics.calculators import CALCULATORS, Result, Task
from stemloop.energetics.energies import ENERGY_MODELS, DefectEnergy, StrainEnergy, energy_model
from stemloop.energetics.jobs import Calculations
from stemloop.energetics.models import MATERIALS, Material
from stemloop.energetics.surface import Surface

__all__ = [
    "CALCULATORS",
    "ENERGY_MODELS",
    "MATERIALS",
    "Calculations",
    "DefectEnergy",
    "Material",
    "Result",
    "StrainEnergy",
    "Surface",
    "Task",
    "energy_model",
]
