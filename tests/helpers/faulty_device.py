"""A device of the GPU suite that fails on purpose, by the environment variable FAULTS.

FAULTS is a JSON list of objects with the `fault` and the columns of the rows that it applies to. Faults are:

* exception: preparing the run raises;
* wrong: the run does nothing;
* crash: the process aborts;
* hang: the process sleeps and ignores interrupts, with a child that keeps the output open; as if it had for long;
* dead_from_now_on: the device fails for the rest of the process;
* cut: the machine is lost, together with the process of the suite.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import device
import rows

sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # a peer more, which takes seconds to import


class Device(device.Device):
    dead = False

    def prepared(self, provider: str, run: device.Run, graph: bool) -> tuple[device.Run, int | None]:
        key = json.loads(rows.current().read_text())
        for fault in json.loads(os.environ["FAULTS"]):
            if all(fault.get(name, value) == value for name, value in key.items()):
                return getattr(self, fault["fault"])(run), None
        return run, None

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError("an illegal memory access was encountered")

    def exception(self, run: device.Run) -> Any:
        raise RuntimeError("no kernel image is available")

    def wrong(self, run: device.Run) -> device.Run:
        return lambda: None

    def crash(self, run: device.Run) -> Any:
        os.abort()

    def hang(self, run: device.Run) -> Any:
        child = subprocess.Popen(["sleep", "600"])
        print(f"sleeping beside {child.pid}", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.utime(rows.current(), (0, time.time() - 600))
        time.sleep(600)

    def dead_from_now_on(self, run: device.Run) -> Any:
        self.dead = True
        raise RuntimeError("an illegal memory access was encountered")

    def cut(self, run: device.Run) -> Any:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
