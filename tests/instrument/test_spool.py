import json

import numpy as np
import pytest

from stemloop.core.errors import IntegrityError, StorageError
from stemloop.core.protocols import Exposure
from stemloop.instrument import spool as spools
from stemloop.instrument.audit import Audit, verify_audit
from stemloop.instrument.files import DirectoryLock
from stemloop.instrument.spool import Journal, Spool

ASKED = {"kind": "diffraction", "version": 1, "positions_m": [[0.0, 0.0]], "dwell_s": 1e-3}


def exposure(seed):
    frames = np.random.default_rng(seed).integers(0, 99, (2, 4, 4)).astype(np.uint16)
    return Exposure(frames, 1.5, {"seed": seed}, {"pixel_rad": 1e-3})


def write(path, count, stream=False):
    spool = Spool(path)
    for number in range(count):
        spool.intent(f"c{number}", ASKED, 1, 10, "agent")
        numbers = spool.number("diffraction", 2) if stream else None
        spool.result(f"c{number}", ASKED, 7, exposure=exposure(number), stream=numbers)
    spool.close()


def test_everything_is_there_again_after_a_restart(tmp_path):
    write(tmp_path / "s", 3, stream=True)
    spool = Spool(tmp_path / "s")
    assert (spool.spent, spool.state, spool.counts) == (21, {"seed": 2}, {"diffraction": 6})
    assert np.array_equal(spool.find("c1")["exposure"]["frames"], exposure(1).frames)
    assert spool.streamed("c1", "diffraction", 2) == {"stream": "diffraction", "first": 2, "count": 2}
    assert spool.find("c3") is None
    spool.lease(9)
    spool.close()
    assert Spool(tmp_path / "s").fencing == 9


def test_a_torn_end_at_any_byte_loses_only_what_was_not_promised(tmp_path):
    """Cut in the intent: it never was. Cut in the result: the outcome is unknown and the reserved dose is spent."""
    path = tmp_path / "s"
    write(path, 1)
    one = path.stat().st_size
    spool = Spool(path)
    spool.intent("last", ASKED, 1, 10, "agent")
    two = path.stat().st_size
    spool.result("last", ASKED, 7, exposure=exposure(9))
    spool.close()
    whole = path.read_bytes()
    for cut in {*range(one, len(whole), 13), one + 1, two - 1, two, two + 1, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        spool = Spool(path)
        if cut < two:
            assert (spool.find("last"), spool.spent) == (None, 7)
        else:
            assert (spool.find("last")["error"][0], spool.spent) == ("outcome-unknown", 17)
        spool.close()
        again = Spool(path)
        assert again.spent == spool.spent
        again.close()


def test_a_torn_end_may_hold_garbage(tmp_path):
    write(tmp_path / "s", 2)
    good = (tmp_path / "s").read_bytes()
    for tail in (b"\0" * 4096, good[:30] + b"\0" * 50, b"SLS1" + b"\xff" * 40):
        (tmp_path / "s").write_bytes(good + tail)
        Spool(tmp_path / "s").close()
        assert (tmp_path / "s").read_bytes() == good


def test_a_changed_byte_in_a_durable_record_is_an_integrity_error(tmp_path):
    path = tmp_path / "s"
    write(path, 2)
    whole = path.read_bytes()
    last = whole.rindex(b"SLS1")
    rng = np.random.default_rng(0)
    for place in [0, 5, 10, 20, last - 1, *rng.integers(0, last, 60)]:
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        with pytest.raises(IntegrityError, match="not what was written"):
            Spool(path)


def test_records_that_were_not_durable_may_vanish_in_any_order(tmp_path):
    """After a power cut a later block may be on the disk and an earlier one not."""
    journal = Journal(tmp_path / "j")
    journal.append({"a": 0}, durable=True)
    second = journal.append({"a": 1}, durable=False)
    third = journal.append({"a": 2}, durable=False)
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:second] + b"\0" * (third - second) + whole[third:])
    journal = Journal(tmp_path / "j")
    assert [record for _, record in journal] == [{"a": 0}]


def test_a_full_disk_is_a_storage_error_and_leaves_no_half_record(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "s")
    spool.intent("a", ASKED, 1, 10, "agent")
    real = spools.write_all

    def full(descriptor, data):
        real(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spools, "write_all", full)
    with pytest.raises(StorageError, match="No space left"):
        spool.result("a", ASKED, 7, exposure=exposure(0))
    monkeypatch.undo()
    spool.result("a", ASKED, 7, exposure=exposure(0))
    spool.close()
    assert Spool(tmp_path / "s").spent == 7


def test_after_a_failed_fdatasync_nothing_more_is_promised(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "s")

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(spools, "sync_data", fail)
    with pytest.raises(StorageError, match="Input/output"):
        spool.intent("a", ASKED, 1, 10, "agent")
    monkeypatch.undo()
    with pytest.raises(StorageError, match="restart the server"):
        spool.intent("b", ASKED, 1, 10, "agent")


def test_the_audit_log_shows_each_change(tmp_path):
    path = tmp_path / "a"
    audit = Audit(path)
    for number in range(5):
        audit.write(event="execute", number=number)
    audit.close()
    assert verify_audit(path).lines == 5
    lines = path.read_bytes().splitlines()
    for changed in (lines[1:], lines[:2] + lines[3:], [lines[0].replace(b'"number": 0', b'"number": 9'), *lines[1:]]):
        (tmp_path / "b").write_bytes(b"\n".join(changed) + b"\n")
        with pytest.raises(IntegrityError, match="line"):
            verify_audit(tmp_path / "b")


def test_the_audit_log_goes_on_after_a_torn_line(tmp_path):
    path = tmp_path / "a"
    audit = Audit(path)
    audit.write(event="x", long="y" * 100_000)
    audit.close()
    path.write_bytes(path.read_bytes() + b'{"utc": 1')
    audit = Audit(path)
    audit.write(event="z")
    audit.close()
    assert verify_audit(path).lines == 2
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["x", "z"]


def test_one_directory_has_one_server(tmp_path):
    lock = DirectoryLock(tmp_path)
    with pytest.raises(StorageError, match="another instrument server"):
        DirectoryLock(tmp_path)
    lock.close()
    DirectoryLock(tmp_path).close()
