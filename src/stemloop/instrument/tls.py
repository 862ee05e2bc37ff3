"""Certificates for the server's port: one made here, and the fingerprint by which a client may know it."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stemloop.core.errors import InputError, MissingExtra, StorageError

#: How long a certificate made here is good for [days].
LIFE_DAYS = 397


def self_signed(directory: str | Path, hosts: Iterable[str] = ()) -> tuple[Path, Path]:
    """Make ``certificate.pem`` and ``key.pem`` (mode 0600) in ``directory``, unless both are there.

    Parameters
    ----------
    directory : path
        Where to; made if it is not there.
    hosts : iterable of str
        Names and addresses under which clients reach the server; this machine's name and loopback are added.

    Returns
    -------
    (Path, Path)
        Certificate and key: what ``serve(tls=...)`` takes. Copy the certificate to the clients, never the key.
    """
    directory = Path(directory)
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    if certificate.exists() and key.exists():
        return certificate, key
    chain, secret = _make([*dict.fromkeys([*hosts, socket.gethostname(), "localhost", "127.0.0.1", "::1"])])
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, data, mode in ((key, secret, 0o600), (certificate, chain, 0o644)):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                file.write(data)
    except OSError as error:
        raise StorageError(f"cannot write into {directory}: {error.strerror}. Choose a writable directory.") from None
    return certificate, key


def _make(hosts: list[str]) -> tuple[bytes, bytes]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError:
        raise MissingExtra(
            "a certificate is made with the package cryptography: pip install 'stemloop[server]', "
            "or give a certificate and key that you have."
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"stemloop on {hosts[0]}"[:64])])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=LIFE_DAYS))
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return built.public_bytes(serialization.Encoding.PEM), secret


def _general_name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def fingerprint(certificate: str | Path) -> str:
    """The SHA-256 (hex) of a certificate in PEM form: short enough to be read out over a telephone, nearly."""
    try:
        pem = Path(certificate).read_text(encoding="ascii")
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip())).hexdigest()
    except (OSError, ValueError) as error:
        raise InputError(f"{certificate} is no certificate in PEM form ({error}).") from None


def check_pair(certificate: str | Path, key: str | Path) -> None:
    """Raise ``InputError`` unless certificate and key can be read and belong together."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise InputError(f"the certificate {certificate} and the key {key} cannot be used: {error}.") from None
