"""The native copy workers under the sanitizers: tests/native/host_copy_stress.c, compiled with each and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

STRESS = Path(__file__).resolve().parent / "native" / "host_copy_stress.c"


@pytest.mark.timeout(400)  # threads that spin, checked access by access, beside other tests: on 2 cores minutes
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_native_copies_are_clean_under(sanitizers: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "stress"
    options = ["-std=c11", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    subprocess.run([compiler, *options, *warnings, "-o", str(program), str(STRESS)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=380)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
