import json
from types import MappingProxyType

import numpy as np
import pytest

from stemloop.core import errors, instruction
from stemloop.core.instruction import (
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Line,
    Optics,
    Probe,
    Raster,
    Report,
    Spectrum,
    Stage,
)
from stemloop.core.plain import jsonable
from stemloop.core.record import content_hash
from stemloop.core.structure import Descriptors
from stemloop.core.units import electrons, probe_fwhm_m, wavelength_m

EXAMPLES = [
    Image((0.0, 0.0), (1e-8, 2e-8), (16, 32), 2e-6),
    Diffraction(((1e-9, 2e-9), (3e-9, 4e-9)), 1e-3),
    Spectrum(((0.0, 0.0),), 0.1),
    Probe((1e-9, 1e-9)),
    Blank(False),
    Optics(semiangle_rad=0.03),
    Stage(alpha_rad=0.1),
    Image((0.0, 0.0), (1e-8, 2e-8), (16, 32), 2e-6, "BF", 0.1),
    Diffraction(Raster((0.0, 0.0), (1e-9, 2e-9), (3, 4), 0.2), 1e-3),
    Spectrum(Line((0.0, 0.0), (0.0, 1e-9), 5), 0.1),
    Optics(C12_m=(1e-9, -2e-9), C21_m=(0.0, 1e-7), C23_m=(1e-8, 0.0), C30_m=1e-3, energy_eV=8e4),
    Field((1e-8, 1e-8), 0.3),
    Detector("camera", binning=(2, 2)),
    Report(),
]


@pytest.mark.parametrize("asked", EXAMPLES, ids=lambda i: i.kind)
def test_wire_form_and_back_is_the_same_instruction(asked):
    assert instruction.from_dict(instruction.to_dict(asked)) == asked


def test_every_kind_has_an_example():
    assert {i.kind for i in EXAMPLES} == set(instruction.KINDS)


@pytest.mark.parametrize("dwell", [0.0, -1.0, float("nan"), float("inf")])
def test_a_dwell_that_is_no_time_is_refused(dwell):
    with pytest.raises(errors.InputError, match="dwell_s"):
        Diffraction(((0.0, 0.0),), dwell)


@pytest.mark.parametrize(
    "wire", [{"kind": "jump"}, {"kind": "blank"}, {"kind": "blank", "version": 1, "colour": 1}, "blank", None]
)
def test_a_wrong_wire_form_says_what_is_wrong(wire):
    with pytest.raises(errors.InputError):
        instruction.from_dict(wire)


def test_errors_cross_a_wire_as_themselves():
    for cls in (errors.LimitError, errors.DoseError, errors.OutcomeUnknown):
        assert type(errors.from_code(cls.code, "why")) is cls
    assert type(errors.from_code("no-such-code", "why")) is errors.StemloopError


def test_error_codes_are_unique():
    def walk(cls):
        yield cls
        for child in cls.__subclasses__():
            yield from walk(child)

    codes = [cls.code for cls in walk(errors.StemloopError)]
    assert len(codes) == len(set(codes))


def test_wavelength_against_published_values():
    # Reimer & Kohl, table 2.1: 100 kV 3.701 pm, 200 kV 2.508 pm, 300 kV 1.969 pm
    for energy, pm in ((100e3, 3.701), (200e3, 2.508), (300e3, 1.969)):
        assert wavelength_m(energy) * 1e12 == pytest.approx(pm, abs=5e-4)


def test_probe_width_is_that_of_the_airy_disc():
    # the intensity (2 J1(u)/u)^2 falls to one half at half the FWHM
    from scipy.special import j1

    u = np.pi * 0.02 * probe_fwhm_m(80e3, 0.02) / wavelength_m(80e3)
    assert (2 * j1(u) / u) ** 2 == pytest.approx(0.5, abs=1e-6)


def test_electrons_are_charge_over_e():
    assert electrons(1.602176634e-19, 1.0) == pytest.approx(1.0)


def test_strain_covariance_is_that_of_the_mixed_components():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.5, 2.0, (1, 7))
    d = Descriptors(np.zeros((1, 7)), sigma, np.zeros((1, 4)), np.zeros((1, 3)), np.zeros(1))
    parts = rng.normal(size=(400_000, 3)) * sigma[0, :3]
    sampled = np.cov(np.stack([parts[:, 0] + parts[:, 1], parts[:, 0] - parts[:, 1], parts[:, 2]]))
    # 400k samples: relative error of a variance is sqrt(2/n) = 0.2 %; 2 % is ten times that
    np.testing.assert_allclose(d.strain_covariance[0], sampled, atol=0.02 * sampled.max())


def test_content_hash_sees_type_shape_and_bytes_and_not_key_order():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash(np.zeros(4)) != content_hash(np.zeros((2, 2)))
    assert content_hash(np.zeros(4)) != content_hash(np.zeros(4, np.float32))


def test_json_says_what_any_reader_of_it_understands():
    value = {
        1: np.array([[1.5, np.inf], [-np.inf, np.nan]]),
        "scalars": (np.float32(0.5), np.int8(-3), np.bool_(True), np.longdouble(2), np.str_("x"), float("nan")),
        "others": [np.datetime64("2020-01-02"), b"x", 1j, None, MappingProxyType({"a": ()})],
    }
    said = jsonable(value)
    assert said["1"] == [[1.5, None], [None, None]]
    assert said["scalars"] == [0.5, -3, True, 2.0, "x", None]
    assert said["others"] == ["2020-01-02", "b'x'", "1j", None, {"a": []}]
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert jsonable(said) == said
    assert jsonable([np.pi * 1e9, 7], digits=7) == [3141593000.0, 7]
