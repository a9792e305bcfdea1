"""Where a broker is looked for when nobody says. Knows names only."""

from typing import Final

DEFAULT_BROKER: Final = "tcp://127.0.0.1:5555"
BROKER_VARIABLE: Final = "RALMQ_BROKER"  # of the environment
