"""Starts scripts without their imports: this process has imported everything once and forks a child for each.

So that a signal meets a command at work, and a hundred of them cost seconds. One JSON object per line on stdin: {"script",
"arguments", "folder", "environment", "limits"} answers the child's number; {"wait": number} its status as a shell gives it.
"""

import faulthandler
import gc
import importlib
import json
import os
import re
import resource
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from sabotage import Sabotage, plenty_of_room  # beside this file

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "lm_eval.tasks",
    "lm_eval.evaluator",
    "optuna",
    "sqlalchemy",
    "pyarrow.parquet",
    "gguf",
)
LONGEST = 120  # seconds that a command may take; all are done within ten
OURS = ("merge.api", "merge.search", "merge.fusion.make", "eval.evaluation", "eval.search", "eval.search_report", "eval.plots")


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    for name in (*HEAVY, *OURS, "eval.pipeline.run", "eval.pipeline.report"):
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of a child that has not begun
    gc.freeze()  # collected objects would be copied into every child
    print(json.dumps({"ready": threading.active_count()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        child = os.fork()
        if child == 0:
            os._exit(run(**asked))  # nothing that this process has open is flushed or closed
        print(json.dumps({"child": child}), flush=True)


def run(
    script: str, arguments: list[str], folder: str, environment: dict[str, str], limits: dict[str, Any], said: str
) -> int:  # fmt: skip
    """The script's exit status; what it prints goes to SAID/stdout and SAID/stderr.

    limits: "memory" (beside the imports) and "file_size" in bytes; "sabotage" as `Sabotage` takes it, whose count goes to
    SAID/count; "umask"; "room": the disk is said to have plenty.
    """
    os.setsid()
    importlib.import_module("_checkout")  # what every script imports first; from here on Ctrl-C is one line
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    if "memory" in limits:
        used = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + limits["memory"], used + limits["memory"]))
    if "file_size" in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"], limits["file_size"]))
    if "umask" in limits:
        os.umask(limits["umask"])
    if "room" in limits:
        plenty_of_room()
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(said) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    faulthandler.dump_traceback_later(LONGEST, exit=True, file=2)  # what hangs says where, and fails
    path = ROOT / "scripts" / f"{script}.py"
    sys.argv = [str(path), *arguments]
    status = 0
    sabotage = Sabotage(Path(folder), **limits["sabotage"]) if "sabotage" in limits else None
    if sabotage:
        sabotage.begin()
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # as the interpreter does when a script ends by one
        sys.excepthook(type(error), error, error.__traceback__)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    if sabotage:
        (Path(said) / "count").write_text(str(sabotage.count))
    return status


if __name__ == "__main__":
    main()
