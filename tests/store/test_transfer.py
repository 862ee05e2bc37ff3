import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stemloop import cli
from stemloop.core.errors import InputError, IntegrityError, NotAuthorised, StorageError
from stemloop.store import transfer
from stemloop.store.transfer import Folder, Manifest, send

CHUNK = 1000


class Cut(Exception):
    """The line went dead."""


class Bad:
    """A folder behind a bad line: chunks are flipped, torn or lost, by a plan; it goes dead after ``cut`` chunks."""

    def __init__(self, folder, faults=(), cut=None):
        self.target, self.faults, self.left = Folder(folder), list(faults), cut

    def begin(self, manifest, overwrite=False):
        return self.target.begin(manifest, overwrite)

    def put(self, manifest, index, data):
        if self.left is not None:
            if not self.left:
                raise Cut
            self.left -= 1
        kind, where = self.faults.pop() if self.faults else ("fine", 0)
        offset, size = manifest.span(index)
        _, part = self.target._paths(manifest)
        if kind == "lost":
            return
        self.target.put(manifest, index, data)
        with open(part, "r+b") as file:
            if kind == "flip":
                place = offset + where % size
                byte = os.pread(file.fileno(), 1, place)[0]
                os.pwrite(file.fileno(), bytes([byte ^ (1 << where % 8)]), place)
            elif kind == "torn":
                os.pwrite(file.fileno(), bytes(size - where % size), offset + where % size)

    def settle(self, manifest):
        return self.target.settle(manifest)


def content(n, seed=0):
    return random.Random(seed).randbytes(n)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, 9 * CHUNK + 7),
    faults=st.lists(st.tuples(st.sampled_from(["fine", "flip", "torn", "lost"]), st.integers(0, 10**6)), max_size=15),
    cuts=st.lists(st.integers(0, 6), max_size=5),
    seed=st.integers(0, 99),
)
def test_whatever_happens_on_the_way_the_file_is_whole_or_not_there(tmp_path, size, faults, cuts, seed):
    folder = tmp_path / f"{seed}-{time.monotonic_ns()}"
    source = tmp_path / "run.h5"
    source.write_bytes(content(size, seed))
    for cut in cuts:
        try:
            send(source, Bad(folder, faults, cut), chunk=CHUNK)
        except (Cut, IntegrityError):
            assert not (folder / "run.h5").exists()
        else:
            assert (folder / "run.h5").read_bytes() == source.read_bytes()
    done = send(source, Folder(folder), chunk=CHUNK)
    assert (folder / "run.h5").read_bytes() == source.read_bytes()
    assert done.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert [path.name for path in folder.iterdir()] == ["run.h5"]
    assert send(source, Folder(folder), chunk=CHUNK).sent == 0


def test_a_cut_transfer_goes_on_where_it_was(tmp_path):
    source = tmp_path / "run.h5"
    source.write_bytes(content(10 * CHUNK))
    for _ in range(5):
        with pytest.raises(Cut):
            send(source, Bad(tmp_path / "there", cut=1), chunk=CHUNK)
    assert send(source, Folder(tmp_path / "there"), chunk=CHUNK).sent == 5 * CHUNK


def test_flips_and_tears_are_healed_and_counted(tmp_path):
    source = tmp_path / "run.h5"
    source.write_bytes(content(10 * CHUNK))
    faults = [("flip", 77), ("fine", 0), ("torn", 123), ("lost", 0)]
    done = send(source, Bad(tmp_path / "there", faults), chunk=CHUNK)
    assert (done.healed, done.sent) == (3, 13 * CHUNK)
    assert (tmp_path / "there/run.h5").read_bytes() == source.read_bytes()


