"""How a command begins: what is pressed while it imports is no traceback."""

import subprocess
import sys

PRESSED = """
import sys

class Pressed:
    def find_spec(self, name, path, target=None):
        if name == "ralmq.cli.main":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Pressed())
from ralmq.__main__ import main
main()
"""


def test_ctrl_c_while_a_command_imports() -> None:
    ended = subprocess.run([sys.executable, "-c", PRESSED], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
