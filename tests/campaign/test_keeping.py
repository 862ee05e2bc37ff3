"""The command ``file`` on landing logs and sealed files, and the command ``bench crash``."""

import json
import random

import numpy as np
import pytest

from stemloop import cli
from stemloop.campaign import crash, keeping
from stemloop.core.chunk import SHUFFLE_DEFLATE, deflate
from stemloop.core.protocols import Batch, Encoded
from stemloop.store import read_sealed
from stemloop.store.sealed import Sealed
from stemloop.stream import codec
from stemloop.stream.dense import DenseBlock
from stemloop.stream.landing import LandingLog

FRAMES = np.random.default_rng(0).poisson(0.3, (64, 16, 16)).astype("<u2")


def encoded(name, first, n=16):
    frames = FRAMES[first : first + n]
    payload = deflate(frames) if name == SHUFFLE_DEFLATE else codec.encode(DenseBlock(frames), name)
    return Encoded("cbed", first, n, (16, 16), "<u2", name, payload)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "frames.log"
    with LandingLog(path, "r-1") as made:
        made.append_many([encoded(SHUFFLE_DEFLATE, k) for k in (0, 16, 48)])
        made.declare_lost("cbed", 32, 48, "the link was down")
        made.append(Batch("image", 0, np.ones((1, 20, 20), np.float32)))
    return path


def stemloop(capsys, *words):
    status = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_a_log_is_sealed_verified_and_described(log, tmp_path, capsys):
    about, out = tmp_path / "about.json", tmp_path / "frames.h5"
    about.write_text(json.dumps({"run": {"title": "t"}, "calibrations": {"cbed": {"pixel_rad": 1e-3}}}))
    assert stemloop(capsys, "file", "seal", log, out, "--about", about)[0] == 0
    assert stemloop(capsys, "file", "seal", log, out)[0] == 2
    assert stemloop(capsys, "file", "seal", log, out, "--overwrite", "--about", about)[0] == 0
    (signal,) = (s for s in read_sealed(out) if s.metadata["title"] == "cbed")
    np.testing.assert_array_equal(signal.data, FRAMES[[*range(32), *range(48, 64)]])
    assert signal.metadata["run"] == {"id": "r-1", "title": "t"} and signal.axes[1].unit == "rad"
    for path in (log, out):
        status, said = stemloop(capsys, "file", "verify", path)
        assert status == 0 and "every byte" in said
    assert "acknowledged 64, stored 48, lost 16, missing 0, balanced True" in stemloop(capsys, "file", "info", log)[1]
    assert "declared lost 16" in stemloop(capsys, "file", "info", out)[1]
    about.write_text("[1")
    assert "no JSON object" in stemloop(capsys, "file", "seal", log, out, "--overwrite", "--about", about)[1]
    assert stemloop(capsys, "file", "info", tmp_path / "none")[0] == 2


@pytest.mark.parametrize("kind", ["log", "sealed"])
def test_what_is_good_is_repaired_and_the_rest_declared_lost(kind, log, tmp_path, capsys):
    path, out = log, tmp_path / "good"
    with LandingLog(log, readonly=True) as made:
        place = made._records[1] + 200
    if kind == "sealed":
        path = tmp_path / "frames.h5"
        keeping.seal_log(log, path, run={})
        with Sealed(path) as file:
            place = int(file.set("cbed").chunks[1]["offset"]) + 9
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)
    status, said = stemloop(capsys, "file", "verify", path)
    assert status == 2 and "bytes " in said and "repair" in said
    status, said = stemloop(capsys, "file", "repair", path, out)
    assert status == 0 and "frames 16-31 are lost" in said
    assert stemloop(capsys, "file", "verify", out)[0] == 0
    assert stemloop(capsys, "file", "repair", path, out)[0] == 2
    report = keeping.examine(out)
    assert not report.flaws
    if kind == "log":
        assert report.streams["cbed"]["lost"] == 32 and report.streams["cbed"]["balanced"]
    else:
        assert report.streams["cbed"]["declared lost"] == 32 and report.streams["cbed"]["frames"] == 32


@pytest.mark.parametrize("name", ["gaps", "events"])
@pytest.mark.parametrize("profile", ["portable", "working"])
def test_electron_events_are_sealed(name, profile, tmp_path):
    with LandingLog(tmp_path / "log", "r") as log:
        log.append_many([encoded(name, k) for k in range(0, 64, 16)])
    keeping.seal_log(tmp_path / "log", tmp_path / "run.h5", run={}, profile=profile)
    (signal,) = read_sealed(tmp_path / "run.h5", decode=keeping.decode)
    np.testing.assert_array_equal(signal.data, FRAMES)
    with LandingLog(tmp_path / "log", readonly=True, decode=keeping.decode) as log:
        np.testing.assert_array_equal(log.read("cbed", 10, 20), FRAMES[10:30])


def test_killed_writers_lose_nothing(tmp_path):
    tally = crash.kills(crash.LOG, tmp_path, 12, random.Random(0), most_s=0.05)
    assert tally.crashes == 12 and tally.acknowledged > 0 and tally.lost == tally.wrong == tally.unopened == 0


def test_power_cuts_lose_nothing(tmp_path):
    why = crash.why_no_cuts()
    if why:
        pytest.skip(why)
    tally = crash.cuts(crash.LOG, tmp_path, 3, random.Random(0), most_s=0.2)
    assert tally.crashes == 3 and tally.acknowledged > 0 and tally.lost == tally.wrong == 0


def test_the_count_sees_a_loss(tmp_path):
    """A log that is cut short after its writer was killed: the count would not overlook it."""
    life = crash._Life(crash.LOG, tmp_path / "log")
    life.run(0.1)
    life.kill()
    size = (tmp_path / "log").stat().st_size
    with open(tmp_path / "log", "r+b") as file:
        file.truncate(size // 2)
    tally = crash.Tally()
    tally.add(life.acknowledged, *crash.survey(crash.LOG, tmp_path / "log"))
    assert tally.lost > 0 and tally.crashes_with_loss == 1


def test_the_command_reports(tmp_path, capsys):
    out = tmp_path / "crash.json"
    status, said = stemloop(capsys, "bench", "crash", "--kills", 2, "--cuts", 0, "--peers", 0, "--json", out)
    assert status == 0 and "SIGKILL" in said
    assert json.loads(out.read_text())["kills"]["stemloop"]["lost"] == 0
