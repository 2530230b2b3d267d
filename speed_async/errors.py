"""Every error a user can meet. Its text is complete: what, which value, what to do."""

from collections.abc import Sequence


class SpeedAsyncError(Exception):
    """Base of all errors raised on purpose. `str(error)` is fit to be shown to a user."""


CONFIG_FILE = "CONFIG"
"""In place of a field, where the file itself cannot be used."""


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
        """This error, or all that one error holds."""
        return (self,)


class ConfigErrors(ConfigError):
    """Several values cannot be used; field, value and remedy are those of the first."""

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
        """The only error itself, or one that holds them all."""
        return errors[0] if len(errors) == 1 else ConfigErrors(errors)


class DataError(SpeedAsyncError):
    """A data file is missing, empty, or has a malformed line (the text names file and line)."""


class ModelError(SpeedAsyncError):
    """A model folder, its tokenizer or its context length cannot serve this run."""


class DeadlineExceeded(SpeedAsyncError):
    """A wait passed its deadline."""

    def __init__(self, whom: str, what: str, waited_s: float) -> None:
        super().__init__(f"waited {waited_s:.1f} s for {whom}: {what}")
        self.whom = whom
        self.what = what
        self.waited_s = waited_s


class ProtocolError(SpeedAsyncError):
    """A peer sent something that is not a valid message of this protocol version."""


class TransportClosed(SpeedAsyncError):
    """The transport was closed while in use."""


class WeightSyncError(SpeedAsyncError):
    """A weight transfer failed or delivered something else than was announced.

    `missing_ranks`, at the sender: who did not take part to the end, or refused to.
    """

    def __init__(self, message: str, *, missing_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing_ranks = tuple(missing_ranks)


class TaskError(SpeedAsyncError):
    """A task cannot be made, or its verifier failed on one completion."""


class RoleError(SpeedAsyncError):
    """Another role of this run failed; carries that role's name and message."""

    def __init__(self, role: str, message: str) -> None:
        already_named = message.startswith(f"{role}:") or message.startswith("config field")
        super().__init__(message if already_named else f"{role}: {message}")
        self.role = role

    @classmethod
    def quoting(cls, text: str) -> "RoleError":
        """From a description that already names its role."""
        return cls(text.partition(":")[0], text)


class GivenUp(SpeedAsyncError):
    """The service took this incarnation of an actor for dead; a new one may take its place."""


class LostRun(SpeedAsyncError):
    """Nobody answers for the run any more, or ever did."""


class RunFinished(SpeedAsyncError):
    """A run that was to go on has nothing left to do (the text says what would make it go on)."""


class JournalError(SpeedAsyncError):
    """The journal of a run cannot be read, written, or continued."""


class JournalRefused(JournalError):
    """A journal that is not damaged, and that this run cannot go on from. Nothing in it was changed
    (the text says why it is refused, and what to do)."""


class IdentityError(SpeedAsyncError):
    """A run that is resumed does not find what it began with."""