@pytest.mark.slow
def test_every_flipped_bit_is_found_in_its_place_and_healed(tmp_path):
    """10^5 single flips of a random bit: just the chunk it is in is found wrong, and healed when sent again."""
    source = tmp_path / "run.h5"
    source.write_bytes(content(16 * 64))
    manifest, target, random_ = Manifest.of(source, chunk=64), Folder(tmp_path / "there"), random.Random(0)
    for index in target.begin(manifest):
        target.put(manifest, index, source.read_bytes()[64 * index : 64 * index + 64])
    _, part = target._paths(manifest)
    with open(part, "r+b", buffering=0) as file:
        for _ in range(100_000):
            place, bit = random_.randrange(1024), 1 << random_.randrange(8)
            byte = os.pread(file.fileno(), 1, place)[0]
            os.pwrite(file.fileno(), bytes([byte ^ bit]), place)
            assert transfer._wrong(part, manifest) == [place // 64]
            target.put(manifest, place // 64, source.read_bytes()[place // 64 * 64 :][:64])
    assert target.settle(manifest) == []


def test_a_destination_that_stays_wrong_is_named(tmp_path):
    source = tmp_path / "run.h5"
    source.write_bytes(content(3 * CHUNK))
    faults = [("flip", k) for k in range(100)]
    with pytest.raises(IntegrityError, match=r"run.h5.*bytes 0 to 999"):
        send(source, Bad(tmp_path / "there", faults), chunk=CHUNK)
    assert not (tmp_path / "there/run.h5").exists()


def test_damage_that_came_later_is_found_and_healed(tmp_path):
    source, copy = tmp_path / "run.h5", tmp_path / "there/run.h5"
    source.write_bytes(content(5 * CHUNK))
    send(source, Folder(copy.parent), chunk=CHUNK)
    copy.write_bytes(b"x" + copy.read_bytes()[1:])
    with pytest.raises(InputError, match="differs"):
        send(source, Folder(copy.parent), chunk=CHUNK)
    send(source, Folder(copy.parent), chunk=CHUNK, overwrite=True)
    assert copy.read_bytes() == source.read_bytes()


def test_a_source_that_changes_is_not_called_done(tmp_path):
    source = tmp_path / "run.h5"
    source.write_bytes(content(3 * CHUNK))

    class Meddling(Folder):
        def put(self, manifest, index, data):
            super().put(manifest, index, data)
            source.write_bytes(content(3 * CHUNK, seed=1))

    with pytest.raises(InputError, match="changed"):
        send(source, Meddling(tmp_path / "there"), chunk=CHUNK)
    assert not (tmp_path / "there/run.h5").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "", "a\\b", "link/evil"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path)
    manifest = Manifest(name, 1, 1, "0" * 64, ("0" * 64,))
    with pytest.raises(InputError):
        Folder(tmp_path / "in").begin(manifest)
    assert not (tmp_path / "evil").exists()


def test_a_killed_transfer_goes_on(tmp_path):
    source = tmp_path / "big.h5"
    source.write_bytes(content(64 << 20))
    command = [sys.executable, "-m", "stemloop.cli", "transfer", str(source), str(tmp_path / "there"), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for wait in (0.2, 0.5, 0.8):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(wait)
        child.kill()
        child.wait()
        copy = tmp_path / "there/big.h5"
        assert not copy.exists() or copy.read_bytes() == source.read_bytes()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "there/big.h5").read_bytes() == source.read_bytes()


def test_the_command_moves_a_folder(tmp_path, capsys):
    for name in ("a.h5", "deep/b.h5", "empty"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content(0 if name == "empty" else 5000))
    for sent in (10000, 0):
        assert cli.main(["transfer", str(tmp_path / "run"), str(tmp_path / "there"), "--quiet"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(int(line.split(", ")[1].split()[0]) for line in lines) == sent
    assert (tmp_path / "there/run/deep/b.h5").read_bytes() == content(5000)
    assert cli.main(["transfer", str(tmp_path / "none"), str(tmp_path / "there")]) == 2


# -------------------------------------------------------------------------------------------- another stemloop

TOKEN = "a token that is long enough"


@pytest.fixture
def receiver(tmp_path):
    import uvicorn

    from stemloop.store.receiver import application

    line = socket.socket()
    line.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(tmp_path / "there", TOKEN), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{line.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    line.close()


def test_another_stemloop_takes_a_file(tmp_path, receiver):
    source = tmp_path / "run.h5"
    source.write_bytes(content(10 * CHUNK + 5))
    target = transfer.Receiver(receiver, TOKEN)
    manifest = Manifest.of(source, chunk=CHUNK)
    assert target.begin(manifest) == list(range(11))
    target.put(manifest, 3, content(10 * CHUNK + 5)[3 * CHUNK : 4 * CHUNK])
    assert target.settle(manifest) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert not (tmp_path / "there/run.h5").exists()
    assert send(source, target, chunk=CHUNK).sent == 9 * CHUNK + 5
    assert (tmp_path / "there/run.h5").read_bytes() == source.read_bytes()
    assert transfer.transfer(source, receiver, token=TOKEN)[0].sent == 0


def test_a_receiver_takes_nothing_from_strangers(tmp_path, receiver):
    source = tmp_path / "run.h5"
    source.write_bytes(content(10))
    for token in ("", "a token that is long enougH", TOKEN + "x"):
        with pytest.raises(NotAuthorised):
            send(source, transfer.Receiver(receiver, token))
    for body in (b"", b"[]", b"{}", b'{"manifest": 3}', b"[" * 100_000, b'{"manifest": {"name": "../x"}}'):
        with pytest.raises(InputError):
            transfer.Receiver(receiver, TOKEN)._ask("POST", "/begin", body)
    with pytest.raises(InputError, match="inside the destination"):
        send(source, transfer.Receiver(receiver, TOKEN), name="../evil")
    with pytest.raises(InputError, match="begin it again"):
        transfer.Receiver(receiver, TOKEN).settle(Manifest.of(source))
    with pytest.raises(InputError, match="https"):
        transfer.Receiver("http://example.org", TOKEN)
    assert not (tmp_path / "evil").exists() and not list((tmp_path).glob("there/*"))


def test_the_two_commands_speak_over_tls(tmp_path):
    """A receiver as its own process with a certificate; whoever does not trust it sends nothing."""
    from stemloop.instrument.tls import self_signed

    certificate, key = self_signed(tmp_path / "keys", ["127.0.0.1"])
    stranger, _ = self_signed(tmp_path / "others", ["127.0.0.1"])
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "run.h5").write_bytes(content(3 * CHUNK + 7))
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        port = line.getsockname()[1]
    words = [sys.executable, "-m", "stemloop.cli", "receive", tmp_path / "there", "--token-file", tmp_path / "token"]
    keys = ["--port", str(port), "--tls-cert", certificate, "--tls-key", key]
    with subprocess.Popen([str(word) for word in [*words, *keys]], stderr=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                assert process.poll() is None, process.stderr.read()
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            address, source = f"https://127.0.0.1:{port}", tmp_path / "run.h5"
            with pytest.raises(StorageError, match="certificate"):
                transfer.transfer(source, address, token=TOKEN, ca=str(stranger))
            with pytest.raises(NotAuthorised):
                transfer.transfer(source, address, token="a token of someone else", ca=str(certificate))
            assert not list((tmp_path / "there").glob("*.h5"))
            words = ["transfer", str(source), address, "--token-file", str(tmp_path / "token"), "--quiet"]
            assert cli.main([*words, "--ca", str(certificate)]) == 0
            assert (tmp_path / "there/run.h5").read_bytes() == source.read_bytes()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)


def test_a_receiver_that_is_gone_is_a_clear_error(tmp_path):
    (tmp_path / "run.h5").write_bytes(b"1")
    with pytest.raises(StorageError, match="cannot be reached"):
        transfer.transfer(tmp_path / "run.h5", "http://127.0.0.1:9", token=TOKEN)


# ---------------------------------------------------------------------------------------------------- a bucket


@pytest.fixture
def client(monkeypatch):
    boto3 = pytest.importorskip("boto3", reason="buckets need the extra s3")
    moto = pytest.importorskip("moto.server", reason="moto, a server that speaks S3, is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    made = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    made.create_bucket(Bucket="archive")
    yield made
    server.stop()


def test_a_bucket_takes_a_file_and_goes_on_after_a_cut(tmp_path, client):
    chunk = 5 << 20  # S3's least part
    source = tmp_path / "run.h5"
    source.write_bytes(content(2 * chunk + 5))
    manifest = Manifest.of(source, chunk=chunk, md5=True)
    first = transfer.Bucket("s3://archive/2026", client)
    assert first.begin(manifest) == [0, 1, 2]
    first.put(manifest, 1, source.read_bytes()[chunk : 2 * chunk])
    first.put(manifest, 2, b"wrong")
    assert first.settle(manifest) == [0, 2]
    first.put(manifest, 2, source.read_bytes()[2 * chunk :])
    done = send(source, transfer.Bucket("s3://archive/2026", client), chunk=chunk)
    assert done.sent == chunk
    assert client.get_object(Bucket="archive", Key="2026/run.h5")["Body"].read() == source.read_bytes()
    assert send(source, transfer.Bucket("s3://archive/2026", client), chunk=chunk).sent == 0
    source.write_bytes(b"other")
    with pytest.raises(InputError, match="differs"):
        send(source, transfer.Bucket("s3://archive/2026", client))
    assert send(source, transfer.Bucket("s3://archive/2026", client), overwrite=True).sent == 5
    with pytest.raises(StorageError, match="nobody"):
        send(source, transfer.Bucket("s3://nobody", client))


# -------------------------------------------------------------------------------------------- external commands


@pytest.mark.skipif(shutil.which("rsync") is None, reason="the command rsync is not installed")
def test_rsync_brings_a_file(tmp_path):
    source = tmp_path / "run.h5"
    source.write_bytes(content(100_000))
    transfer.rsync(source, f"{tmp_path}/copy.h5")
    assert (tmp_path / "copy.h5").read_bytes() == source.read_bytes()
    (tmp_path / "copy.h5").write_bytes(bytes(100_000))
    os.utime(tmp_path / "copy.h5", (os.stat(source).st_atime, os.stat(source).st_mtime))  # only its content tells
    transfer.rsync(source, f"{tmp_path}/copy.h5")
    assert (tmp_path / "copy.h5").read_bytes() == source.read_bytes()
    with pytest.raises(StorageError, match="rsync left with"):
        transfer.rsync(tmp_path / "none", f"{tmp_path}/copy.h5")


def test_the_command_line_of_globus_is_of_its_grammar():
    """``globus transfer [OPTIONS] SOURCE_ENDPOINT_ID[:SOURCE_PATH] DEST_ENDPOINT_ID[:DEST_PATH]``, as its help says;
    the service itself is not called here."""
    takes = {"--sync-level": {"exists", "size", "mtime", "checksum"}, "--label": None, "--format": {"json", "text"}}
    flags = {"--verify-checksum", "--encrypt"}
    command = transfer.globus_command("aaaa-1:/data/a b.h5", "bbbb-2:/archive/", label="run 7")
    assert command[:2] == ["globus", "transfer"]
    options, places = command[2 : command.index("--")], command[command.index("--") + 1 :]
    while options:
        name = options.pop(0)
        if name not in flags:
            known, value = takes[name], options.pop(0)
            assert known is None or value in known
    assert places == ["aaaa-1:/data/a b.h5", "bbbb-2:/archive/"]
    for bad in ("/data/a.h5", "--help", "aaaa:relative", "aa aa:/x"):
        with pytest.raises(InputError):
            transfer.globus_command(bad, "bbbb:/x")
    assert Path(places[1]).name == "archive"
