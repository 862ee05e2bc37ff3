"""Recipes: what is measured, what it means, and for which places it is wanted.

A recipe prepares the field (overview, candidates, features), says how to measure a set of candidates, and turns the
frames into values with deviations. The loop knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.campaign.grid import Grid, nyquist_grid, recorded_grid
from stemloop.campaign.recording import recording
from stemloop.campaign.settings import Settings
from stemloop.campaign.site import Site
from stemloop.campaign.stopwatch import Stopwatch
from stemloop.core.errors import InputError, OutcomeUnknown
from stemloop.core.instruction import Diffraction, Image, Instruction, Optics, Spectrum
from stemloop.core.plain import jsonable
from stemloop.core.protocols import Belief, InstrumentInfo
from stemloop.core.registry import Registry
from stemloop.core.structure import Columns, Descriptors
from stemloop.decide import gp
from stemloop.decide.derived import Derived, fit_derived
from stemloop.decide.gp import LogNormal, Prior
from stemloop.describe.atoms import find_columns
from stemloop.describe.lattice import orientation
from stemloop.describe.patterns import PatternDescriber
from stemloop.energetics.energies import energy_model, expect
from stemloop.reduce.spectra import SCALARIZERS

RECIPES: Registry[type[Recipe]] = Registry("recipe")


@dataclass(frozen=True)
class Beam:
    """How the beam is set: for the overview (semiangle, and pixel of its image) and for the measurement of one point
    (semiangle and dwell)."""

    imaging_semiangle_rad: float
    overview_pixel_m: float
    semiangle_rad: float
    dwell_s: float
    current_A: float = 100e-12


#: Nano-beams whose discs just separate, and imaging probes that resolve the lattice. Light atoms scatter less: they are
#: given more electrons a point.
BEAMS = {
    "MoS2": Beam(imaging_semiangle_rad=28e-3, overview_pixel_m=36e-12, semiangle_rad=7e-3, dwell_s=2e-3),
    "graphene": Beam(imaging_semiangle_rad=30e-3, overview_pixel_m=36e-12, semiangle_rad=6.5e-3, dwell_s=4e-3),
    "SrTiO3": Beam(imaging_semiangle_rad=22e-3, overview_pixel_m=50e-12, semiangle_rad=3e-3, dwell_s=1e-3),
}


def beam_for(info: InstrumentInfo) -> Beam:
    """The beam for the instrument's sample; a material without a network is an InputError."""
    material = info.sample.get("material")
    if material not in BEAMS:
        raise InputError(f"no beam is set for the material {material!r}; known: {', '.join(sorted(BEAMS))}.")
    return BEAMS[str(material)]


@dataclass
class Overview:
    """The HAADF overview and what was found in it: columns [px], their positions [m], the lattice's orientation."""

    image: NDArray[Any]
    extent_m: tuple[float, float]
    columns: Columns
    columns_m: NDArray[np.float64]
    rotation_rad: float


