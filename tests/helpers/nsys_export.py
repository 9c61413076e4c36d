"""A small SQLite export as nsys 2025.3 writes it: the tables the reader uses, with the columns they have there."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

from pipeline.instrument import Interval

_SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE TARGET_INFO_GPU (vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT, uuid TEXT,
    totalMemory INTEGER, smCount INTEGER);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER,
    int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT, binaryData TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
    globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
    launchType INTEGER, gridX INTEGER NOT NULL, gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
    globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, deprecatedSrcId INTEGER, srcKind INTEGER,
    dstKind INTEGER);
"""
PROCESS = 0x11A4000000000000 >> 16 << 16 | 0x2B000000  # globalPid: the lower 24 bits are for threads


class Export:
    """Collects ranges and operations of a made-up report; times in nanoseconds."""

    def __init__(self, path: Path, *, named: bool = True) -> None:
        self._database = sqlite3.connect(path)
        self._database.executescript(_SCHEMA)
        self._strings: dict[str, int] = {}
        self._correlations = count(1)
        if named:
            self._nvtx(0, None, 75, "pipeline", 1, None, PROCESS)
        self._insert("TARGET_INFO_GPU", vmId=0, id=0, name="NVIDIA H200")
        self._insert("TARGET_INFO_GPU", vmId=0, id=1, name="NVIDIA H200")

    def _insert(self, table: str, **values: int | str | None) -> None:
        names = ", ".join(values)
        self._database.execute(
            f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(values))})", list(values.values())
        )

    def _string(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = len(self._strings) + 1
            self._insert("StringIds", id=self._strings[text], value=text)
        return self._strings[text]

    def _nvtx(
        self, start: int, end: int | None, kind: int, text: str, domain: int, payload: int | None, thread: int
    ) -> None:
        where: dict[str, int | str | None] = {"text": text} if kind == 75 else {"textId": self._string(text)}
        common = {"start": start, "end": end, "eventType": kind, "domainId": domain, "globalTid": thread}
        self._insert("NVTX_EVENTS", **common, **where, int64Value=payload)

    def range(
        self, name: str, start: int, end: int, number: int, *, thread: int = 1, kind: int = 59, domain: int = 1
    ) -> None:
        """A push/pop range (59), or one started and ended anywhere (60)."""
        self._nvtx(start, end, kind, name, domain, number, PROCESS + thread)

    def operation(
        self,
        interval: Interval,
        called: int,
        *,
        device: int = 0,
        stream: int = 13,
        thread: int = 1,
        process: int = PROCESS,
    ) -> None:
        """A kernel or a copy, with the call at `called` that queued it; the interval's times are seconds."""
        number = next(self._correlations)
        self._insert(
            "CUPTI_ACTIVITY_KIND_RUNTIME", start=called, end=called + 2000, eventClass=0, globalTid=process + thread,
            correlationId=number, nameId=self._string("cuMemcpyHtoDAsync_v2"), returnValue=0,
        )  # fmt: skip
        common: dict[str, int | str | None] = {
            "start": round(interval.start_s * 1e9),
            "end": round(interval.end_s * 1e9),
            "deviceId": device,
            "contextId": 1,
            "streamId": stream,
            "correlationId": number,
            "globalPid": process,
        }
        if interval.stage == "kernel":
            name = self._string("fused_linear")
            self._insert(
                "CUPTI_ACTIVITY_KIND_KERNEL", **common, demangledName=name, shortName=name, gridX=1, gridY=1, gridZ=1
            )
        else:
            kind = {"H2D": 1, "D2H": 2, "D2D": 8}[interval.stage]
            self._insert("CUPTI_ACTIVITY_KIND_MEMCPY", **common, bytes=interval.bytes, copyKind=kind)

    def drop(self, table: str) -> None:
        self._database.execute(f"DROP TABLE {table}")

    def close(self) -> None:
        with closing(self._database):
            self._database.commit()
