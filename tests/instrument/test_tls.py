"""One TLS port: what leaves loopback is encrypted, and a client knows whom it speaks to."""

import json
import random
import socket
import ssl
import stat
import threading
import time
import urllib.request
from contextlib import suppress

import pytest
from counting_instrument import TOKENS
from stoppable import Line
from websockets.exceptions import WebSocketException

from stemloop.core.errors import InputError
from stemloop.instrument.duplex import DuplexSocket
from stemloop.instrument.tls import fingerprint, self_signed
from stemloop.instrument.tokens import TokenFile

pytest.importorskip("cryptography", reason="cryptography is not installed (the extra server)")


@pytest.fixture
def pair(tmp_path):
    return self_signed(tmp_path / "tls", ["scope.example.org", "192.0.2.7"])


def trusting(certificate):
    return ssl.create_default_context(cafile=str(certificate))


def test_commands_and_rest_over_one_tls_port(served, pair):
    one = served(tls=pair)
    with Line(one, ssl=trusting(pair[0])) as agent:
        assert one.url.startswith("wss://")
        assert agent.reply(agent.execute("a", agent.ask(op="acquire")["fencing"]))["frames"].shape == (1, 8, 8)
        url = one.url.replace("wss", "https") + "/state"
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKENS['viewer']}"})
        with urllib.request.urlopen(asked, context=trusting(pair[0]), timeout=10) as answer:
            assert json.loads(answer.read())["epoch"] == 1
        seen = ssl.get_server_certificate((one.url.split("://")[1].split(":")[0], int(one.url.rsplit(":", 1)[1])))
        address = json.loads((one.directory / "address.json").read_text())
        one.directory.joinpath("seen.pem").write_text(seen)
        assert fingerprint(one.directory / "seen.pem") == address["fingerprint"] == fingerprint(pair[0])


def test_neither_plain_words_nor_a_strange_certificate_pass(served, pair, tmp_path):
    one = served(tls=pair)
    with pytest.raises(ssl.SSLError):
        Line(one, ssl=ssl.create_default_context())
    other = self_signed(tmp_path / "other")
    with pytest.raises(ssl.SSLError):
        Line(one, ssl=trusting(other[0]))
    plain = type("Plain", (), {"url": one.url.replace("wss", "ws")})
    with pytest.raises((WebSocketException, OSError, EOFError)):
        Line(plain)
    with Line(one, "viewer", ssl=trusting(pair[0])) as viewer:
        assert viewer.ask(op="dose")["ok"]


def test_leaving_loopback_needs_tls_and_tokens(served, pair):
    one = served(host="0.0.0.0", tls=pair, tokens=None)
    one.wait()
    assert isinstance(one.error, InputError) and "instrument token issue" in str(one.error)
    token, _ = TokenFile(one.directory / "tokens.json").issue("agent")
    two = served(host="0.0.0.0", tls=pair, tokens=None)
    two.url  # it is up
    assert not (two.directory / "local.json").exists()
    there = type("There", (), {"url": two.url.replace("0.0.0.0", "127.0.0.1")})
    with Line(there, None, ssl=trusting(pair[0])) as agent:
        assert agent.ask(op="hello", token=token)["who"] == "agent"


def test_the_pair_is_made_once_and_the_key_is_private(pair, tmp_path):
    certificate, key = pair
    before = key.read_bytes()
    assert self_signed(tmp_path / "tls") == pair and key.read_bytes() == before
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "PRIVATE" not in certificate.read_text()


def test_a_pair_that_does_not_fit_is_refused(served, pair, tmp_path):
    other = self_signed(tmp_path / "other")
    one = served(tls=(pair[0], other[1]))
    one.wait()
    assert isinstance(one.error, InputError) and "cannot be used" in str(one.error)


def test_the_server_sends_no_session_tickets(served, pair):
    # a client that reads in one thread and writes in another loses its first words if they meet a ticket
    with Line(served(tls=pair), ssl=trusting(pair[0])) as agent:
        assert agent.ask(op="dose")["ok"]
        assert not agent.socket.socket.session.has_ticket


def tickets(pair):
    """A server of TLS 1.3 that sends many session tickets and echoes, and its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    context.num_tickets = 100
    listener = socket.create_server(("127.0.0.1", 0))

    def echo():
        with context.wrap_socket(listener.accept()[0], server_side=True) as line:
            while data := line.recv(65536):
                line.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    return listener.getsockname()[1]


def read_to_the_end(line):
    with suppress(OSError):
        line.recv(1)


def test_a_tls_socket_is_read_and_written_at_once(pair):
    context = trusting(pair[0])
    context.sslsocket_class = DuplexSocket
    rng = random.Random(1)
    words = rng.randbytes(1 << 18)
    for _ in range(10):
        plain = socket.create_connection(("127.0.0.1", tickets(pair)))
        line = context.wrap_socket(plain, server_hostname="localhost")
        heard = []

        def listen(line=line, heard=heard):
            while sum(map(len, heard)) < len(words):
                heard.append(line.recv(rng.randint(1, 50000)))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        at = 0
        while at < len(words):
            step = rng.randint(1, 30000)
            line.sendall(words[at : at + step])
            at += step
        listener.join(20)
        assert b"".join(heard) == words
        line.settimeout(0.2)
        with pytest.raises(TimeoutError):
            line.recv(1)
        line.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            line.recv(1)
        line.setblocking(True)
        reader = threading.Thread(target=read_to_the_end, args=(line,), daemon=True)
        reader.start()
        time.sleep(0.05)
        line.close()
        reader.join(5)
        assert not reader.is_alive()  # closing wakes who waits
