"""What all tests share: tests/ itself is importable, so that helpers like `checkpoints` are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
