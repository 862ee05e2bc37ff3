"""Instructions: their wire form, their paths of positions, and the schema that other languages read."""

import json
import math

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_core import EXAMPLES

from stemloop.core import errors, instruction
from stemloop.core.instruction import (
    DETECTORS,
    KINDS,
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
    from_dict,
    to_dict,
)
from stemloop.core.schema import json_schema

VALIDATOR = jsonschema.Draft202012Validator(json_schema())

numbers = st.floats(-1e-6, 1e-6)
above = st.floats(1e-12, 1e-3)
pairs = st.tuples(numbers, numbers)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
extents = st.tuples(above, above)
angles = st.floats(-math.pi, math.pi)
lines = st.builds(Line, pairs, pairs, st.integers(1, 100))
rasters = st.builds(Raster, pairs, extents, sizes, angles)
positions = st.one_of(st.lists(pairs, min_size=1, max_size=9).map(tuple), lines, rasters)


def maybe(strategy):
    return st.none() | strategy


instructions = st.one_of(
    st.builds(Image, pairs, extents, sizes, above, st.sampled_from(DETECTORS), angles),
    st.builds(Diffraction, positions, above),
    st.builds(Spectrum, positions, above),
    st.builds(Probe, pairs),
    st.builds(Blank, st.booleans()),
    st.builds(
        Optics,
        *(maybe(s) for s in (above, numbers, above, pairs, pairs, pairs, numbers, st.floats(1e3, 3e5))),
    ),
    st.builds(Stage, *[maybe(numbers)] * 5),
    st.builds(Field, maybe(extents), maybe(angles)),
    st.builds(
        Detector,
        st.text(min_size=1, max_size=20),
        *(
            maybe(s)
            for s in (st.booleans(), above, numbers, above, sizes, above, above, above, numbers, above)
        ),
    ),
    st.just(Report()),
)  # fmt: skip


@given(instructions)
def test_every_instruction_comes_back_from_json_as_itself_and_fits_the_schema(asked):
    wire = json.loads(json.dumps(to_dict(asked)))
    assert from_dict(wire) == asked
    VALIDATOR.validate(wire)


@given(instructions, st.data())
@settings(max_examples=50)
def test_what_the_schema_refuses_is_refused_here(asked, data):
    """The schema and the checks are made of the same words: a field less, more or of another type fails both."""
    wire = to_dict(asked)
    name = data.draw(st.sampled_from([*wire, "colour"]))
    wire[name] = data.draw(st.sampled_from(["", {}, [], [1], "x" * 200, -math.pi, True, None]))
    if VALIDATOR.is_valid(wire):
        from_dict(wire)
    else:
        with pytest.raises(errors.InputError):
            from_dict(wire)


@pytest.mark.parametrize("asked", EXAMPLES, ids=lambda i: i.kind)
def test_every_field_says_what_it_is_and_in_which_unit(asked):
    schema = json_schema()["$defs"][asked.kind]["properties"]
    for name, field in schema.items():
        if name in ("kind", "version"):
            continue
        assert field["description"]
        for unit in ("m", "s", "rad", "A", "eV"):
            if name.endswith(f"_{unit}"):
                assert field["description"].endswith(f"[{unit}]")


def test_the_schema_itself_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("kind, fields", sorted(instruction._VERSION_1.items()))
def test_version_1_is_read_with_the_same_meaning(kind, fields):
    now = to_dict(next(i for i in EXAMPLES if i.kind == kind))
    then = {"kind": kind, "version": 1, **{name: now[name] for name in fields}}
    assert from_dict(then) == from_dict({**then, "version": 2})


@pytest.mark.parametrize("wire", [{"kind": "field", "version": 1}, {"kind": "optics", "version": 1, "C12_m": [0, 0]}])
def test_version_1_knows_no_words_of_version_2(wire):
    with pytest.raises(errors.InputError, match="version 1"):
        from_dict(wire)


@given(st.one_of(lines, rasters))
def test_a_path_gives_the_same_positions_in_every_way_it_is_read(path):
    array = path.array()
    assert array.shape == (len(path), 2)
    np.testing.assert_array_equal(array, np.array(list(path)))
    np.testing.assert_array_equal(array, np.asarray(path))
    assert path[-1] == tuple(array[-1])
    assert path[: len(path)] == tuple(path)
    with pytest.raises(IndexError):
        path[len(path)]


@given(st.one_of(lines, rasters))
def test_the_corners_hold_every_position(path):
    # a hull of axis-aligned bounds is enough: rounding is that of the coordinates, 1e-3 m at most
    low, high = path.corners_m().min(axis=0), path.corners_m().max(axis=0)
    assert np.all(path.array() >= low - 1e-15) and np.all(path.array() <= high + 1e-15)


@given(rasters)
def test_a_raster_is_centred_on_its_rectangle_and_keeps_its_distances_when_turned(path):
    centre = np.array(path.origin_m) + np.array(path.extent_m) / 2
    np.testing.assert_allclose(path.array().mean(axis=0), centre, atol=1e-12)
    upright = Raster(path.origin_m, path.extent_m, path.shape)
    np.testing.assert_allclose(
        np.linalg.norm(path.array() - centre, axis=1), np.linalg.norm(upright.array() - centre, axis=1), atol=1e-15
    )


def test_a_quarter_turn_takes_x_to_y():
    # +x turns into +y: the point right of the centre goes below it (y is down)
    image = Image((0.0, 0.0), (2.0, 2.0), (2, 2), 1.0, rotation_rad=math.pi / 2)
    np.testing.assert_allclose(image.positions()[0, 1], (1.0, 2.0), atol=1e-12)


def test_a_path_of_too_many_positions_is_refused_at_once():
    with pytest.raises(errors.InputError, match="number of positions"):
        Raster((0.0, 0.0), (1.0, 1.0), (2**20, 2**20))


def test_every_kind_is_in_the_schema():
    assert {ref["$ref"].rsplit("/", 1)[1] for ref in json_schema()["oneOf"]} == set(KINDS)
