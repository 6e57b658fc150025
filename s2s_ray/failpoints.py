"""Places where tests make a process end, fail, wait or take memory: one mechanism, switched on by the environment."""

import errno
import fnmatch
import os
import signal
import time

FAILPOINT_VARIABLE = "S2S_RAY_FAILPOINT"
FAILPOINT_EXIT_CODE = 86

_calls: dict[str, int] = {}
_memory: list[bytes] = []


def failpoint(name: str) -> None:
    """Test hook: S2S_RAY_FAILPOINT="name:nth:action[,...]" acts at the nth call of `name` in this process.

    A name may be a pattern ("*": any). nth 0 acts at every call. Actions: exit and kill (the process ends at once, by
    itself or by SIGKILL), eio and enospc (OSError), sleep=SECONDS, memory=MIB (so much more is taken and kept).
    """
    setting = os.environ.get(FAILPOINT_VARIABLE)
    if not setting:
        return
    for entry in setting.split(","):
        wanted, nth, action = entry.split(":", 2)
        if fnmatch.fnmatchcase(name, wanted):
            _calls[entry] = _calls.get(entry, 0) + 1
            if int(nth) in (0, _calls[entry]):
                _fail(name, action)


def _fail(name: str, action: str) -> None:
    if action == "exit":
        os._exit(FAILPOINT_EXIT_CODE)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
        return
    if action.startswith("memory="):
        _memory.append(b"\1" * (int(action.removeprefix("memory=")) * 2**20))
        return
    code = {"eio": errno.EIO, "enospc": errno.ENOSPC}[action]
    raise OSError(code, f"{os.strerror(code)} (failpoint {name})")
