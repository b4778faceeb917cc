"""The kernel's binary interface: numbers and layouts, spelled as in the headers.

Sources: ``include/uapi/linux/ublk_cmd.h`` and ``include/uapi/linux/io_uring.h`` (Linux 7.3). Tests
hold every number here against those headers by compiling a probe. Nothing in this module acts.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum, IntFlag

# --- layouts -------------------------------------------------------------------------------------


class Layout:
    """A C structure: little-endian, every padding byte a named field, nothing implicit."""

    def __init__(self, name: str, fields: str) -> None:
        """Declare it as ``"name:code name:code"``, with codes as in the struct module."""
        self.name = name
        pairs = [field.split(":") for field in fields.split()]
        self.fields = tuple(field for field, _ in pairs)
        self._struct = struct.Struct("<" + "".join(code for _, code in pairs))
        self.size = self._struct.size
        self._zero = tuple(b"" if code.endswith("s") else 0 for _, code in pairs)
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        at = 0
        for field, code in pairs:
            self.offsets[field] = at
            self.sizes[field] = struct.calcsize("<" + code)
            at += self.sizes[field]

    def pack(self, **values: int | bytes) -> bytes:
        """Return the structure's bytes; fields that are not given are zero."""
        if unknown := values.keys() - self.offsets.keys():
            raise KeyError(f"struct {self.name} has no field {', '.join(sorted(unknown))}")
        zeros = zip(self.fields, self._zero, strict=True)
        return self._struct.pack(*(values.get(field, zero) for field, zero in zeros))

    def unpack(self, data: bytes) -> dict[str, int]:
        """Return the fields by name; byte strings (nested structures, padding) are left out."""
        values = self._struct.unpack_from(data)
        named = zip(self.fields, values, strict=True)
        return {field: value for field, value in named if isinstance(value, int)}


ublksrv_ctrl_cmd = Layout(
    "ublksrv_ctrl_cmd",
    "dev_id:I queue_id:H len:H addr:Q data:Q dev_path_len:H pad:H reserved:I",
)
ublksrv_ctrl_dev_info = Layout(
    "ublksrv_ctrl_dev_info",
    "nr_hw_queues:H queue_depth:H state:H io_desc_size:H max_io_buf_bytes:I dev_id:I "
    "ublksrv_pid:i pad1:I flags:Q ublksrv_flags:Q owner_uid:I owner_gid:I reserved1:Q reserved2:Q",
)
ublksrv_io_desc = Layout("ublksrv_io_desc", "op_flags:I nr_sectors:I start_sector:Q addr:Q")
ublksrv_io_cmd = Layout("ublksrv_io_cmd", "q_id:H tag:H result:i addr:Q")

ublk_param_basic = Layout(
    "ublk_param_basic",
    "attrs:I logical_bs_shift:B physical_bs_shift:B io_opt_shift:B io_min_shift:B max_sectors:I "
    "chunk_sectors:I dev_sectors:Q virt_boundary_mask:Q",
)
ublk_param_discard = Layout(
    "ublk_param_discard",
    "discard_alignment:I discard_granularity:I max_discard_sectors:I max_write_zeroes_sectors:I "
    "max_discard_segments:H reserved0:H",
)
ublk_param_devt = Layout("ublk_param_devt", "char_major:I char_minor:I disk_major:I disk_minor:I")
ublk_param_zoned = Layout(
    "ublk_param_zoned",
    "max_open_zones:I max_active_zones:I max_zone_append_sectors:I reserved:20s",
)
ublk_param_dma_align = Layout("ublk_param_dma_align", "alignment:I pad:4s")
ublk_param_segment = Layout(
    "ublk_param_segment", "seg_boundary_mask:Q max_segment_size:I max_segments:H pad:2s"
)
ublk_param_integrity = Layout(
    "ublk_param_integrity",
    "flags:I max_integrity_segments:H interval_exp:B metadata_size:B pi_offset:B csum_type:B "
    "tag_size:B pad:5s",
)
# 112 bytes on Linux 6.12 (it ends behind zoned), 152 on 7.x; the kernel copies the shorter of two.
ublk_params = Layout(
    "ublk_params",
    "len:I types:I basic:32s discard:20s devt:16s zoned:32s dma:8s _align:4s seg:16s integrity:16s",
)

LAYOUTS = (
    ublksrv_ctrl_cmd,
    ublksrv_ctrl_dev_info,
    ublksrv_io_desc,
    ublksrv_io_cmd,
    ublk_param_basic,
    ublk_param_discard,
    ublk_param_devt,
    ublk_param_zoned,
    ublk_param_dma_align,
    ublk_param_segment,
    ublk_param_integrity,
    ublk_params,
)

# The bit in ublk_params.types, the member, its layout: UBLK_PARAM_TYPE_*.
PARAM_TYPES = {
    "basic": (1 << 0, ublk_param_basic),
    "discard": (1 << 1, ublk_param_discard),
    "devt": (1 << 2, ublk_param_devt),
    "zoned": (1 << 3, ublk_param_zoned),
    "dma": (1 << 4, ublk_param_dma_align),
    "seg": (1 << 5, ublk_param_segment),
    "integrity": (1 << 6, ublk_param_integrity),
}

Params = Mapping[str, Mapping[str, int]]


def pack_params(params: Params) -> bytes:
    """Return a ``struct ublk_params`` for SET_PARAMS; devt is the kernel's and is left out."""
    given = {name: values for name, values in params.items() if name != "devt"}
    types = sum(PARAM_TYPES[name][0] for name in given)
    members = {name: PARAM_TYPES[name][1].pack(**values) for name, values in given.items()}
    return ublk_params.pack(len=ublk_params.size, types=types, **members)


