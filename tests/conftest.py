"""What all tests share: tests/ itself is importable, so that helpers like `checkpoints` are."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish() -> None:
    """What imports have made stays: the collections that tests ask for need not look at it each time."""
    gc.collect()
    gc.freeze()
