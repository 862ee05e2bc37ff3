"""Files moved so that "done" means: every byte is there, compared, and on the disk.

A file is cut into chunks, each with a SHA-256. The destination says which chunks it holds already, the others are
sent, then the destination reads all of them back; chunks that differ are sent again. Only a file that is whole gets
its name. So a transfer that was cut off at any place goes on where it was, and a second one sends nothing.

Destinations: a folder (:class:`Folder`), a bucket of S3 (:class:`Bucket`, extra ``s3``) and another stemloop
(:class:`Receiver`, see :mod:`stemloop.store.receiver`). ``rsync`` and ``globus`` are called as external commands.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from stemloop.core.durable import sync_folder
from stemloop.core.errors import InputError, IntegrityError, MissingExtra, NotAuthorised, StorageError, from_code

CHUNK_BYTES = 8 << 20
#: Most chunks of a file: S3 takes 10,000 parts.
MOST_CHUNKS = 9_000
_ROUNDS = 4
_WINDOW = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Manifest:
    """What a file is: ``name`` (with ``/`` between folders), ``size``, ``sha256`` of the whole, and of each chunk of
    ``chunk`` bytes. ``md5`` of each, where the destination names its parts by it."""

    name: str
    size: int
    chunk: int
    sha256: str
    chunks: tuple[str, ...]
    md5: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, path: str | os.PathLike[str], name: str | None = None, chunk: int = CHUNK_BYTES, md5: bool = False
    ) -> Manifest:
        """Read ``path`` once and hash it."""
        size = os.path.getsize(path)
        chunk = max(chunk, -(-size // MOST_CHUNKS))
        whole, parts, others = hashlib.sha256(), [], []
        with open(path, "rb") as file:
            while piece := file.read(chunk):
                whole.update(piece)
                parts.append(hashlib.sha256(piece).hexdigest())
                if md5:
                    others.append(hashlib.md5(piece, usedforsecurity=False).hexdigest())
        if len(parts) != -(-size // chunk):
            raise InputError(f"{path} changed while it was read; wait until nobody writes to it.")
        return cls(name or Path(path).name, size, chunk, whole.hexdigest(), tuple(parts), tuple(others))

    def span(self, index: int) -> tuple[int, int]:
        """(offset, bytes) of a chunk."""
        offset = index * self.chunk
        return offset, min(self.chunk, self.size - offset)

    def check(self) -> None:
        """An :class:`InputError` if a stranger's manifest does not fit together or names a place elsewhere."""
        pure = PurePosixPath(self.name)
        if not self.name or pure.is_absolute() or ".." in pure.parts or "\0" in self.name or "\\" in self.name:
            raise InputError(f"{self.name!r} is no name of a file inside the destination.")
        hashes = (self.sha256, *self.chunks)
        fits = self.chunk > 0 and self.size >= 0 and len(self.chunks) == -(-self.size // self.chunk)
        if not fits or not all(re.fullmatch("[0-9a-f]{64}", word) for word in hashes):
            raise InputError(f"the manifest of {self.name!r} does not fit together.")


class Target(Protocol):
    """Where a file goes to. ``begin`` gives the chunks that are wanted still, None if the file is there; ``settle``
    reads back what is there, gives the chunks that are wrong, and the file its name if there are none."""

    def begin(self, manifest: Manifest, overwrite: bool) -> list[int] | None: ...

    def put(self, manifest: Manifest, index: int, data: bytes) -> None: ...

    def settle(self, manifest: Manifest) -> list[int]: ...


@dataclass(frozen=True)
class Sent:
    """A file that arrived: ``sent`` bytes went over, of ``size``; ``healed`` chunks had to be sent again."""

    name: str
    size: int
    sha256: str
    sent: int
    healed: int


def send(
    path: str | os.PathLike[str],
    target: Target,
    *,
    name: str | None = None,
    overwrite: bool = False,
    chunk: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> Sent:
    """Bring one file to ``target``; when this returns it is there, was compared with its SHA-256, and flushed.

    Errors: :class:`InputError` (the file changes, or another one has its name), :class:`IntegrityError` (the
    destination gives back other bytes, again and again), :class:`StorageError`, :class:`NotAuthorised`. What arrived
    stays there: call it again to go on.
    """
    manifest = Manifest.of(path, name, chunk, md5=isinstance(target, Bucket))
    wanted = target.begin(manifest, overwrite)
    if wanted is None:
        return Sent(manifest.name, manifest.size, manifest.sha256, 0, 0)
    sent = healed = 0
    with open(path, "rb") as file:
        for _ in range(_ROUNDS):
            for index in wanted:
                offset, size = manifest.span(index)
                data = os.pread(file.fileno(), size, offset)
                if hashlib.sha256(data).hexdigest() != manifest.chunks[index]:
                    raise InputError(f"{path} changed while it was sent; wait until nobody writes to it, and repeat.")
                target.put(manifest, index, data)
                sent += size
                if progress is not None:
                    progress(min(sent, manifest.size), manifest.size)
            wanted = target.settle(manifest)
            if not wanted:
                return Sent(manifest.name, manifest.size, manifest.sha256, sent, healed)
            healed += len(wanted)
    offset, size = manifest.span(wanted[0])
    raise IntegrityError(
        f"{manifest.name}: the destination gives back other bytes than were sent, {_ROUNDS} times "
        f"(bytes {offset} to {offset + size - 1}). Its disk or the way to it is broken."
    )


def transfer(
    source: str | os.PathLike[str],
    destination: str,
    *,
    overwrite: bool = False,
    token: str | None = None,
    ca: str | None = None,
    progress: Progress | None = None,
) -> list[Sent]:
    """Bring a file, or all files of a folder, to ``destination``: a folder, ``s3://bucket/prefix`` or
    ``https://host:port`` of another stemloop (``token``: of that; ``ca``: file with its certificate)."""
    root = Path(source)
    if not root.exists():
        raise InputError(f"there is no file {root}.")
    if destination.startswith("s3://"):
        target: Target = Bucket(destination)
    elif re.match("https?://", destination):
        target = Receiver(destination, token or "", ca)
    else:
        target = Folder(destination)
    return [send(path, target, name=name, overwrite=overwrite, progress=progress) for path, name in _files(root)]


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    if root.is_file():
        yield root, root.name
        return
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path, f"{root.absolute().name}/{path.relative_to(root).as_posix()}"


# ------------------------------------------------------------------------------------------------------- a folder


class Folder:
    """A folder of this machine, or one that is mounted. An unfinished file is called ``.NAME.SHA.part``."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def _paths(self, manifest: Manifest) -> tuple[Path, Path]:
        manifest.check()
        whole = self.folder / manifest.name
        if not whole.resolve().is_relative_to(self.folder.resolve()):
            raise InputError(f"{manifest.name!r} leads out of {self.folder} through a link.")
        return whole, whole.with_name(f".{whole.name[:100]}.{manifest.sha256[:16]}.part")

    def begin(self, manifest: Manifest, overwrite: bool = False) -> list[int] | None:
        whole, part = self._paths(manifest)
        with _writing(whole):
            if whole.exists():
                if whole.is_file() and whole.stat().st_size == manifest.size and not _wrong(whole, manifest):
                    return None
                if not overwrite:
                    raise InputError(f"{whole} is there already and differs; choose another place, or overwrite it.")
            whole.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as file:
                file.truncate(manifest.size)
            return _wrong(part, manifest)

    def put(self, manifest: Manifest, index: int, data: bytes) -> None:
        whole, part = self._paths(manifest)
        with _writing(whole), open(part, "r+b") as file:
            offset, size = manifest.span(index)
            if len(data) != size:
                raise InputError(f"chunk {index} of {manifest.name} has {size} bytes, not {len(data)}.")
            written = 0
            while written < size:
                written += os.pwrite(file.fileno(), memoryview(data)[written:], offset + written)

    def settle(self, manifest: Manifest) -> list[int]:
        whole, part = self._paths(manifest)
        with _writing(whole):
            with open(part, "r+b") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):  # read it from the disk, not from the memory
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            wrong = _wrong(part, manifest)
            if not wrong:
                os.replace(part, whole)
                for folder in dict.fromkeys((whole.parent, *_between(self.folder, whole.parent))):
                    sync_folder(folder)
            return wrong


def _between(top: Path, folder: Path) -> Iterator[Path]:
    while folder != top and top in folder.parents:
        folder = folder.parent
        yield folder


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}. What arrived is kept: make room, and repeat the transfer."
        ) from None


def _wrong(path: Path, manifest: Manifest) -> list[int]:
    """The chunks of ``path`` that are not as they should be."""
    found = []
    with open(path, "rb") as file:
        for index, wanted in enumerate(manifest.chunks):
            offset, size = manifest.span(index)
            digest = hashlib.sha256()
            for place in range(offset, offset + size, _WINDOW):
                digest.update(os.pread(file.fileno(), min(_WINDOW, offset + size - place), place))
            if digest.hexdigest() != wanted:
                found.append(index)
    return found


# ------------------------------------------------------------------------------------------------------- a bucket


class Bucket:
    """A bucket of S3, by multipart uploads; credentials and endpoint as ``boto3`` finds them (``AWS_ENDPOINT_URL``
    for another maker's). The object's metadata have ``sha256``. ``client``: one of ``boto3``, made if None."""

    def __init__(self, address: str, client: Any = None) -> None:
        found = re.fullmatch(r"s3://([^/]+)/?(.*)", address)
        if not found:
            raise InputError(f"{address!r} is no s3://bucket/prefix.")
        self.bucket, self.prefix = found[1], found[2].strip("/")
        if client is None:
            try:
                import boto3
            except ImportError:
                raise MissingExtra("buckets need boto3; install it with: pip install 'stemloop[s3]'.") from None
            client = boto3.client("s3")
        self._client = client
        self._upload: dict[str, str] = {}

    def _key(self, manifest: Manifest) -> dict[str, str]:
        manifest.check()
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{manifest.name}".lstrip("/")}

    def begin(self, manifest: Manifest, overwrite: bool = False) -> list[int] | None:
        key = self._key(manifest)
        with _reaching(key):
            head = self._head(key)
            if head is not None:
                same = head.get("Metadata", {}).get("sha256") == manifest.sha256
                if same and head["ContentLength"] == manifest.size and self._digest(key) == manifest.sha256:
                    return None
                if not overwrite and not same:
                    raise InputError(f"s3://{key['Bucket']}/{key['Key']} is there already and differs; overwrite it?")
            if not manifest.chunks:
                return []
            self._upload[manifest.name] = upload = self._unfinished(manifest, key)
            held = self._parts(key, upload)
            return [i for i in range(len(manifest.chunks)) if not _is(manifest, i, held.get(i))]

    def _unfinished(self, manifest: Manifest, key: dict[str, str]) -> str:
        """An upload of this very file that was cut off, or a new one."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=key["Key"])
        for page in pages:
            for upload in page.get("Uploads", ()):
                if upload["Key"] == key["Key"]:
                    held = self._parts(key, upload["UploadId"])
                    if held and all(_is(manifest, i, part) for i, part in held.items()):
                        return str(upload["UploadId"])
        made = self._client.create_multipart_upload(
            **key, ChecksumAlgorithm="SHA256", Metadata={"sha256": manifest.sha256}
        )
        return str(made["UploadId"])

    def _parts(self, key: dict[str, str], upload: str) -> dict[int, dict[str, Any]]:
        """What the service says of the chunks that an upload holds."""
        pages = self._client.get_paginator("list_parts").paginate(**key, UploadId=upload)
        return {part["PartNumber"] - 1: part for page in pages for part in page.get("Parts", ())}

    def put(self, manifest: Manifest, index: int, data: bytes) -> None:
        key = self._key(manifest)
        with _reaching(key):
            word = base64.b64encode(bytes.fromhex(manifest.chunks[index])).decode()
            upload = self._upload.get(manifest.name) or self._renewed(manifest, key)
            self._client.upload_part(**key, UploadId=upload, PartNumber=index + 1, Body=data, ChecksumSHA256=word)

    def _renewed(self, manifest: Manifest, key: dict[str, str]) -> str:
        self._upload[manifest.name] = upload = self._unfinished(manifest, key)
        return upload

    def settle(self, manifest: Manifest) -> list[int]:
        key = self._key(manifest)
        with _reaching(key):
            if not manifest.chunks:
                self._client.put_object(**key, Body=b"", Metadata={"sha256": manifest.sha256})
                return []
            upload = self._upload[manifest.name]
            held = self._parts(key, upload)
            wrong = [i for i in range(len(manifest.chunks)) if not _is(manifest, i, held.get(i))]
            if wrong:
                return wrong
            names = ("PartNumber", "ETag", "ChecksumSHA256")
            parts = [{name: held[i][name] for name in names if name in held[i]} for i in sorted(held)]
            self._client.complete_multipart_upload(**key, UploadId=upload, MultipartUpload={"Parts": parts})
            del self._upload[manifest.name]
            return [] if self._digest(key) == manifest.sha256 else list(range(len(manifest.chunks)))

    def _head(self, key: dict[str, str]) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            return dict(self._client.head_object(**key))
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise

    def _digest(self, key: dict[str, str]) -> str:
        """SHA-256 of the object as it is given back."""
        digest = hashlib.sha256()
        for piece in self._client.get_object(**key)["Body"].iter_chunks(_WINDOW):
            digest.update(piece)
        return digest.hexdigest()


def _is(manifest: Manifest, index: int, part: dict[str, Any] | None) -> bool:
    """Whether a part of an upload is the chunk: by its SHA-256 if the service tells it, else by its MD5."""
    if part is None or index >= len(manifest.chunks):
        return False
    if word := part.get("ChecksumSHA256"):
        return base64.b64decode(word).hex() == manifest.chunks[index]
    return bool(manifest.md5) and part["ETag"].strip('"') == manifest.md5[index]


@contextlib.contextmanager
def _reaching(key: dict[str, str]) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        word = " ".join(str(error).split())[:200]
        raise StorageError(f"s3://{key['Bucket']}: {word} What arrived is kept; repeat the transfer.") from None


# --------------------------------------------------------------------------------------------- another stemloop


class Receiver:
    """The receiver of another stemloop at ``https://host:port`` (``stemloop receive``)."""

    def __init__(self, address: str, token: str, ca: str | None = None, timeout_s: float = 60.0) -> None:
        parts = urllib.parse.urlsplit(address)
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        if not parts.hostname or (parts.scheme != "https" and not local):
            raise InputError(f"{address}: a receiver on another machine is reached by https:// only.")
        self._address, self._token, self._timeout_s = parts, token, timeout_s
        self._tls = ssl.create_default_context(cafile=ca) if parts.scheme == "https" else None

    def _ask(self, method: str, path: str, body: bytes) -> Any:
        host, port = str(self._address.hostname), self._address.port
        try:
            if self._tls is not None:
                line: http.client.HTTPConnection = http.client.HTTPSConnection(
                    host, port, timeout=self._timeout_s, context=self._tls
                )
            else:
                line = http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            with contextlib.closing(line):
                line.request(method, path, body, {"Authorization": f"Bearer {self._token}"})
                answer = line.getresponse()
                said = json.loads(answer.read(1 << 22) or b"null")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StorageError(
                f"{self._address.netloc} cannot be reached: {error}. What arrived is kept; repeat the transfer."
            ) from None
        if answer.status == 401:
            raise NotAuthorised(f"{self._address.netloc} does not know this token; give one with --token-file.")
        if answer.status != 200:
            known = said if isinstance(said, dict) else {}
            raise from_code(str(known.get("code", "error")), str(known.get("message", f"status {answer.status}")))
        return said

    def begin(self, manifest: Manifest, overwrite: bool = False) -> list[int] | None:
        body = json.dumps({"manifest": asdict(manifest), "overwrite": overwrite}).encode()
        wanted: list[int] | None = self._ask("POST", "/begin", body)["wanted"]
        return wanted

    def put(self, manifest: Manifest, index: int, data: bytes) -> None:
        self._ask("PUT", f"/chunk/{manifest.sha256}/{index}", data)

    def settle(self, manifest: Manifest) -> list[int]:
        wrong: list[int] = self._ask("POST", f"/settle/{manifest.sha256}", b"")["wrong"]
        return wrong


# ---------------------------------------------------------------------------------------------- external commands


def rsync_command(source: str | os.PathLike[str], destination: str) -> list[str]:
    """The command line of ``rsync`` that resumes, and compares contents."""
    return ["rsync", "--archive", "--partial", "--checksum", "--fsync", "--", os.fspath(source), destination]


def rsync(source: str | os.PathLike[str], destination: str, timeout_s: float | None = None) -> None:
    """Bring ``source`` to ``destination`` (a path or ``host:path``) by the external ``rsync`` (3.2.4 or later), and
    let it compare all contents once more."""
    command = rsync_command(source, destination)
    if shutil.which("rsync") is None:
        raise MissingExtra("the command rsync is not installed; install it, or use another destination.")
    _external(command, timeout_s)
    left = _external([*command[:1], "--dry-run", "--itemize-changes", *command[1:]], timeout_s).strip()
    if left:
        raise IntegrityError(f"rsync: {destination} still differs after the transfer: {left.splitlines()[0]}")


def globus_command(source: str, destination: str, label: str = "stemloop") -> list[str]:
    """The command line of the Globus CLI that brings ``ENDPOINT:/path`` to ``ENDPOINT:/path`` with checksums.

    >>> globus_command("aaaa:/data/run.h5", "bbbb:/archive/run.h5")[:4]
    ['globus', 'transfer', '--sync-level', 'checksum']
    """
    for place in (source, destination):
        if not re.fullmatch(r"[0-9A-Za-z-]+:/.*", place):
            raise InputError(f"{place!r} is no place for Globus; write ENDPOINT:/path.")
    options = ["--sync-level", "checksum", "--verify-checksum", "--encrypt", "--label", label, "--format", "json"]
    return ["globus", "transfer", *options, "--", source, destination]


def globus(source: str, destination: str, timeout_s: float | None = None) -> str:
    """Submit a transfer to Globus by its external command line and wait for it; returns its task's id."""
    if shutil.which("globus") is None:
        raise MissingExtra("the command globus is not installed; install it with: pip install globus-cli.")
    said = json.loads(_external(globus_command(source, destination), timeout_s))
    task = str(said["task_id"])
    _external(["globus", "task", "wait", task], timeout_s)
    return task


def _external(command: Sequence[str], timeout_s: float | None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise StorageError(f"{command[0]} was not done in {timeout_s:g} s; repeat it to go on.") from None
    if done.returncode:
        word = (done.stderr or done.stdout).strip().splitlines()
        raise StorageError(f"{command[0]} left with {done.returncode}: {word[-1][:200] if word else 'no message'}")
    return done.stdout


__all__ = [
    "Bucket",
    "Folder",
    "Manifest",
    "Receiver",
    "Sent",
    "globus",
    "globus_command",
    "rsync",
    "rsync_command",
    "send",
    "transfer",
]
