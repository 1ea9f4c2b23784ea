"""The command as a user calls it, for the tests."""
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from mine_refine_nb.cli import main

COMMAND = Path(sys.executable).with_name("mine-refine")


def start(*arguments) -> subprocess.CompletedProcess:
    "The installed command, in a process of its own."
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def call(*arguments, code: int = 0) -> SimpleNamespace:
    "The same in this process, which has imported everything."
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [COMMAND.name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended: main()
    assert (ended.value.code or 0) == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
