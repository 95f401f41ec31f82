"""Every error that heterostep raises on purpose.

::

    HeterostepError
    ├── ConfigError   (also a ValueError)    a setting is wrong; raised before any work or process starts
    │   ├── JobInUse                         another process works on the job
    │   └── JobDiffers                       the job's folder holds another job
    ├── RequestError  (also a ValueError)    one request is wrong; the engine stays usable for the next one
    │   ├── BadField                         of the HTTP API: one field is wrong, and which
    │   └── KeyReused                        of the HTTP API: an Idempotency-Key came again with another request
    ├── QueueFull                            of the service: as many jobs wait as may wait
    ├── StoreUnavailable                     of the service: jobs can be neither read nor written now
    ├── FileGone                             of the service: a finished file was removed from outside
    ├── Cancelled                            a run was stopped
    │   └── Interrupted                      a run was stopped and saved; its job can be resumed
    ├── OutputElsewhere                      a finished file lies elsewhere than it was asked to be
    ├── Undecoded                            a video is denoised and kept, but could not be decoded
    └── RankFailure   (also a RuntimeError)  a process of the fleet died or froze; the fleet is rebuilt
        ├── RankLost                         a rank is gone, and why; its worker group can recover
        └── GroupClosed                      a worker group was closed while somebody waited for it

Two are not errors of a caller: `Damaged` (a checkpoint that is skipped) and `JobStopped` (a signal stopped a job).

A message is one sentence: what was given, the rule it broke, and what would do.
"""

from __future__ import annotations


class HeterostepError(Exception):
    """The root: ``except HeterostepError`` catches everything heterostep raises on purpose."""


class ConfigError(HeterostepError, ValueError):
    """A setting that cannot work, found before any work is done."""


class JobInUse(ConfigError):
    """Another process works on the job."""


class JobDiffers(ConfigError):
    """The folder holds another job, or what another version of heterostep saved."""


class RequestError(HeterostepError, ValueError):
    """A request that cannot be served; found identically on every rank, so the fleet survives it."""


class BadField(RequestError):
    """A request that names what is wrong: `param` is the field, None if it is the whole body."""

    def __init__(self, param: str | None, message: str) -> None:
        """Name the field and say the rule."""
        super().__init__(message)
        self.param = param


class KeyReused(RequestError):
    """An Idempotency-Key came again with another request."""


class QueueFull(HeterostepError):
    """As many jobs wait as may wait."""


class StoreUnavailable(HeterostepError):
    """The job store cannot be read or written: a full or failing disk, or a lock that is never released."""


class FileGone(HeterostepError):
    """A file of a completed video is not there any more."""


class Cancelled(HeterostepError):
    """The run was stopped by `Engine.cancel` or by closing its stream."""


class Interrupted(Cancelled):
    """The run was stopped by `Engine.save_and_stop`; the job can resume in another process.

    Attributes:
        step: number of steps that need not be done again.
    """

    def __init__(self, message: str, step: int) -> None:
        """Say what happened, and where the job resumes."""
        super().__init__(message)
        self.step = step


class OutputElsewhere(HeterostepError):
    """What was made could not be written where it was asked to be; the message says why, and where it lies."""


class Undecoded(HeterostepError):
    """What was denoised could not be decoded; the message says why, and where it is kept."""


class RankFailure(HeterostepError, RuntimeError):
    """A rank died or stopped answering; the message names the rank and the step."""


class RankLost(RankFailure):
    """A rank is gone or no longer usable; the worker group can recover, and the video resumes where it was saved.

    Attributes:
        cause: one word: "died", "frozen", "node", "memory", "timeout" or "error".
    """

    def __init__(self, cause: str, message: str) -> None:
        """Say why in one word and in one sentence."""
        super().__init__(message)
        self.cause = cause


class GroupClosed(RankFailure):
    """The worker group was closed while somebody waited for it."""


class Damaged(Exception):
    """A saved state that is incomplete, altered, or no saved state of this version; the message says what is wrong."""


class JobStopped(BaseException):
    """A signal stopped a job that can resume; no Exception, so that no library takes it for a failure of its own."""


TOO_LARGE = "the device's memory is too small for this request; take a smaller size or fewer frames"
"""What a person is told of an error for which `is_out_of_memory` is true."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU, or of the host, is used up.

    PyTorch's own is known by its name, as importing torch would slow every command down; of the host's memory PyTorch
    says it in words alone.
    """
    found = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return found or "can't allocate memory" in str(error)