def unpack_params(data: bytes) -> dict[str, dict[str, int]]:
    """Return the members that ``types`` names and that a short answer (6.12) still holds."""
    types = ublk_params.unpack(data.ljust(ublk_params.size, b"\0"))["types"]
    found = {}
    for name, (bit, layout) in PARAM_TYPES.items():
        at = ublk_params.offsets[name]
        if types & bit and at + layout.size <= len(data):
            found[name] = layout.unpack(data[at : at + layout.size])
    return found


# --- control commands (/dev/ublk-control) --------------------------------------------------------


def _ioc(direction: int, number: int, size: int) -> int:
    """_IOC() of asm-generic/ioctl.h with type 'u': 1 writes (_IOW), 2 reads (_IOR), 3 both."""
    return direction << 30 | size << 16 | ord("u") << 8 | number


class Cmd(IntEnum):
    """UBLK_U_CMD_*: the ioctl-encoded control commands (Linux 6.4 and later)."""

    GET_QUEUE_AFFINITY = _ioc(2, 0x01, 32)
    GET_DEV_INFO = _ioc(2, 0x02, 32)
    ADD_DEV = _ioc(3, 0x04, 32)
    DEL_DEV = _ioc(3, 0x05, 32)
    START_DEV = _ioc(3, 0x06, 32)
    STOP_DEV = _ioc(3, 0x07, 32)
    SET_PARAMS = _ioc(3, 0x08, 32)
    GET_PARAMS = _ioc(2, 0x09, 32)
    START_USER_RECOVERY = _ioc(3, 0x10, 32)
    END_USER_RECOVERY = _ioc(3, 0x11, 32)
    GET_DEV_INFO2 = _ioc(2, 0x12, 32)
    GET_FEATURES = _ioc(2, 0x13, 32)
    DEL_DEV_ASYNC = _ioc(2, 0x14, 32)
    UPDATE_SIZE = _ioc(3, 0x15, 32)
    QUIESCE_DEV = _ioc(3, 0x16, 32)
    TRY_STOP_DEV = _ioc(3, 0x17, 32)
    REG_BUF = _ioc(3, 0x18, 32)
    UNREG_BUF = _ioc(3, 0x19, 32)


UBLK_FEATURES_LEN = 8


class DevState(IntEnum):
    """UBLK_S_DEV_*."""

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAIL_IO = 3


class DevFlags(IntFlag):
    """UBLK_F_*: of a device in dev_info.flags, of the driver in the answer of GET_FEATURES."""

    SUPPORT_ZERO_COPY = 1 << 0
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20


# --- I/O commands (/dev/ublkcN), for servers -----------------------------------------------------

UBLK_U_IO_FETCH_REQ = _ioc(3, 0x20, 16)
UBLK_U_IO_COMMIT_AND_FETCH_REQ = _ioc(3, 0x21, 16)
UBLK_MAX_QUEUE_DEPTH = 4096


class IoOp(IntEnum):
    """UBLK_IO_OP_*: the low byte of ublksrv_io_desc.op_flags."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 5


# --- io_uring ------------------------------------------------------------------------------------

SYS_IO_URING_SETUP = 425  # the same on every architecture
SYS_IO_URING_ENTER = 426
SYS_IO_URING_REGISTER = 427

IORING_SETUP_CLAMP = 1 << 4
IORING_SETUP_SQE128 = 1 << 10
IORING_ENTER_GETEVENTS = 1 << 0
IORING_ENTER_EXT_ARG = 1 << 3  # since Linux 5.11
IORING_FEAT_SINGLE_MMAP = 1 << 0
IORING_FEAT_NODROP = 1 << 1
IORING_OFF_SQ_RING = 0
IORING_OFF_SQES = 0x10000000
IORING_REGISTER_IOWQ_MAX_WORKERS = 19
IORING_OP_NOP = 0
IORING_OP_ASYNC_CANCEL = 14
IORING_OP_URING_CMD = 46

SQE128_SIZE = 128
SQE128_CMD_SIZE = 80

# struct io_uring_sqe as URING_CMD and ASYNC_CANCEL use it: cmd_op lies where the offset does.
io_uring_sqe = Layout(
    "io_uring_sqe",
    "opcode:B flags:B ioprio:H fd:i cmd_op:I __pad1:I addr:Q len:I uring_cmd_flags:I "
    "user_data:Q buf_index:H personality:H file_index:I cmd:80s",
)
io_uring_cqe = Layout("io_uring_cqe", "user_data:Q res:i flags:I")
io_sqring_offsets = Layout(
    "io_sqring_offsets",
    "head:I tail:I ring_mask:I ring_entries:I flags:I dropped:I array:I resv1:I user_addr:Q",
)
io_cqring_offsets = Layout(
    "io_cqring_offsets",
    "head:I tail:I ring_mask:I ring_entries:I overflow:I cqes:I flags:I resv1:I user_addr:Q",
)
io_uring_params = Layout(
    "io_uring_params",
    "sq_entries:I cq_entries:I flags:I sq_thread_cpu:I sq_thread_idle:I features:I wq_fd:I "
    "resv:12s sq_off:40s cq_off:40s",
)
io_uring_getevents_arg = Layout(
    "io_uring_getevents_arg", "sigmask:Q sigmask_sz:I min_wait_usec:I ts:Q"
)
kernel_timespec = Layout("__kernel_timespec", "tv_sec:q tv_nsec:q")
