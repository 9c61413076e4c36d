"""A program that runs another as its only child and prints what it took, as JSON: spawn.py LIMIT_S COMMAND ...

NOTE: a process's peak of resident memory counts what its parent had at the moment of starting it, since it shares that
memory until it executes its own program. So the parent is this one, which stays smaller than anything it runs, and not
the bench. (Linux, getrusage(2): the maximum is kept through execve.)
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time

limit_s, command = float(sys.argv[1]), sys.argv[2:]
with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
    start = time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=errors)
    stopper = threading.Timer(limit_s, child.kill)
    stopper.daemon = True
    stopper.start()
    _, status, used = os.wait4(child.pid, 0)
    wall_s = time.perf_counter() - start
    stopper.cancel()
    child.returncode = os.waitstatus_to_exitcode(status)
    printed.seek(0)
    errors.seek(0)
    found = {
        "wall_s": wall_s,
        "user_s": used.ru_utime,
        "system_s": used.ru_stime,
        "peak_resident_bytes": used.ru_maxrss * 1024,
        "status": child.returncode,
        "output": printed.read(),
        "errors": errors.read(),
    }
print(json.dumps(found))
