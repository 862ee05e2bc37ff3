"""Energy models: descriptors in, energies with deviations out.

Propagation. A measured strain ``s = t + n`` is the true strain with Gaussian noise of covariance C. To second order,
``E(s) = E(t) + g.n + n.H n / 2`` has mean ``E(t) + tr(H C)/2`` and variance ``g.C g + tr(H C H C)/2``. Noise therefore
*inflates* the energy of a convex surface, and the models answer ``E(s) - tr(H C)/2``, whose mean is E(t) to second
order. At small strain that may be below zero, as it must be if its mean is to be right. Both moments are those of a
quadratic form in normal variables (A. M. Mathai and S. B. Provost, *Quadratic Forms in Random Variables* (1992)).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stemloop.core.errors import InputError
from stemloop.core.protocols import EnergyModel
from stemloop.core.registry import Registry
from stemloop.core.structure import PHASES, SITES, Descriptors, Energies
from stemloop.energetics.cache import Cache
from stemloop.energetics.calculators import CALCULATORS, Task
from stemloop.energetics.jobs import Calculations
from stemloop.energetics.models import (
    MATERIALS,
    RESIDUAL_EV,
    Equilibrium,
    Material,
    defect_cell,
    deformed,
    equilibrium,
    reference_task,
    strain_gradient,
)
from stemloop.energetics.surface import Answer, Array, Surface

#: Relaxation of internal coordinates at fixed strain, and of defects: most steps, largest force left [eV/A].
INTERNAL_STEPS, INTERNAL_FMAX = 60, 0.003
DEFECT_STEPS, DEFECT_FMAX = 30, 0.05
#: No class probability is believed to be nearer to 0 or 1 than this.
PROBABILITY_FLOOR = 1e-3


def propagate(answer: Answer, covariance: Array) -> tuple[Array, Array]:
    """Bias-corrected energies (n,) and deviations (n,) [eV] from a surface's ``answer`` at measured strains whose
    noise has ``covariance`` (n, 3, 3): see the module's formulae. The surface's own deviation is added in quadrature.
    """
    bent = answer.hessian @ covariance
    value = answer.energy - 0.5 * np.einsum("nii->n", bent)
    first = np.einsum("ni,nij,nj->n", answer.gradient, covariance, answer.gradient)
    second = 0.5 * np.einsum("nij,nji->n", bent, bent)
    return value, np.sqrt(first + second + answer.sigma**2)


def expect(answer: Answer, covariance: Array) -> tuple[Array, Array]:
    """Mean (n,) and deviation (n,) [eV] of the energy where the strain is believed to be normal about the strains of
    ``answer`` with ``covariance`` (n, 3, 3): ``E + tr(H C)/2`` and the variance of :func:`propagate`."""
    value, sigma = propagate(answer, covariance)
    return value + np.einsum("nij,nji->n", answer.hessian, covariance), sigma


class StrainEnergy:
    """Strain energy [eV a primitive cell] of a material, from a calculator's energy surface.

    By default the atoms follow the strain affinely ("clamped ions", plane strain: the third axis stays); with
    ``relax_internal`` they relax in the strained cell. A descriptor that may be vacuum, with probability q, has the
    energy ``(1 - q) E`` and the variance of that mixture; where q > 1/2 its strain means nothing and counts as zero.
    A strain beyond the surface's limit is drawn back to it and asks for no calculation; its deviation is the surface's
    own out there and what the gradient makes of the difference, and ``counts["beyond_limit"]`` grows by one.

    Elsewhere the surface is refined to 0.3 meV or a tenth of the propagated deviation, whichever is larger.

    ``surface`` is the :class:`~stemloop.energetics.surface.Surface` behind it; score a map on ``surface.fork()``.
    """

    unit = "eV/cell"

    def __init__(
        self,
        material: Material,
        calculator: str,
        repeats: int,
        calculations: Calculations,
        relax_internal: bool = False,
        rotation_rad: float = 0.0,
    ) -> None:
        engine = CALCULATORS[calculator]
        self.material, self.calculator, self.repeats = material, calculator, repeats
        self.relax_internal = relax_internal
        self.calculations = calculations
        self.beyond_limit = 0
        self._equilibrium: Equilibrium | None = None
        noise = max(engine.noise_gradient_eV, 1e-2) if relax_internal else engine.noise_gradient_eV
        self.surface = Surface(
            self.calculate, material.symmetry, engine.noise_eV, noise, rotation_rad, residual_eV=RESIDUAL_EV
        )

    @property
    def equilibrium(self) -> Equilibrium:
        """The calculator's own lattice, found when it is first needed."""
        if self._equilibrium is None:
            self._equilibrium = equilibrium(self.material, self.calculator, self.repeats, self.calculations.run)
        return self._equilibrium

    def calculate(self, strain: Array) -> tuple[Array, Array]:
        """Energies (k,) [eV a cell] above the equilibrium and gradients (k, 3) [eV] straight from the calculator, at
        strains (k, 3) as (e_xx, e_yy, e_xy) in crystal axes (a along +x)."""
        reference = self.equilibrium
        steps = INTERNAL_STEPS if self.relax_internal else 0
        cells = [deformed(reference.supercell, e) for e in strain]
        results = self.calculations.run([Task.of(c, self.calculator, steps, INTERNAL_FMAX) for c in cells])
        n = self.repeats**2
        energies = np.array([result.energy for result in results]) / n - reference.energy
        gradients = [strain_gradient(r, c.cell.array, e) for r, c, e in zip(results, cells, strain, strict=True)]
        return energies, np.array(gradients) / n

    @property
    def counts(self) -> dict[str, float]:
        """Calculator calls and their CPU seconds, cache hits, nodes of the surface, strains beyond its limit."""
        done = self.calculations
        return {
            "calculator_calls": done.calls,
            "calculator_cpu_s": done.cpu_s,
            "cache_hits": done.hits,
            "nodes": len(self.surface.nodes),
            "beyond_limit": self.beyond_limit,
        }

    def __call__(self, descriptors: Descriptors) -> Energies:
        if not len(descriptors):
            return Energies(np.zeros(0), np.zeros(0), np.zeros((0, 3)))
        present = 1.0 - descriptors.phase[:, PHASES.index("vacuum")]
        measured = np.where(present[:, None] < 0.5, 0.0, descriptors.strain)
        if not np.isfinite(measured).all():
            raise InputError("a descriptor's strain is not a finite number; leave such points out.")
        covariance = descriptors.strain_covariance
        strain = self.surface.within_limit(measured)
        beyond = np.any(strain != measured, axis=1)
        self.beyond_limit += int(beyond.sum())
        self.surface.refine(np.zeros((1, 3)), np.ones(1))  # the first nodes, without which nothing can be propagated
        _, sigma = propagate(self.surface.answer(strain), covariance)
        self.surface.refine(strain[~beyond], np.maximum(3e-4, 0.1 * sigma)[~beyond])
        answer = self.surface.answer(strain)
        value, sigma = propagate(answer, covariance)
        sigma = sigma + np.abs(np.sum(answer.gradient * (measured - strain), axis=1))
        variance = present * sigma**2 + present * (1 - present) * value**2
        return Energies(present * value, np.sqrt(variance), present[:, None] * answer.gradient)


