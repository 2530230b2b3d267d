"""All user-visible errors. Each message names what failed, the value, and the remedy."""

from collections.abc import Sequence


class SpeedAsyncError(Exception):
    """Base class of all expected errors. `str(error)` is a complete message for the user."""


CONFIG_FILE = "CONFIG"
"""Stands for the field name when the file itself cannot be used."""


class ConfigError(SpeedAsyncError):
    """A configuration value cannot be used."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        name = "config" if field == CONFIG_FILE else f"config field '{field}' ="
        super().__init__(f"{name} {value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy

    @property
    def errors(self) -> "Sequence[ConfigError]":
        """This error, or all errors that it combines."""
        return (self,)


class NotAvailableHere(ConfigError):
    """The value names something that this machine lacks, such as a GPU, a library, or files that
    are yet to be downloaded or prepared. The same value may be right on another machine."""


class NotDownloaded(NotAvailableHere):
    """The value names a model or data set of the hub that is not in the cache; a run downloads
    it."""


class ConfigErrors(ConfigError):
    """Several values cannot be used; `field`, `value` and `remedy` are those of the first."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(errors[0].field, errors[0].value, errors[0].remedy)
        self._errors = tuple(errors)

    @property
    def errors(self) -> Sequence[ConfigError]:
        return self._errors

    def __str__(self) -> str:
        listed = "".join(f"\n  {error}" for error in self._errors)
        return f"{len(self._errors)} config values cannot be used:{listed}"

    @staticmethod
    def of(errors: Sequence[ConfigError]) -> ConfigError:
        """Return the only error, or one error that combines all of them."""
        return errors[0] if len(errors) == 1 else ConfigErrors(errors)


class DataError(SpeedAsyncError):
    """A data file is missing, empty, or has a malformed line (the text names file and line)."""


class HubDataError(DataError):
    """A data set of the Hugging Face hub cannot be loaded."""

    def __init__(self, name: str, remedy: str, *, is_unreachable: bool) -> None:
        """`is_unreachable`: the cache lacks it, and the hub cannot be reached."""
        super().__init__(f"data set {name!r}: {remedy}")
        self.name = name
        self.remedy = remedy
        self.is_unreachable = is_unreachable

    def in_field(self, field: str) -> ConfigError:
        """The same error as one of the configuration field that names the data set."""
        kind = NotDownloaded if self.is_unreachable else ConfigError
        return kind(field, self.name, self.remedy)


class ModelError(SpeedAsyncError):
    """A model folder, its tokenizer or its context length cannot be used by this run."""


class DeadlineExceeded(SpeedAsyncError):
    """A wait passed its deadline."""

    def __init__(self, peer: str, what: str, waited_s: float) -> None:
        super().__init__(f"waited {waited_s:.1f} s for {peer}: {what}")
        self.peer = peer
        """The peer that did not respond."""
        self.what = what
        self.waited_s = waited_s


class ProtocolError(SpeedAsyncError):
    """A peer sent something that is not a valid message of this protocol version."""


class TransportClosed(SpeedAsyncError):
    """The transport was closed while in use."""


class WeightSyncError(SpeedAsyncError):
    """A weight transfer failed, or its content does not match its manifest.

    `missing_ranks`: at the sender, the ranks that did not complete the transfer or refused it.
    """

    def __init__(self, message: str, *, missing_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing_ranks = tuple(missing_ranks)


class TaskError(SpeedAsyncError):
    """A task cannot be created, or its verifier failed on one completion."""


class RoleError(SpeedAsyncError):
    """Another role of this run failed; contains the name of that role and its message."""

    def __init__(self, role: str, message: str) -> None:
        already_named = message.startswith(f"{role}:") or message.startswith("config field")
        super().__init__(message if already_named else f"{role}: {message}")
        self.role = role

    @classmethod
    def from_text(cls, text: str) -> "RoleError":
        """Create from a description that starts with the name of its role."""
        return cls(text.partition(":")[0], text)


class IncarnationLost(SpeedAsyncError):
    """This incarnation of an actor was declared lost or cannot continue; a new one may succeed."""


class RunLost(SpeedAsyncError):
    """The service of the run is not reachable any more."""


class RunFinished(SpeedAsyncError):
    """A run to be resumed is already complete (the message names the limit to raise)."""


class JournalError(SpeedAsyncError):
    """The journal of a run cannot be read, written, or continued."""


class JournalRefused(JournalError):
    """An intact journal that this run cannot continue from. The journal is unchanged (the message
    gives the reason and the remedy)."""


class IdentityError(SpeedAsyncError):
    """The data, model or scoring code of a resumed run differs from what it started with."""
