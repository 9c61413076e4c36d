"""The native code under the sanitizers: stress programs of tests/native/, compiled with each and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[1] / "native"


@pytest.mark.timeout(400)  # threads that spin, checked access by access, beside other tests: on 2 cores minutes
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("program", ["copy_workers_stress", "mover_stress"])
def test_native_code_is_clean_under(program: str, sanitizers: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    built = tmp_path / program
    options = ["-std=c11", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    subprocess.run([compiler, *options, *warnings, "-o", str(built), str(NATIVE / f"{program}.c")], check=True)
    done = subprocess.run([str(built)], capture_output=True, text=True, timeout=380)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