class DefectEnergy:
    """Formation energy [eV] of what is at the site under the probe.

    ``value = sum_c p(c) E_f(c)`` over the classes of :data:`~stemloop.core.structure.SITES` (and vacuum, 0), and the
    variance is that of one site drawn from these classes, ``sum_c p(c) E_f(c)^2 - value^2``, with each p kept
    ``PROBABILITY_FLOOR`` away from 0 and 1. ``E_f = E(defective) - E(perfect) + mu(taken) - mu(put)``, all from the
    same calculator: neutral cells, no spin, relaxed for at most ``DEFECT_STEPS`` steps in the perfect cell's lattice;
    chemical potentials from :func:`~stemloop.energetics.models.reference_task`, and for a material of one element
    from the material itself. The calculator's own error is not in sigma. For GFN1-xTB it is large where sulphur is
    weighed (it binds the S8 ring by 4.5 eV an atom): a sulphur vacancy in MoS2 costs 0.4 eV where PBE says 2.7 eV, so
    take ``calculator="CHGNet"`` (the extra ``ml``) for that; a vacancy in graphene, 7.8 eV, is as in PBE (7.3 to 8.2).
    """

    unit = "eV"

    def __init__(self, material: Material, calculator: str, repeats: int, calculations: Calculations) -> None:
        if not material.defects:
            able = ", ".join(name for name in MATERIALS if MATERIALS[name].defects)
            raise InputError(f"{material.name} has no defects to calculate; materials that have: {able}.")
        self.material, self.calculator, self.repeats = material, calculator, repeats
        self.calculations = calculations
        self._formation: dict[str, float] | None = None

    @property
    def formation_eV(self) -> dict[str, float]:
        """Formation energy [eV] of each class of site, calculated when first needed; pristine is 0."""
        if self._formation is None:
            self._formation = self._calculate()
        return self._formation

    def _calculate(self) -> dict[str, float]:
        reference = equilibrium(self.material, self.calculator, self.repeats, self.calculations.run)
        perfect = reference.supercell
        energy = reference.energy * self.repeats**2
        elements = {e for d in self.material.defects.values() for e in (d.element, d.by) if e is not None}
        own = set(perfect.symbols) if len(set(perfect.symbols)) == 1 else set()
        references = {e: reference_task(e, self.calculator) for e in sorted(elements - own)}
        cells = {site: defect_cell(perfect, defect) for site, defect in self.material.defects.items()}
        tasks = [Task.of(c, self.calculator, DEFECT_STEPS, DEFECT_FMAX) for c in cells.values()]
        results = self.calculations.run([*tasks, *references.values()])
        potential = dict.fromkeys(own, energy / len(perfect))
        for element, result in zip(references, results[len(tasks) :], strict=True):
            potential[element] = result.energy / len(result.positions)
        formation = dict.fromkeys(SITES, 0.0)
        for (site, defect), result in zip(self.material.defects.items(), results, strict=False):
            put = potential[defect.by] if defect.by is not None else 0.0
            formation[site] = result.energy - energy + potential[defect.element] - put
        return formation

    @property
    def counts(self) -> dict[str, float]:
        """Calculator calls and their CPU seconds, and cache hits."""
        done = self.calculations
        return {"calculator_calls": done.calls, "calculator_cpu_s": done.cpu_s, "cache_hits": done.hits}

    def __call__(self, descriptors: Descriptors) -> Energies:
        formation = np.array([*(self.formation_eV[site] for site in SITES), 0.0])
        vacuum = descriptors.phase[:, PHASES.index("vacuum")]
        classes = np.column_stack([descriptors.site * (1 - vacuum)[:, None], vacuum])
        value = classes @ formation
        floored = np.clip(classes, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        floored /= floored.sum(axis=1, keepdims=True)
        variance = floored @ formation**2 - (floored @ formation) ** 2
        return Energies(value, np.sqrt(np.maximum(variance, 0.0)), np.zeros((len(descriptors), 3)))


#: What an energy model can be asked for, by the recipe's name.
ENERGY_MODELS: Registry[Any] = Registry("energy model")
ENERGY_MODELS.register("strain_energy")(StrainEnergy)
ENERGY_MODELS.register("defect_energy")(DefectEnergy)


def energy_model(
    material: str,
    calculator: str | None = None,
    supercell: int | None = None,
    cache: Cache | str | Path | None = None,
    workers: int = 2,
    *,
    quantity: str = "strain_energy",
    timeout_s: float = 900.0,
    **choices: Any,
) -> EnergyModel:
    """The energy model of ``material`` (``MoS2``, ``graphene``, ``SrTiO3``) for ``quantity``.

    Parameters
    ----------
    calculator : a name in :data:`CALCULATORS`; by default the material's own (GFN1-xTB, for SrTiO3 CHGNet).
    supercell : repeats (n, n) of the primitive cell; by default the size that the convergence table calls for.
    cache : where results are kept (see :class:`~stemloop.energetics.cache.Cache`). workers : processes at once; 0
        calculates in this process. timeout_s : the longest single calculation [s].
    quantity : ``strain_energy`` [eV/cell] or ``defect_energy`` [eV].
    choices : of :class:`StrainEnergy`: ``relax_internal``, ``rotation_rad`` (angle of the crystal's a axis from +x
        towards +y; matters for SrTiO3, and beyond second order in strain for hexagonal sheets).

    Nothing is calculated before the model is first called.

    Raises
    ------
    UnknownName : material, calculator or quantity. MissingExtra : the calculator is not installed.
    """
    known = MATERIALS[material]
    model = ENERGY_MODELS[quantity]
    name = calculator if calculator is not None else known.calculator
    CALCULATORS[name].require()
    if supercell is None:
        supercell = known.supercell.get(name, 1) if quantity == "strain_energy" else known.defect_supercell
    if supercell < 1:
        raise InputError(f"supercell must be at least 1; got {supercell}.")
    kept = cache if isinstance(cache, Cache) else Cache(cache)
    return model(known, name, supercell, Calculations(kept, workers, timeout_s), **choices)


__all__ = ["ENERGY_MODELS", "DefectEnergy", "StrainEnergy", "energy_model", "expect", "propagate"]
