"""The calculators: what is asked of one (:class:`Task`), what it answers (:class:`Result`), and who can answer.

A calculator here is an engine behind ASE's interface with a *ladder*: settings that are tried one after the other when
the self-consistent field does not converge. The rungs change only how the solution is sought (mixing, first guess,
number of iterations), never what it is a solution of, so every rung that converges gives the same energy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.optimize import BFGS
from numpy.typing import NDArray

from stemloop.core.errors import CalculationError, MissingExtra
from stemloop.core.record import content_hash
from stemloop.core.registry import Registry


@dataclass(frozen=True)
class Calculator:
    """An engine that turns atoms into energies.

    package : the distribution that it lives in; its version is part of every result's key.
    settings : what defines its answers. ladder : for each rung, a function that makes a fresh ASE calculator.
    noise_eV : 1-sigma numerical noise of an energy a cell; noise_gradient_eV : of dE/d(strain).
    extra : the optional part of stemloop that installs it, if it is not always there.
    """

    name: str
    package: str
    settings: dict[str, Any]
    ladder: tuple[Callable[[], Any], ...]
    noise_eV: float
    noise_gradient_eV: float
    extra: str | None = None

    def require(self) -> None:
        """Raise :class:`~stemloop.core.errors.MissingExtra` when the engine is not installed."""
        if importlib.util.find_spec(self.package) is None:
            raise MissingExtra(f"{self.name} is not installed: pip install 'stemloop[{self.extra or 'ml'}]'.")

    @property
    def identity(self) -> dict[str, Any]:
        """Name, version and settings: what a stored result depends on besides the atoms."""
        self.require()
        return {"name": self.name, "version": importlib.metadata.version(self.package), **self.settings}


#: Every calculator by name.
CALCULATORS: Registry[Calculator] = Registry("calculator")


def _gfn1(**search: Any) -> Callable[[], Any]:
    def make() -> Any:
        from tblite.ase import TBLite

        return TBLite(method="GFN1-xTB", accuracy=1.0, electronic_temperature=300.0, verbosity=0, **search)

    return make


def _chgnet() -> Any:
    import torch
    from chgnet.model.dynamics import CHGNetCalculator

    torch.set_num_threads(1)
    return CHGNetCalculator(use_device="cpu")


def _emt() -> Any:
    from ase.calculators.emt import EMT

    return EMT()


CALCULATORS.register("GFN1-xTB")(
    Calculator(
        "GFN1-xTB",
        "tblite",
        {"accuracy": 1.0, "electronic_temperature_K": 300.0, "k_points": "Gamma"},
        (
            _gfn1(),
            _gfn1(mixer_damping=0.2, max_iterations=500),
            _gfn1(mixer_damping=0.05, max_iterations=1500, guess="eeq"),
        ),
        noise_eV=2e-6,
        noise_gradient_eV=2e-3,
    )
)
CALCULATORS.register("CHGNet")(
    Calculator(
        "CHGNet", "chgnet", {"weights": "default"}, (_chgnet,), noise_eV=2e-4, noise_gradient_eV=3e-2, extra="ml"
    )
)
CALCULATORS.register("EMT")(Calculator("EMT", "ase", {}, (_emt,), noise_eV=1e-9, noise_gradient_eV=1e-6))


@dataclass(frozen=True)
class Task:
    """One calculation: atoms, the calculator's name, and how many relaxation steps with the cell held (0: none).

    positions [A], cell [A] and numbers are plain lists, so that a task can be sent and hashed as it is.
    """

    calculator: str
    numbers: list[int]
    positions: list[list[float]]
    cell: list[list[float]]
    pbc: list[bool]
    relax_steps: int = 0
    fmax: float = 0.03

    @classmethod
    def of(cls, atoms: Atoms, calculator: str, relax_steps: int = 0, fmax: float = 0.03) -> Task:
        """The task of ``atoms``; coordinates are rounded to 1e-8 A so that a key does not hang on the last bits."""

        def plain(array: Any) -> list[list[float]]:
            return (np.round(np.asarray(array, float), 8) + 0.0).tolist()

        pbc = [bool(p) for p in atoms.pbc]
        return cls(
            calculator,
            [int(z) for z in atoms.numbers],
            plain(atoms.positions),
            plain(atoms.cell.array),
            pbc,
            relax_steps,
            fmax if relax_steps else 0.0,
        )

    @property
    def atoms(self) -> Atoms:
        """The atoms, without a calculator."""
        return Atoms(numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc)

    @property
    def key(self) -> str:
        """SHA-256 of all that the result depends on."""
        return content_hash({"engine": CALCULATORS[self.calculator].identity, **asdict(self)})


@dataclass(frozen=True)
class Result:
    """What a calculator answered: ``energy`` [eV] of the whole cell, ``forces`` (n, 3) [eV/A], ``stress`` (3, 3)
    [eV/A^3] (ASE's sign: (1/V) dE/d(strain); zeros without a periodic cell), the final ``positions`` (n, 3) [A],
    the ``rung`` of the ladder that converged and the ``seconds`` of CPU it took."""

    energy: float
    forces: NDArray[np.float64]
    stress: NDArray[np.float64]
    positions: NDArray[np.float64]
    rung: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Result:
        """Inverse of :meth:`to_dict`; a wrong shape or a number that is not finite raises ValueError or KeyError."""
        positions = np.asarray(plain["positions"], float).reshape(-1, 3)
        forces = np.asarray(plain["forces"], float).reshape(positions.shape)
        stress = np.asarray(plain["stress"], float).reshape(3, 3)
        energy = float(plain["energy"])
        if not (np.isfinite(energy) and np.isfinite(forces).all() and np.isfinite(stress).all()):
            raise ValueError("a stored result is not finite")
        return cls(energy, forces, stress, positions, int(plain["rung"]), float(plain["seconds"]))


def calculate(task: Task) -> Result:
    """Carry out ``task`` in this process, one rung after the other.

    Raises
    ------
    CalculationError : no rung converged; the message names the calculator, the atoms and the last reason.
    """
    engine = CALCULATORS[task.calculator]
    engine.require()
    started, reason = time.process_time(), ""
    for rung, make in enumerate(engine.ladder):
        atoms = task.atoms
        try:
            atoms.calc = make()
            if task.relax_steps:
                BFGS(atoms, logfile=None).run(fmax=task.fmax, steps=task.relax_steps)
            energy, forces = float(atoms.get_potential_energy()), atoms.get_forces()
            stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else np.zeros((3, 3))
            found = {"energy": energy, "forces": forces, "stress": stress, "positions": atoms.positions}
            return Result.from_dict({**found, "rung": rung, "seconds": time.process_time() - started})
        except Exception as error:  # engines raise whatever they like; the last reason is told below
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    raise CalculationError(
        f"{engine.name} did not converge on {task.atoms.get_chemical_formula()} in {len(engine.ladder)} attempts: "
        f"{reason} Use a smaller strain or another calculator ({', '.join(CALCULATORS)})."
    )
