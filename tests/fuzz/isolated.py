"""Work in a process of its own: what ends that process is a failure that has its input, not the end of the tests.

Run as a module it is that process. It reads pickled (function, arguments) from stdin, length first, and answers with
what went wrong, or nothing. Functions are named "module:name".
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
# Guarded memory is large and lives briefly: as mappings of its own it would cost most of the time.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
_LENGTH = struct.Struct("<q")
_SHOWN = 3000


class Isolated:
    """Calls functions in another process, which is started when it is needed, and again after a crash.

    Args:
        environment: variables of that process, besides this one's.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {**os.environ, **_MALLOC, "PYTHONPATH": str(ROOT), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def call(self, function: str, *args: Any) -> None:
        """Raises AssertionError with what the function raised, or with the end of the process."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            _write(process.stdin, (function, args))
        try:
            problem = _read(process.stdout)
        except EOFError:
            raise AssertionError(f"{function} ended the process: {self._end()}") from None
        assert problem is None, problem

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._said = tempfile.TemporaryFile()
            command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.isolated"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
            self._process = subprocess.Popen(command, cwd=ROOT, env=self._environment, **pipes)  # type: ignore[call-overload]
        assert self._process is not None
        return self._process

    def _end(self) -> str:
        """The exit status and the last words of the process, which has ended or is about to."""
        assert self._process is not None and self._said is not None
        status = self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._said.seek(0)
        words = self._said.read().decode(errors="replace")
        self._said.close()
        self._process = self._said = None
        return f"exit status {status}\n{words[:_SHOWN]}"


def _write(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _read(stream: IO[bytes]) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(_LENGTH.unpack(head)[0]))


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the work prints must not be taken for an answer
    while True:
        try:
            function, args = _read(sys.stdin.buffer)
        except EOFError:
            return
        module, _, name = function.partition(":")
        problem = None
        try:
            getattr(import_module(module), name)(*args)
        except BaseException:
            problem = traceback.format_exc()[-_SHOWN:]
        _write(answers, problem)


if __name__ == "__main__":
    main()
