import threading

import pytest

from stemloop import cli
from stemloop.core.errors import IntegrityError, StorageError, UnreadableFile
from stemloop.instrument import audit as audits
from stemloop.instrument.audit import Audit, Head, verify_audit


@pytest.fixture
def log(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    for number in range(6):
        audit.write(event="execute", who="agent:é", number=number, place=[1e-9, -0.0])
    audit.close()
    return tmp_path / "audit.jsonl"


def test_every_single_byte_counts(log):
    """Each byte of the file replaced by others, one bit away: never unnoticed, and the right line is named."""
    good = b"".join(log.read_bytes().splitlines(keepends=True)[:3])
    for at in range(len(good)):
        line = good[:at].count(b"\n") + 1
        for flip in (1 << at % 8, 0x80 >> at % 3):
            log.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
            with pytest.raises(IntegrityError, match=f"line {line} "):
                verify_audit(log)


def test_lines_lost_doubled_exchanged_or_written_anew_show(log):
    lines = log.read_bytes().splitlines(keepends=True)
    head = verify_audit(log)
    for changed, where in (
        (lines[1:], 1), (lines[:2] + lines[3:], 3), (lines[:3] + lines[2:], 4), ([lines[1], lines[0], *lines[2:]], 1),
    ):  # fmt: skip
        log.write_bytes(b"".join(changed))
        with pytest.raises(IntegrityError, match=f"line {where} "):
            verify_audit(log)
    log.write_bytes(b"".join(lines[:4]))
    assert verify_audit(log).lines == 4  # by itself a shorter log is a good log
    with pytest.raises(IntegrityError, match="the end was cut off"):
        verify_audit(log, head)
    anew = Audit(log.with_name("anew"))
    for number in range(6):
        anew.write(number=-number)
    anew.close()
    assert verify_audit(log.with_name("anew")).lines == 6
    with pytest.raises(IntegrityError, match=r"line 6 .*not that of the head"):
        verify_audit(log.with_name("anew"), head)


def test_the_command_says_what_it_found(log, capsys):
    assert cli.main(["audit", "verify", str(log)]) == 0
    said = capsys.readouterr().out
    head = said.split("head ")[1].strip()
    assert "6 lines" in said and cli.main(["audit", "verify", str(log), "--head", head]) == 0
    log.write_bytes(log.read_bytes().replace(b'"number": 3', b'"number": 4'))
    assert cli.main(["audit", "verify", str(log)]) == 2
    assert "line 4 (bytes " in capsys.readouterr().err
    assert cli.main(["audit", "verify", str(log), "--head", "x"]) == 2
    assert cli.main(["audit", "verify", str(log.with_name("none"))]) == 2
    with pytest.raises(UnreadableFile):
        verify_audit(log.with_name("none"))


def test_threads_write_one_chain_and_a_second_start_goes_on(tmp_path):
    audit = Audit(tmp_path / "a")
    threads = [
        threading.Thread(target=lambda name=name: [audit.write(name=name, n=n) for n in range(50)]) for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    head = audit.head
    audit.close()
    assert verify_audit(tmp_path / "a", head) == head == Audit(tmp_path / "a").head
    assert head.lines == 200


def test_lines_become_durable_together_and_on_demand(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(audits, "sync_data", synced.append)
    monkeypatch.setattr(audits, "GROUP_COMMIT_S", 10.0)
    audit = Audit(tmp_path / "a")
    for number in range(20):
        audit.write(number=number)
    assert not synced
    audit.write(durable=True, number=20)
    assert len(synced) == 1
    audit.close()
    assert len(synced) == 2


def test_after_a_failed_fdatasync_no_line_is_promised(tmp_path, monkeypatch):
    audit = Audit(tmp_path / "a")
    with monkeypatch.context() as patch:

        def fail(_):
            raise OSError(5, "Input/output error")

        patch.setattr(audits, "sync_data", fail)
        with pytest.raises(StorageError, match="Check the disk"):
            audit.write(durable=True, number=1)
    with pytest.raises(StorageError, match="restart the server"):
        audit.write(number=2)
    audit.close()


def test_an_empty_log_is_well(tmp_path):
    (tmp_path / "a").touch()
    assert verify_audit(tmp_path / "a") == Head(0, "")
