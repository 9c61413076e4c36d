"""A checkout of this project as something to measure: built, and with a process of its own that imports it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benches.common import ROOT, output_of

WORKER = Path(__file__).parent / "worker.py"


class Tree:
    """Starts the process. Use it in a `with` statement, which ends it."""

    def __init__(self, folder: Path, cache: Path, memory_fd: int) -> None:
        self.folder = folder
        self.build()
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PIPELINE_CACHE_DIR": str(cache),  # of its own: neither finds what the other compiled
            "PIPELINE_TUNE": "0",  # the defaults: what a tuner finds differs from time to time
        }
        command = [sys.executable, "-P", str(WORKER), str(folder), str(memory_fd)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
            pass_fds=(memory_fd,),
        )

    def build(self) -> None:
        """Build the copy workers in C, where that hasn't been done yet. Without a compiler NumPy copies."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the C library of {self.folder} can't be built:\n{done.stdout}{done.stderr}")

    def about(self) -> dict[str, Any]:
        """What tells two checkouts apart: the commit where there is a .git, and a digest of package and C code."""
        digest = hashlib.sha256()
        for folder, pattern in (("pipeline", "**/*.py"), ("csrc", "**/*.*")):
            for path in sorted((self.folder / folder).glob(pattern)):
                digest.update(path.relative_to(self.folder).as_posix().encode() + path.read_bytes())
        commit = os.environ.get("PIPELINE_COMMIT", "") if self.folder == ROOT else ""  # a copy may have an older .git
        if not commit and (self.folder / ".git").exists():
            commit = output_of("git", "-C", str(self.folder), "describe", "--always", "--abbrev=40", "--dirty")
        return {"commit": commit or "unknown", "sources_sha256": digest.hexdigest()[:16]}

    def ask(self, do: str, **details: Any) -> Any:
        """Have the process do something, and wait for its answer.

        Raises:
            RuntimeError: it failed, with its traceback.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self.folder} has ended: its message is above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.folder}, {do}:\n{answer['error']}")
        return answer["answer"]

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
