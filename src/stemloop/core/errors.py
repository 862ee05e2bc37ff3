"""One tree of errors.

Every error that a user can meet is a :class:`StemloopError`. Its message says what happened, where, and how to
mend it, in one or two lines; the command line prints it and leaves with ``exit_code``.

::

    StemloopError
    ├── InputError            what was given cannot be used (2)
    │   ├── UnknownName       a specimen, recipe, calculator ... that is not registered
    │   └── UnreadableFile    a file that is missing, broken, hostile or of another kind
    ├── MissingExtra          an optional package is needed and not installed (2)
    ├── StorageError          the disk refused: full, read-only, not writable (2)
    ├── IntegrityError        stored bytes are not what they were when written (2)
    ├── Refused               the instrument server said no (2)
    │   ├── NotAuthorised     wrong or expired token, or a role that may not do this
    │   ├── LeaseError        no lease, a lost lease or an old fencing number
    │   ├── LimitError        outside a declared limit
    │   └── DoseError         the dose budget does not cover the exposure
    ├── InstrumentError       the instrument failed or cannot be reached (1)
    │   ├── Aborted           a running command was ended early; what was exposed until then counts
    │   └── OutcomeUnknown    an exposure was begun and nobody knows whether it ended; it is not repeated
    └── CalculationError      a calculation did not converge or left its range (1)
"""

from __future__ import annotations


class StemloopError(Exception):
    """Root of the tree. ``code`` names the kind on the wire, ``exit_code`` is the process's exit status."""

    code = "error"
    exit_code = 1


class InputError(StemloopError):
    """What was given cannot be used."""

    code = "input"
    exit_code = 2


class UnknownName(InputError):
    """A name that nothing is registered under."""

    code = "unknown-name"


class UnreadableFile(InputError):
    """A file that is missing, broken, hostile or of another kind than its name says."""

    code = "unreadable-file"


class MissingExtra(StemloopError):
    """An optional package is needed and not installed."""

    code = "missing-extra"
    exit_code = 2


class StorageError(StemloopError):
    """The disk refused to take or keep data."""

    code = "storage"
    exit_code = 2


class IntegrityError(StemloopError):
    """Stored bytes are not what they were when they were written."""

    code = "integrity"
    exit_code = 2


class Refused(StemloopError):
    """The instrument server refused a command; nothing was exposed and nothing moved."""

    code = "refused"
    exit_code = 2


class NotAuthorised(Refused):
    """The token is wrong or expired, or its role may not do this."""

    code = "not-authorised"


class LeaseError(Refused):
    """The command came without the lease, after it was lost, or with an old fencing number."""

    code = "lease"


class LimitError(Refused):
    """The command asks for something outside a declared limit."""

    code = "limit"


class DoseError(Refused):
    """The dose budget that is left does not cover the exposure."""

    code = "dose"


class InstrumentError(StemloopError):
    """The instrument failed or cannot be reached."""

    code = "instrument"


class Aborted(InstrumentError):
    """A running command was ended before its end. ``exposed`` is the number of positions that the beam met until then,
    the one it was on included; None if the instrument does not know (then all of them are charged)."""

    code = "aborted"

    def __init__(self, message: str, exposed: int | None = None) -> None:
        super().__init__(message)
        self.exposed = exposed


class OutcomeUnknown(InstrumentError):
    """An exposure was begun and its end was never seen. It counts as exposed and is not repeated."""

    code = "outcome-unknown"


class CalculationError(StemloopError):
    """A calculation did not converge, or was asked outside the range where it holds."""

    code = "calculation"


def _tree(root: type[StemloopError]) -> dict[str, type[StemloopError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_code(code: str, message: str) -> StemloopError:
    """Rebuild an error that crossed a wire as ``(code, message)``; unknown codes become the root."""
    return _tree(StemloopError).get(code, StemloopError)(message)
