"""The pages on instructions and limits say what the code says."""

import dataclasses
import re
from pathlib import Path

import pytest
from instruction_tables import table

from stemloop.core.instruction import KINDS, PATHS
from stemloop.instrument.declaration import Region
from stemloop.instrument.limits import CONTROLS, Limits

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference"
INSTRUCTIONS = (DOCS / "instructions.md").read_text(encoding="utf-8")
LIMITS = (DOCS / "limits.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```yaml\n(.*?)```", LIMITS, re.DOTALL).group(1)


@pytest.mark.parametrize("cls", [*KINDS.values(), *PATHS.values()], ids=lambda cls: cls.__name__)
def test_the_page_has_the_table_of_every_instruction(cls):
    assert table(cls).replace("``", "`") in INSTRUCTIONS


def test_every_instruction_has_its_heading():
    assert set(re.findall(r"^### `(\w+)`$", INSTRUCTIONS, re.MULTILINE)) == set(KINDS)


def test_the_full_example_is_read_and_uses_everything():
    limits = Limits.from_yaml(EXAMPLE)
    assert limits.version == 7 and limits.electrons_max == 1e13
    assert set(limits.controls) == {*CONTROLS, "camera_binning"} - {"energy_eV"}
    for entry in dataclasses.fields(Limits):
        assert f"{entry.name}:" in EXAMPLE, entry.name
    for entry in dataclasses.fields(Region):
        assert f"  {entry.name}:" in EXAMPLE, entry.name


def test_the_table_of_names_has_every_name_and_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", LIMITS, re.MULTILINE))
    assert set(rows) == {entry.name for entry in dataclasses.fields(Limits)} | {"format"}
    default = Limits((1.0, 1.0))
    for name in ("dwell_max_s", "current_max_A", "electrons_per_point", "electrons_per_image", "frame_bytes_max"):
        assert float(rows[name].strip("`")) == getattr(default, name)
