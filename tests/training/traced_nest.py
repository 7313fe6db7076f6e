"""Run `nest`, record the utterances that it trains on, and fail on demand: for runs of several processes.

TRACE is a folder for the lines; FAULT is "RANK STEP HOW", where HOW is exit, raise, words, kill or wait. SIGUSR2 prints
the stacks of all threads of a process.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

faulthandler.register(signal.SIGUSR2, all_threads=True)  # before the imports below, which may be what hangs

from nestcli.cli.app import main  # noqa: E402
from nestcli.model.module import NestModule  # noqa: E402

training_step = NestModule.training_step


def traced_step(self, batch, batch_idx):
    step, rank = self.trainer.global_step, self.trainer.global_rank
    if "TRACE" in os.environ:
        with (Path(os.environ["TRACE"]) / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, batch.sample_ids, time.time()]) + "\n")
    if os.environ.get("FAULT", "").split()[:2] == [str(rank), str(step)]:
        fail(os.environ["FAULT"].split()[2])
    return training_step(self, batch, batch_idx)


def fail(how):
    if how == "exit":
        os._exit(1)
    if how == "raise":
        raise ArithmeticError("a fault of this process")
    if how == "words":
        raise RuntimeError("a fault of this process, whose words name NCCL and gloo")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


if __name__ == "__main__":
    NestModule.training_step = traced_step
    sys.exit(main())
