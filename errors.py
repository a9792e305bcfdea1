"""The errors a user may catch: `from ralmq.errors import Busy`. Knows nothing of its own."""

from .schema.errors import Busy as Busy
from .schema.errors import ConnectionClosed as ConnectionClosed
from .schema.errors import DeadlineExceeded as DeadlineExceeded
from .schema.errors import Malformed as Malformed
from .schema.errors import NoBroker as NoBroker
from .schema.errors import NoService as NoService
from .schema.errors import Poisoned as Poisoned
from .schema.errors import RalmqError as RalmqError
from .schema.errors import Refused as Refused
from .schema.errors import RequestCancelled as RequestCancelled
from .schema.errors import WorkerFailed as WorkerFailed
from .schema.errors import WorkerLost as WorkerLost
