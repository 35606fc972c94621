"""Each type in a process of its own, with a limit on its time and memory."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
from functools import cache
from typing import Any

from .check import FAILED, Result, Verdict, sweep
from .methods import CHECKS

SECONDS, BYTES = 180, 10 * 2**30


def run(model_type: str, names: list[str] | None = None) -> dict[str, Any]:
    """What the sweep finds of one type, as plain data."""
    _prepare()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _child(model_type, names, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if data:
        found: dict[str, Any] = json.loads(data)
        return found
    failed = Result(model_type)
    failed.methods["bare"] = Verdict(FAILED, f"its process ended with status {status} after at most {SECONDS} s")
    return failed.to_dict()


def _too_long(*_: object) -> None:
    raise TimeoutError(f"takes more than {SECONDS} s, though it was made smaller")


@cache
def _prepare() -> None:
    """What every child needs is imported once, and no child's garbage collector copies its pages."""
    import memsave.integrations.head_groups
    import memsave.integrations.peft
    import memsave.integrations.sparse_attention
    import memsave.methods
    import memsave.saving  # noqa: F401

    _ = memsave.SHiRAConfig, memsave.LaMDAConfig
    sweep("llama", CHECKS)
    gc.collect()
    gc.freeze()


def _child(model_type: str, names: list[str] | None, writing: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        checks = {name: check for name, check in CHECKS.items() if names is None or name in names}
        data = json.dumps(sweep(model_type, checks).to_dict()).encode()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)
