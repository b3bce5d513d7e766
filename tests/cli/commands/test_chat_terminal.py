"""`autosft chat` at a real terminal: Ctrl+C ends an answer, and the conversation goes on."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

#: In the place of the process that generates: streams words until it is told to stop.
SERVER = """
import json, select, sys
for line in iter(sys.stdin.readline, ""):
    asked = json.loads(line)
    if "stop" in asked:
        continue
    said, number = "", 0
    while not select.select([sys.stdin], [], [], 0.02)[0] and number < 3000:
        number += 1
        said += f"w{number} "
        print(json.dumps({"text": f"w{number} "}), flush=True)
    sys.stdin.readline()
    print(json.dumps({"answers": [[said]]}), flush=True)
"""
CLIENT = """
import sys
from autosft import cli
from autosft.scheduler.finish import inference_client
inference_client.python = lambda *_: [sys.executable, sys.argv[1]]
sys.exit(cli.main(["chat", sys.argv[2]]))
"""
LIMIT_S = 120.0  # for a machine under load; a pass takes two seconds


class Terminal:
    """A program in a pseudo-terminal that is its controlling one, so that keys become signals."""

    def __init__(self, *command: str) -> None:
        import pty

        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)
        self.seen = ""

    def wait_for(self, text: str) -> None:
        """Read until a text has appeared since the last call."""
        while text not in self.seen:
            ready, _, _ = select.select([self.descriptor], [], [], LIMIT_S)
            assert ready, f"{text!r} did not come after: {self.seen[-500:]}"
            try:
                self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
            except OSError:  # the program has ended
                raise AssertionError(f"ended before {text!r}: {self.seen[-500:]}") from None
        self.seen = self.seen.partition(text)[2]

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_not_the_conversation(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name, text in (("server.py", SERVER), ("client.py", CLIENT)):
        (tmp_path / name).write_text(text)
    terminal = Terminal(
        sys.executable,
        str(tmp_path / "client.py"),
        str(tmp_path / "server.py"),
        str(tmp_path / "model"),
    )
    terminal.wait_for("> ")
    for _ in range(2):  # again, with the handler set anew
        terminal.press("hello\n")
        terminal.wait_for("w3 ")
        terminal.press("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
    terminal.press("\x04")
    assert terminal.exit_code() == 0
