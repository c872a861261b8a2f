"""The structures of runtime/abi.h, with the same layouts."""

from __future__ import annotations

import ctypes

_u32, _u64, _i32, _i64 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32, ctypes.c_int64


class BufferSpec(ctypes.Structure):
    """A kernel argument (``Buffer`` there)."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("nbytes", _u64),
        ("writable", _i32),
        ("item_bytes", _i32),
        ("initialised", _i32),
        ("name", ctypes.c_char * 44),
    ]


class ThreadgroupVariable(ctypes.Structure):
    """A variable in threadgroup memory."""

    _fields_ = [("data", ctypes.c_void_p), ("nbytes", _u64), ("name", ctypes.c_char * 48)]


class Finding(ctypes.Structure):
    """Something wrong, at one place."""

    _fields_ = [
        ("kind", _i32),
        ("site", _i32),
        ("thread", _i32),
        ("other", _i32),
        ("call", _u64),
        ("offset", _i64),
        ("size", _u64),
        ("threadgroup", _u32 * 3),
        ("count", _u64),
        ("name", ctypes.c_char * 48),
    ]


class BufferCounters(ctypes.Structure):
    """Traffic of one buffer; [0] read, [1] written."""

    _fields_ = [
        ("bytes", _u64 * 2),
        ("distinct_bytes", _u64 * 2),
        ("instructions", _u64 * 2),
        ("lines", _u64 * 2),
        ("distinct_lines", _u64 * 2),
    ]


class SiteCounters(ctypes.Structure):
    """Traffic of one load or store in the code."""

    _fields_ = [
        ("call", _u64),
        ("site", _i32),
        ("buffer", _i32),
        ("is_write", _i32),
        ("instructions", _u64),
        ("lines", _u64),
        ("bytes", _u64),
    ]


class LaunchCounters(ctypes.Structure):
    """How much ran."""

    _fields_ = [
        ("threadgroups", _u64),
        ("threads", _u64),
        ("barriers", _u64),
        ("simdgroup_barriers", _u64),
        ("collectives", _u64),
        ("threadgroup_bytes", _u64 * 2),
    ]


class Launch(ctypes.Structure):
    """All about a launch: what to run, and then what came of it."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(BufferSpec)),
        ("variables", ctypes.POINTER(ThreadgroupVariable)),
        ("findings", ctypes.POINTER(Finding)),
        ("buffer_counters", ctypes.POINTER(BufferCounters)),
        ("site_counters", ctypes.POINTER(SiteCounters)),
        ("buffer_count", _i32),
        ("variable_count", _i32),
        ("max_findings", _i32),
        ("max_sites", _i32),
        ("grid", _u32 * 3),
        ("threadgroup", _u32 * 3),
        ("order", _i32),
        ("checked", _i32),
        ("seed", _u64),
        ("time_limit", ctypes.c_double),
        ("finding_count", _i32),
        ("site_count", _i32),
        ("counters", LaunchCounters),
    ]