@dataclass
class Recipe:
    """Base of all recipes. After :meth:`prepare`, ``candidates_m`` (n, 2) [m] are the places that may be measured and
    for which the property is wanted, ``features`` (n, 2) what the Gaussian process sees of them (by default the
    places themselves), and ``raster_points`` the number of points of the full raster at Nyquist."""

    name: ClassVar[str] = ""
    quantity: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    unit: str = ""
    #: Wanted largest deviation, in ``unit``, or as a share of the range of the first design's values.
    target_sigma: float | None = None
    target_share: float = 0.1
    initial: int = 80
    batch: int = 8
    acquisition: str = "uncertainty"
    dwell_s: float = 1e-3
    current_A: float = 100e-12
    grid: Grid | None = None
    candidates_m: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 2)))
    features: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 2)))
    features_extent: tuple[float, float] = (1.0, 1.0)
    #: Choices of :func:`stemloop.decide.gp.fit` for this property.
    fitting: dict[str, Any] = field(default_factory=dict)
    overview: Overview | None = None

    @property
    def raster_points(self) -> int:
        assert self.grid is not None
        return len(self.grid)

    def prepare(self, site: Site, settings: Settings, watch: Stopwatch) -> None:
        """Look at the field and lay out the candidates."""
        raise NotImplementedError

    def instruction(self, positions_m: NDArray[np.float64]) -> Instruction:
        """How a set of positions (k, 2) [m] is measured."""
        raise NotImplementedError

    def interpret(self, frames: NDArray[Any], exposure: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
        """``value`` and ``sigma`` (lists, None where a frame taught nothing), and what else the journal keeps."""
        raise NotImplementedError

    def replay(self, result: dict[str, Any]) -> None:
        """Bring the recipe into the state in which it was after ``result`` had been found."""

    def truth(self, truth: Any) -> NDArray[np.float64] | None:
        """The property at all candidates by the specimen's truth file, for scoring."""
        return None

    def believe(self, found: dict[str, Any], index: NDArray[np.int64], start: list[Any] | None) -> Belief:
        """Fit a belief to what was found at the candidates ``index`` (n,), from the last hyperparameters.

        ``found`` holds the results' lists, joined. By default one Gaussian process sees ``value`` and ``sigma``.
        """
        value, sigma = np.array(found["value"]), np.array(found["sigma"])
        first = None if start is None else start[0]
        return gp.fit(self.features[index], value, sigma, start=first, field_m=self.features_extent, **self.fitting)

    def recall(self, found: dict[str, Any], index: NDArray[np.int64], known: list[gp.Hyperparameters]) -> Belief:
        """The belief that :meth:`believe` gave, from its hyperparameters."""
        value, sigma = np.array(found["value"]), np.array(found["sigma"])
        return gp.GaussianProcess(self.features[index], value, sigma, known[0])

    def reference(self, settings: Settings) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """The property at all candidates as it was recorded, with its deviation, where a whole recording is at hand."""
        return None

    def paint(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values at the candidates (n,) as an image (ny, nx)."""
        assert self.grid is not None
        return self.grid.paint(values)

    def extras(self) -> dict[str, Any]:
        """What else belongs in the summary."""
        return {}

    def _need(self, info: InstrumentInfo) -> None:
        if self.kind not in info.instructions:
            raise InputError(
                f"the recipe {self.name} needs {self.kind}, which {info.name} cannot do; "
                f"it can do {', '.join(info.instructions)}."
            )


def _points(positions_m: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    return tuple((float(y), float(x)) for y, x in positions_m)


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return list(jsonable(np.asarray(values, float)))


@dataclass
class DiffractionRecipe(Recipe):
    """What the recipes on CBED patterns share: the overview, the describer and an energy model."""

    kind: ClassVar[str] = "diffraction"
    #: The overview's share of the dose of the full raster.
    overview_share: ClassVar[float] = 0.025
    #: A pattern this far from the training data (deviations) teaches nothing.
    novelty_limit: ClassVar[float] = 6.0

    def prepare(self, site: Site, settings: Settings, watch: Stopwatch) -> None:
        self.info = site.scope.info
        self._need(self.info)
        self.beam = self._beam()
        self.current_A, self.dwell_s = self.beam.current_A, self.beam.dwell_s
        self.grid = nyquist_grid(self.info, self.beam.semiangle_rad)
        self.material = str(self.info.sample["material"])
        with watch("start"):
            self.describer = PatternDescriber()
        self._look(site, watch)
        self.model = self._model(settings)
        site.command(Optics(semiangle_rad=self.beam.semiangle_rad, current_A=self.current_A), "optics-measure")
        self._lay_out()

    def _beam(self) -> Beam:
        return beam_for(self.info)

    def _model(self, settings: Settings) -> Any:
        raise NotImplementedError

    def _lay_out(self) -> None:
        assert self.grid is not None
        self.candidates_m = self.features = self.grid.positions_m
        self.features_extent = self.info.field_m

    def _look(self, site: Site, watch: Stopwatch) -> None:
        height, width = self.info.field_m
        shape = round(height / self.beam.overview_pixel_m), round(width / self.beam.overview_pixel_m)
        dwell_s = self.overview_share * self.raster_points * self.dwell_s / (shape[0] * shape[1])
        site.command(Optics(semiangle_rad=self.beam.imaging_semiangle_rad, current_A=self.current_A), "optics-overview")
        asked = Image((0.0, 0.0), (height, width), shape, dwell_s)
        frames, _ = site.expose(asked, "overview", watch)
        if frames is None:
            raise OutcomeUnknown(
                "the overview was begun and never seen to end; it is not exposed again: start a new run."
            )
        with watch("describe"):
            image = np.asarray(frames[0], float)
            pixel_m = height / shape[0]
            columns = find_columns(image, 1e9 * pixel_m)
            rotation, _ = orientation(image, self.material)
            columns_m = (columns.position + 0.5) * pixel_m
            self.overview = Overview(image, (height, width), columns, columns_m, rotation)

    def instruction(self, positions_m: NDArray[np.float64]) -> Instruction:
        return Diffraction(_points(positions_m), self.dwell_s)

    def interpret(self, frames: NDArray[Any], exposure: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
        assert self.info.camera is not None and self.overview is not None
        with watch("describe"):
            found = self.describer(
                np.asarray(frames, np.float32),
                self.info.camera,
                self.info.energy_eV,
                self.beam.semiangle_rad,
                exposure["electrons"] / len(frames),
                self.overview.rotation_rad,
            )
        with watch("energies"):
            energies = self.model(found)
        trusted = found.novelty < self.novelty_limit
        return {
            "value": _numbers(np.where(trusted, energies.value, np.nan)),
            "sigma": _numbers(np.where(trusted, energies.sigma, np.nan)),
            "descriptors": {
                name: getattr(found, name).tolist() for name in ("mean", "sigma", "phase", "site", "novelty")
            },
        }

    def extras(self) -> dict[str, Any]:
        return {
            "calculator": self.model.calculator,
            "supercell": self.model.repeats,
            "energetics": {name: round(float(count), 3) for name, count in self.model.counts.items()},
        }

    def replay(self, result: dict[str, Any]) -> None:
        """The energy surface learns from what it is asked, in order: ask it the same again (its cache answers)."""
        stored = result["descriptors"]
        self.model(Descriptors(**{name: np.asarray(values, float) for name, values in stored.items()}))


@RECIPES.register("strain-energy")
@dataclass
class StrainEnergy(DiffractionRecipe):
    """Strain energy a unit cell over the field: CBED -> local strain tensor -> strained crystal -> calculator."""

    name: ClassVar[str] = "strain-energy"
    quantity: ClassVar[str] = "strain energy"
    unit: str = "eV/cell"
    #: Wanted largest deviation [eV/cell].
    targets: ClassVar[dict[str, float]] = {"MoS2": 4e-3, "graphene": 6.5e-3, "SrTiO3": 3e-3}

    def _lay_out(self) -> None:
        super()._lay_out()
        self.target_sigma = self.targets[self.material]
        self.shared_variance = self.describer.shared(self.material)[:3, None] ** 2

    def _model(self, settings: Settings) -> Any:
        assert self.overview is not None
        return energy_model(self.material, settings.calculator, rotation_rad=self.overview.rotation_rad)

    def explain(self, mean: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], Any]:
        """From means (3, m) of e_mean, e_diff, e_xy to a function from their variances (3, m) to the strain energy's
        mean (m,) and deviation (m,). What the network's errors have in common does not fall with the number of points:
        it is added to the variances."""
        mixed = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
        answer = self.model.surface.answer(self.model.surface.within_limit((mixed @ mean).T))
        shared = self.shared_variance

        def moments(variance: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            return expect(answer, np.einsum("ij,jn,kj->nik", mixed, variance + shared, mixed))

        return moments

    def believe(self, found: dict[str, Any], index: NDArray[np.int64], start: list[Any] | None) -> Belief:
        """One Gaussian process for each strain component; the energy is derived from them."""
        mean, sigma = (np.array(found["descriptors"][name])[:, :3] for name in ("mean", "sigma"))
        return fit_derived(
            self.features[index], mean, sigma, self.explain, start=start, field_m=self.features_extent, **self.fitting
        )

    def recall(self, found: dict[str, Any], index: NDArray[np.int64], known: list[gp.Hyperparameters]) -> Belief:
        mean, sigma = (np.array(found["descriptors"][name])[:, :3].T for name in ("mean", "sigma"))
        places = self.features[index]
        fields = (gp.GaussianProcess(places, y, s, h) for y, s, h in zip(mean, sigma, known, strict=True))
        return Derived(tuple(fields), self.explain)

    def truth(self, truth: Any) -> NDArray[np.float64] | None:
        strain = truth.descriptors(self.candidates_m).strain
        value, _ = self.model.surface.fork().energies(strain)
        return np.asarray(value)


#: Semiangles [rad] of smaller probes, whose discs overlap, for single sites.
SITE_SEMIANGLES = {"MoS2": 11e-3, "graphene": 12.5e-3, "SrTiO3": 6.5e-3}


@RECIPES.register("defect-energy")
@dataclass
class DefectEnergy(DiffractionRecipe):
    """Formation energy of what stands at each atom column: CBED on columns -> site class -> calculator.

    The Gaussian process sees what the overview shows of a column, its brightness and that of its neighbours against
    the median of its sublattice (in robust deviations), so that a few measured columns teach about all that look
    alike.
    """

    name: ClassVar[str] = "defect-energy"
    quantity: ClassVar[str] = "formation energy of the site"
    unit: str = "eV"
    target_sigma: float | None = 0.5
    initial: int = 20

    def _beam(self) -> Beam:
        return replace(beam_for(self.info), semiangle_rad=SITE_SEMIANGLES[str(self.info.sample["material"])])

    def _model(self, settings: Settings) -> Any:
        return energy_model(self.material, settings.calculator, quantity="defect_energy")

    def _lay_out(self) -> None:
        assert self.overview is not None and self.grid is not None
        height, width = self.info.field_m
        y, x = self.overview.columns_m.T
        inside = (y > 0) & (y < height) & (x > 0) & (x < width)
        if not inside.any():
            raise InputError("no atom column was found in the overview: raise its dose or check the focus.")
        self.candidates_m = self.overview.columns_m[inside]
        self.features = column_features(self.overview.columns, self.overview.columns_m)[inside]
        span = np.ptp(self.features, axis=0) + 1.0
        self.features_extent = (float(span[0]), float(span[1]))
        self._nearest = cKDTree(self.candidates_m).query(self.grid.positions_m)[1]

    def paint(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        assert self.grid is not None
        return self.grid.paint(np.asarray(values)[self._nearest])

    def truth(self, truth: Any) -> NDArray[np.float64] | None:
        return np.asarray(self.model(truth.descriptors(self.candidates_m)).value)


def column_features(columns: Columns, columns_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 2): robust deviation of each column's amplitude from the median of its sublattice, and the mean of the same
    over its three nearest neighbours; clipped to +-8."""
    deviation = np.zeros(len(columns))
    for sublattice in np.unique(columns.sublattice):
        member = columns.sublattice == sublattice
        middle = np.median(columns.amplitude[member])
        spread = 1.4826 * np.median(np.abs(columns.amplitude[member] - middle)) or 1.0
        deviation[member] = (columns.amplitude[member] - middle) / spread
    deviation = np.clip(deviation, -8, 8)
    neighbours = cKDTree(columns_m).query(columns_m, k=min(4, len(columns_m)))[1].reshape(len(columns_m), -1)[:, 1:]
    around = deviation[neighbours].mean(1) if neighbours.size else np.zeros(len(columns_m))
    return np.stack([deviation, around], axis=1)


@RECIPES.register("eels-map")
@dataclass
class EelsMap(Recipe):
    """A map of one number a spectrum (a core-loss edge above its background, the thickness) over recorded or live
    spectra. A microscope that can image is asked for an overview first."""

    name: ClassVar[str] = "eels-map"
    quantity: ClassVar[str] = "edge integral"
    kind: ClassVar[str] = "spectrum"
    unit: str = "counts"
    initial: int = 16
    batch: int = 4
    dwell_s: float = 0.1
    overview_pixels: ClassVar[int] = 256
    overview_dwell_s: ClassVar[float] = 2e-6

    def prepare(self, site: Site, settings: Settings, watch: Stopwatch) -> None:
        info = site.scope.info
        self._need(info)
        self.current_A = float(site.scope.state().get("current_A", self.current_A))
        self.initial, self.batch = 16, 4
        # a scan along one direction across layers; deviations estimated from the spectra themselves may be too small
        self.fitting = {"anisotropic": True, "prior": Prior(noise=LogNormal(0.1, 1.0))}
        self.scalarize = SCALARIZERS[settings.scalarizer or "Ti-L23"]
        self.unit = self.scalarize.unit
        self.grid = recorded_grid(info) if info.positions_m is not None else nyquist_grid(info, 20e-3)
        self.candidates_m = self.features = self.grid.positions_m
        self.features_extent = info.field_m
        if "image" in info.instructions:
            self._look(site, info, watch)

    def _look(self, site: Site, info: InstrumentInfo, watch: Stopwatch) -> None:
        """A quick image of the field, for the report."""
        pixel_m = max(info.field_m) / self.overview_pixels
        shape = max(1, round(info.field_m[0] / pixel_m)), max(1, round(info.field_m[1] / pixel_m))
        frames, _ = site.expose(Image((0.0, 0.0), info.field_m, shape, self.overview_dwell_s), "overview", watch)
        if frames is not None:
            nothing = np.empty((0, 2))
            columns = Columns(nothing, nothing, np.empty(0), np.empty(0), np.empty(0, np.int64))
            self.overview = Overview(np.asarray(frames[0], float), info.field_m, columns, nothing, 0.0)

    def instruction(self, positions_m: NDArray[np.float64]) -> Instruction:
        return Spectrum(_points(positions_m), self.dwell_s)

    def reference(self, settings: Settings) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        kind, _, path = settings.instrument.partition(":")
        if kind != "replay":
            return None
        recorded = recording(path)
        loss = recorded.axis("energy_loss")
        spectra = np.asarray(recorded.data, float).reshape(-1, loss.size)
        return self.scalarize(spectra, {"energy_loss": (loss.offset, loss.scale, loss.size)})

    def interpret(self, frames: NDArray[Any], exposure: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
        with watch("describe"):
            value, sigma = self.scalarize(np.asarray(frames, float), exposure["calibration"])
        return {"value": _numbers(value), "sigma": _numbers(sigma)}


def make(name: str) -> Recipe:
    """A fresh recipe of that name."""
    return RECIPES[name]()
