"""The broker's own errors in words: what happened, and what to do about it. Changes nothing."""

from ..schema.errors import Busy, DeadlineExceeded, NoService, Poisoned, WorkerLost
from .pipelines import Pipelines
from .records import Record, State
from .services import Service

ORPHAN = "the request on whose behalf this one asks is over"


def nobody(service: Service) -> NoService:
    return NoService(f"no worker offers {service.name}: start one, or see `ralmq status` for what there is")


def busy(service: Service, now: float, what: str) -> Busy:
    """BUSY, with the time after which a resend is expected to find room."""
    after = service.retry_after(now)
    return Busy(f"{what}: ask again in {after:.2f} s, or start another worker", retry_after=after)


def too_late(record: Record, pipelines: Pipelines) -> DeadlineExceeded:
    name = record.service.name
    if record.state is State.RUNNING:
        where = f"worker {record.worker.name if record.worker else '?'} of {name} did not end in time"
    elif record.service.workers or not name.startswith("lm:"):
        where = f"no worker of {name} was free in time"
    else:
        where = f"no pipeline of {name} is formed; missing layers: {pipelines.missing(name[3:])}"
    return DeadlineExceeded(f"{where}: raise the deadline, or start more workers")


def lost(record: Record, worker: str, reason: str, gone: str) -> WorkerLost:
    """`gone`: the worker that was lost, which may be another stage of the pipeline that `worker` leads."""
    return WorkerLost(f"worker {worker} of {record.service.name} {reason}: ask again", worker=gone)


def unrepeatable(record: Record) -> WorkerLost:
    lost = f"{record.service.name} may have served this request before its connection was cut, and is not "
    return WorkerLost(lost + "safe to repeat: ask anew if you want it done again")


def poisoned(record: Record, worker: str, reason: str) -> Poisoned:
    text = f"{record.losses} workers of {record.service.name} were lost with this request in hand, the last {worker}"
    return Poisoned(f"{text}, which {reason}: see their logs and `ralmq quarantine list`, and change the request")
