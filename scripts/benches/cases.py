"""All benches, in the order of `scripts/bench --help`. A new one is a file of its own and a line here."""

from __future__ import annotations

from benches.case import Case
from benches.cpu import Cpu
from benches.errors import Errors
from benches.file import File
from benches.job import Job
from benches.kernel import Kernel
from benches.launch import Launch
from benches.stream import Stream
from benches.versions import Versions

CASES: list[Case] = [Kernel(), Errors(), Launch(), Stream(), Cpu(), File(), Job(), Versions()]
