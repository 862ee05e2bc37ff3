"""A guarded connection to an instrument's server: what the loop, a script and a notebook hold of a microscope.

>>> with stemloop.connect("wss://microscope:8443", token=..., ca="microscope.pem") as scope:  # doctest: +SKIP
...     with scope.lease():
...         image = scope.image(fov_nm=20, shape=(512, 512), dwell_us=2)

A :class:`Client` is synchronous and may be used from several threads. It keeps its lease alive in the background
while its owner thinks, comes back after a dropped connection, and repeats a command with the same id, which exposes
nothing twice. Ctrl-C during a command ends it on the server and blanks the beam.
:class:`~stemloop.instrument.aclient.AsyncClient` has the same words to be awaited.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import Aborted, InputError, IntegrityError, LeaseError, StemloopError
from stemloop.core.instruction import Blank, Instruction
from stemloop.core.protocols import Exposure, InstrumentInfo
from stemloop.instrument import wire
from stemloop.instrument.connection import DROPPED, Address, Connection
from stemloop.instrument.cost import Cost, Costs
from stemloop.instrument.progress import Progress, show
from stemloop.instrument.tokens import ROLES
from stemloop.instrument.words import Words

__all__ = ["Address", "Client", "connect"]

#: How long [s] Ctrl-C waits for the instrument's word that a scan has ended.
ABORT_S = 10.0
#: Frames are fetched in pieces of about so many bytes.
PIECE_BYTES = 64 * 2**20

#: Called with (positions done, positions in all); True draws a bar.
Watching = bool | Callable[[int, int], None]


def connect(
    address: Address,
    token: str | None = None,
    role: str | None = None,
    *,
    ca: str | Path | None = None,
    lease: bool = False,
    takeover: bool = False,
    ttl_s: float = 10.0,
    patience_s: float = 30.0,
    progress: Watching = False,
) -> Client:
    """Connect to an instrument's server.

    Parameters
    ----------
    address : path, str or dict
        ``"wss://host:port"`` or, without encryption on the same machine, ``"ws://host:port"`` or ``"host:port"``; or
        the server's directory (it is waited for and followed when the server starts again on another port), or the
        contents of its ``address.json``.
    token : str, optional
        The secret; without it that of ``role`` is read from ``local.json`` in the server's directory.
    role : str, optional
        The role that is needed: ``viewer``, ``agent``, ``operator`` or ``engineer``. Without it that of the token, and
        ``agent`` for a directory.
    ca : path or str, optional
        The certificate of the server, or of the authority that signed it (a PEM file), or the SHA-256 of the server's
        certificate (64 hex digits). Without it the authorities that this computer trusts.
    lease, takeover : bool
        Acquire the lease at once; take it over from whoever holds it, which a higher role may.
    ttl_s : float
        How long [s] the lease lives without a sign of this process.
    patience_s : float
        How long [s] to try again when the server cannot be reached, at the start and later.
    progress : bool or callable
        Of every command: True draws a bar, a function is called with (positions done, positions in all).

    Raises
    ------
    InstrumentError
        If the server cannot be reached in ``patience_s``.
    NotAuthorised, LeaseError
        If the token or the certificate is wrong or the role too low; if somebody else holds the lease.
    """
    if role is not None and role not in ROLES:
        raise InputError(f"unknown role {role!r}; known: {', '.join(ROLES)}.")
    client = Client(address, token, role, ttl_s, patience_s, ca=ca, progress=progress)
    if lease or takeover:
        try:
            client.acquire(takeover)
        except BaseException:
            client.close()
            raise
    return client


class Client(Words, Connection):
    """A connection to an instrument's server; implements :class:`~stemloop.core.protocols.Scope`.

    Made by :func:`connect`. Errors of the server come back as themselves. As a context manager it closes itself.
    The words of a notebook (``image``, ``diffraction``, ``spectrum``, ``optics``, ``stage`` ...) are those of
    :class:`~stemloop.instrument.words.Words`.
    """

    def __init__(
        self,
        address: Address,
        token: str | None,
        role: str | None,
        ttl_s: float = 10.0,
        patience_s: float = 30.0,
        *,
        ca: str | Path | None = None,
        progress: Watching = False,
    ) -> None:
        super().__init__(address, token, role, ca, patience_s)
        self.fencing: int | None = None
        self.progress: Watching = progress
        self._ttl_s = ttl_s
        self._lease_id: str | None = None
        self._taken_by: tuple[str, int] | None = None
        self._watched: tuple[str, Progress] | None = None
        reply = self._ask({"op": "info"})
        self._info = wire.info_from_message(reply["info"])
        self.limits: dict[str, Any] = reply["limits"]
        threading.Thread(target=self._beat, name="lease heartbeat", daemon=True).start()

    # -------------------------------------------------------------------------------------------------- the scope

    @property
    def info(self) -> InstrumentInfo:
        """What the instrument is."""
        return self._info

    def execute(self, instruction: Instruction, command_id: str, data: str = "inline") -> Exposure:
        """Carry out an instruction under the lease.

        An id that was executed before answers its first result and exposes nothing. With ``data="stream"`` the frames
        travel through the server's stream: ``frames`` is None and ``calibration`` says ``stream``, ``first``,
        ``count``. With ``data="reference"`` they stay on the server and ``calibration["reference"]`` names them for
        :meth:`fetch`.
        """
        return wire.exposure_from_message(self._execute(instruction, command_id, data))

    def _execute(self, instruction: Instruction, command_id: str, data: str) -> dict[str, Any]:
        message = {"op": "execute", "id": command_id, "instruction": wire.instruction_to_message(instruction)}
        try:
            reply = self._ask({**message, "data": data})
        except KeyboardInterrupt:
            raise self._interrupted(command_id) from None
        except LeaseError as error:
            raise self._explained(error) from None
        except Aborted as error:
            if self._taken_by is None:
                raise
            by, number = self._taken_by
            raise LeaseError(f"{by} took the lease over (number {number}) while this ran: {error}") from error
        if "reference" in reply:
            reply = {**reply, "frames": None, "calibration": {**reply["calibration"], "reference": reply["reference"]}}
        return reply

    def perform(
        self,
        instruction: Instruction,
        command_id: str | None = None,
        data: str = "inline",
        progress: Watching | None = None,
    ) -> tuple[Exposure, dict[str, Any]]:
        """Carry out an instruction and bring its frames, however they travel; also what proves where they are from.

        Parameters
        ----------
        instruction : Instruction
            What to do.
        command_id : str, optional
            Its id; without it a new one is made. An error names the id as its attribute ``command_id``.
        data : str
            ``inline``, or ``reference`` for many frames: they are fetched in pieces and checked by their SHA-256.
        progress : bool or callable, optional
            As in :func:`connect`.

        Returns
        -------
        exposure : Exposure
        proof : dict
            ``command_id``, ``sha256`` (as in the server's audit), ``fencing``, ``who``.
        """
        command_id = command_id or f"{self.who}-{secrets.token_hex(8)}"
        watching = self.progress if progress is None else progress
        try:
            with show(watching, instruction.kind, instruction.exposed_positions) as shown:
                self._watched = (command_id, shown)
                reply = self._execute(instruction, command_id, data)
                exposure = wire.exposure_from_message(reply)
                if "reference" in reply:
                    exposure = _with_frames(exposure, self.fetch(reply["reference"]))
        except StemloopError as error:
            error.command_id = command_id  # type: ignore[attr-defined]
            raise
        finally:
            self._watched = None
        proof = {"command_id": command_id, "sha256": reply.get("sha256"), "fencing": self.fencing, "who": self.who}
        return exposure, proof

    def fetch(self, reference: dict[str, Any]) -> NDArray[Any]:
        """The frames that an exposure left on the server, fetched in pieces; ``reference`` is what it answered.

        Raises
        ------
        IntegrityError
            If what came has not the SHA-256 that the server gave when it took the frames.
        """
        dtype, shape = np.dtype(str(reference["dtype"])), tuple(int(size) for size in reference["shape"])
        frames = np.empty(shape, dtype)
        digest = hashlib.sha256(f"{dtype.str}{shape}".encode())  # as core.record.content_hash does
        step = max(1, PIECE_BYTES // max(1, frames[:1].nbytes))
        for first in range(0, len(frames), step):
            count = min(step, len(frames) - first)
            piece = self._ask({"op": "fetch", "key": reference["key"], "first": first, "count": count})["frames"]
            if piece.shape != (count, *shape[1:]) or piece.dtype != dtype:
                raise IntegrityError(f"the frames {first} to {first + count - 1} came as {piece.dtype} {piece.shape}.")
            frames[first : first + count] = piece
            digest.update(np.ascontiguousarray(piece).data)
        if digest.hexdigest() != reference["sha256"]:
            raise IntegrityError(
                f"the frames of {reference['key']!r} are not those that were taken (SHA-256 {digest.hexdigest()[:12]}, "
                f"not {str(reference['sha256'])[:12]}): fetch them again; if it stays so, check the server's disk."
            )
        frames.flags.writeable = False
        return frames

    def state(self) -> dict[str, Any]:
        """The instrument's state vector."""
        return dict(self._ask({"op": "state"})["state"])

    def dose(self) -> dict[str, float]:
        """``budget``, ``spent``, ``reserved`` and ``left`` in electrons."""
        return dict(self._ask({"op": "dose"})["dose"])

    def plan(self, instructions: Sequence[Instruction]) -> Costs:
        """What the instructions would cost and whether they would be refused. Touches nothing, needs no lease."""
        steps = [wire.instruction_to_message(instruction) for instruction in instructions]
        reply = self._ask({"op": "check", "plan": steps})
        return Costs(
            tuple(
                Cost(
                    i.kind, i, float(s["electrons"]), float(s["seconds"]), str(s["verdict"]), str(s.get("message", ""))
                )
                for i, s in zip(instructions, reply["steps"], strict=True)
            )
        )

    def abort(self) -> None:
        """End the command that runs now, as soon as the instrument can; from any thread, by the holder of the lease or
        a higher role. The command itself raises ``Aborted``, which says how many positions were exposed."""
        self._ask_beside({"op": "abort"})

    def close(self) -> None:
        """Give the lease back, if there is one, and leave."""
        self._closed.set()
        with self._lock:
            if self._socket is not None:
                if self._lease_id is not None:
                    with suppress(*DROPPED, StemloopError):
                        self._exchange({"op": "release"})
                self._drop()
            self._forget()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        driving = f"drives with number {self.fencing}" if self.fencing is not None else "does not hold the lease"
        height, width = (size * 1e9 for size in self.info.field_m)
        return (
            f"<{self.info.name} at {self._address}: {self.who} {driving}; field {height:.4g} x {width:.4g} nm, "
            f"{self.info.energy_eV / 1e3:g} kV; {', '.join(self.info.instructions)}>"
        )

    # -------------------------------------------------------------------------------------------------- the lease

    def acquire(self, takeover: bool = False) -> int:
        """Take the lease; returns its fencing number, which every command carries from now on."""
        with self._lock:
            self._keep(self._ask({"op": "acquire", "ttl_s": self._ttl_s, "takeover": takeover}))
            assert self.fencing is not None
            return self.fencing

    def release(self) -> None:
        """Give the lease back; the server blanks the beam."""
        with self._lock:
            if self._lease_id is not None:
                self._ask({"op": "release"})
            self._forget()

    @contextmanager
    def lease(self, takeover: bool = False) -> Iterator[int]:
        """Hold the lease inside a ``with`` block; gives its fencing number. At its end the server blanks the beam."""
        fencing = self.acquire(takeover)
        try:
            yield fencing
        finally:
            self.release()

    def _keep(self, reply: dict[str, Any]) -> None:
        self._lease_id, self.fencing = str(reply["lease_id"]), int(reply["fencing"])
        self._taken_by = None

    def _forget(self) -> None:
        self._lease_id = self.fencing = None

    def _lease(self) -> tuple[str | None, int | None]:
        return self._lease_id, self.fencing

    def _beat(self) -> None:
        """Renew the lease while nothing else does. A request under way renews it as well."""
        while not self._closed.wait(self._ttl_s / 4):
            if self._lease_id is not None and self._lock.acquire(blocking=False):
                try:
                    self._ask({"op": "renew"}, patience_s=self._ttl_s / 4)
                except (StemloopError, *DROPPED):
                    pass  # the next command meets the same error and says it to somebody
                finally:
                    self._lock.release()

    def _greeted(self, hello: dict[str, Any]) -> None:
        """Our lease may be gone (the server started again, or we were away too long): take it if nobody drove since."""
        if self._lease_id is None or hello["leased"]:
            return
        try:
            self._keep(self._exchange({"op": "acquire", "ttl_s": self._ttl_s, "expected": self.fencing}))
        except LeaseError as error:
            self._forget()
            raise self._explained(error) from None

    def _explained(self, error: LeaseError) -> LeaseError:
        """The refusal, with who took the lease from us if the server told us when it happened."""
        if self._taken_by is None or self._taken_by[0] in str(error):
            return error
        return LeaseError(f"{error} It was taken over by {self._taken_by[0]} (number {self._taken_by[1]}).")

    # ------------------------------------------------------------------------------------------------- what happens

    def _happened(self, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "progress":
                if self._watched is not None and self._watched[0] == event.get("id"):
                    self._watched[1](int(event["done"]), int(event["of"]))
            case "lease-lost":
                self._taken_by = str(event.get("by")), int(event.get("fencing") or 0)

    def _interrupted(self, command_id: str) -> KeyboardInterrupt:
        """Ctrl-C: end the command on the server, blank the beam, and say how far it came."""
        said = "the line to the server was cut; it blanks the beam when the lease has run out"
        try:
            with self._lock:
                said = self._end_command(command_id)
        except (StemloopError, *DROPPED) as error:
            said = f"the server did not confirm that it ended ({error})"
            with self._lock:
                self._drop()
        return KeyboardInterrupt(f"the command {command_id!r} was interrupted: {said}")

    def _end_command(self, command_id: str) -> str:
        self._reach()
        running, said = self._running, "it had ended"
        with suppress(StemloopError):  # nothing runs any more
            self._wait(self._send({"op": "abort"}), ABORT_S)
        if running in self._replies:
            try:
                self._wait(running, ABORT_S)
            except StemloopError as error:
                said = str(error)
        if "blank" in self.info.instructions:
            self._exchange(
                {
                    "op": "execute",
                    "id": f"{command_id} interrupted {secrets.token_hex(4)}",
                    "instruction": wire.instruction_to_message(Blank()),
                    "data": "inline",
                }
            )
            said = f"{said.rstrip('.')}; the beam is blanked."
        return said


def _with_frames(exposure: Exposure, frames: NDArray[Any]) -> Exposure:
    from dataclasses import replace

    return replace(exposure, frames=frames)
