"""The errors of the whole system, one class per cause. Knows whose fault each is; raises none itself."""

from typing import ClassVar, Final


class RalmqError(Exception):
    """Base of all errors.

    Attributes:
        code: name of the cause on the wire.
        fault: who has to act: "caller", "worker" or "broker".
        retryable: whether the same request may succeed later, unchanged.
        request_id: 16 bytes, or None where no request was involved.
        worker: name of the worker whose loss ended the request, where one was lost.
    """

    code: ClassVar[str] = "error"
    fault: ClassVar[str] = "broker"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, request_id: bytes | None = None, retry_after: float = 0.0, worker: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.retry_after = retry_after
        self.worker = worker

    def __str__(self) -> str:
        return self.message if self.request_id is None else f"{self.message} [request {self.request_id.hex()}]"


class Refused(RalmqError):
    """The input is wrong: the same request will be refused again."""

    code = "refused"
    fault = "caller"


class Malformed(Refused):
    """Frames that are no message of this protocol, or a message that may not be sent."""

    code = "malformed"


class NoService(RalmqError):
    """No worker offers the service."""

    code = "no_service"
    fault = "caller"
    retryable = True


class Busy(RalmqError):
    """The queue of the service is full. `retry_after` (seconds) is when a resend is expected to find room."""

    code = "busy"
    fault = "broker"
    retryable = True


class DeadlineExceeded(RalmqError):
    """The deadline of the request passed before its end."""

    code = "deadline"
    fault = "caller"
    retryable = True


class RequestCancelled(RalmqError):
    """The asker, or the request on whose behalf this one was made, gave up."""

    code = "cancelled"
    fault = "caller"


class WorkerFailed(RalmqError):
    """The worker raised while it served the request."""

    code = "worker_failed"
    fault = "worker"


class WorkerLost(RalmqError):
    """The worker (or a stage of its pipeline) died or hung, and the request could not be given to another."""

    code = "worker_lost"
    fault = "worker"
    retryable = True


class Poisoned(RalmqError):
    """The request's worker died each time that it was served: it is given to no other, see `ralmq quarantine list`."""

    code = "poisoned"
    fault = "caller"


class NoBroker(RalmqError):
    """No broker answered at the address within the time given."""

    code = "no_broker"
    fault = "broker"
    retryable = True


class ConnectionClosed(RalmqError):
    """The client was closed while the request was under way, or is not open."""

    code = "closed"
    fault = "caller"


CLASSES: Final[dict[str, type[RalmqError]]] = {
    cls.code: cls
    for cls in (
        RalmqError,
        Refused,
        Malformed,
        NoService,
        Busy,
        DeadlineExceeded,
        RequestCancelled,
        WorkerFailed,
        WorkerLost,
        Poisoned,
        NoBroker,
        ConnectionClosed,
    )
}


def error_of(
    code: str, message: str, *, request_id: bytes | None = None, retry_after: float = 0.0, worker: str = ""
) -> RalmqError:
    """The error object for a code from the wire; a code of a later version becomes a plain RalmqError."""
    made = CLASSES.get(code, RalmqError)
    return made(message, request_id=request_id, retry_after=retry_after, worker=worker)
