"""Both movers on every ground they run on."""

from __future__ import annotations

from helpers.grounds import native_ground, python_ground, simulated_ground
from helpers.mover_tests import Ground, MoverTests


class TestNativeMover(MoverTests):
    def open_ground(self) -> Ground:
        return native_ground()


class TestPythonMover(MoverTests):
    def open_ground(self) -> Ground:
        return python_ground()


class TestPythonMoverOnSim(MoverTests):
    def open_ground(self) -> Ground:
        return simulated_ground()
