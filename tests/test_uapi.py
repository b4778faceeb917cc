"""The numbers and layouts, held against the kernel's headers by a compiled probe; and packing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from headers import include_directory

from ublkwatch import uapi
from ublkwatch.uapi import Cmd, DevFlags, DevState, IoOp, Layout

RING_LAYOUTS = (
    uapi.io_uring_sqe,
    uapi.io_uring_cqe,
    uapi.io_sqring_offsets,
    uapi.io_cqring_offsets,
    uapi.io_uring_params,
    uapi.io_uring_getevents_arg,
    uapi.kernel_timespec,
)
ALL_LAYOUTS = (*uapi.LAYOUTS, *RING_LAYOUTS)

# Where ours is not the header's, and why.
NOT_FIELDS = {("ublk_params", "_align")}  # padding that C leaves unnamed
# The header's SQE ends in an empty array, which 128-byte SQEs fill.
SQE128 = {("io_uring_sqe", ""), ("io_uring_sqe", "cmd")}

PARAM_TYPE_NAMES = {
    "basic": "BASIC",
    "discard": "DISCARD",
    "devt": "DEVT",
    "zoned": "ZONED",
    "dma": "DMA_ALIGN",
    "seg": "SEGMENT",
    "integrity": "INTEGRITY",
}


def constants() -> dict[str, int]:
    """Every number of ours under the expression that is its name in C."""
    found: dict[str, int] = {}
    found |= {f"UBLK_U_CMD_{each.name}": each for each in Cmd}
    found |= {f"UBLK_S_DEV_{each.name}": each for each in DevState}
    found |= {f"UBLK_F_{each.name}": each for each in DevFlags}
    found |= {f"UBLK_IO_OP_{each.name}": each for each in IoOp}
    for member, (bit, _) in uapi.PARAM_TYPES.items():
        found[f"UBLK_PARAM_TYPE_{PARAM_TYPE_NAMES[member]}"] = bit
    for name, value in vars(uapi).items():
        if isinstance(value, int) and name.isupper():
            found[in_c(name)] = value
    return found


def in_c(name: str) -> str:
    if name.startswith("SYS_"):
        return name.lower().replace("sys_", "__NR_")
    return {
        "SQE128_SIZE": "2 * sizeof(struct io_uring_sqe)",
        "SQE128_CMD_SIZE": "2 * sizeof(struct io_uring_sqe) - offsetof(struct io_uring_sqe, cmd)",
    }.get(name, name)


def fields(layout: Layout) -> list[str]:
    return [field for field in layout.fields if (layout.name, field) not in NOT_FIELDS]


def probe_source() -> str:
    lines = []
    for layout in ALL_LAYOUTS:
        struct = f"struct {layout.name}"
        lines.append(f'P("{layout.name}", sizeof({struct}));')
        for field in fields(layout):
            lines.append(f'P("{layout.name}.{field}", offsetof({struct}, {field}));')
            lines.append(f'P("{layout.name}.{field} size", sizeof((({struct} *)0)->{field}));')
    lines += [f'P("{name}", {name});' for name in constants()]
    headers = ("stddef.h", "stdio.h", "asm/unistd.h", "linux/io_uring.h", "linux/ublk_cmd.h")
    includes = "\n".join(f"#include <{header}>" for header in headers)
    body = "\n".join(lines)
    return (
        f"{includes}\n"
        '#define P(name, value) printf("%s\\t%llu\\n", name, (unsigned long long)(value))\n'
        f"int main(void) {{\n{body}\nreturn 0;\n}}\n"
    )


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the headers say: sizes, offsets and values by the names used above."""
    if shutil.which("cc") is None:
        pytest.fail("no C compiler; as root: apt-get install gcc libc6-dev")
    where = tmp_path_factory.mktemp("probe")
    source, program = where / "probe.c", where / "probe"
    source.write_text(probe_source())
    include = include_directory()
    triplet = run("cc", "-print-multiarch").strip()
    run("cc", "-I", include, "-I", include / triplet, "-o", program, source)
    rows = (line.split("\t") for line in run(program).splitlines())
    return {name: int(value) for name, value in rows}


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=lambda layout: layout.name)
def test_layout_is_the_headers(layout: Layout, header: dict[str, int]) -> None:
    ours, theirs = {}, {}
    for field in fields(layout):
        name = f"{layout.name}.{field}"
        ours[name], theirs[name] = layout.offsets[field], header[name]
        if (layout.name, field) not in SQE128:
            size = f"{name} size"
            ours[size], theirs[size] = layout.sizes[field], header[size]
    if (layout.name, "") not in SQE128:
        ours["size"], theirs["size"] = layout.size, header[layout.name]
    assert ours == theirs


def test_sqe_fills_its_128_bytes() -> None:
    assert uapi.io_uring_sqe.size == uapi.SQE128_SIZE
    assert uapi.io_uring_sqe.sizes["cmd"] == uapi.SQE128_CMD_SIZE


def test_every_number_is_the_headers(header: dict[str, int]) -> None:
    ours = constants()
    assert ours == {name: header[name] for name in ours}


def test_every_layout_of_the_module_is_probed() -> None:
    there = [value for value in vars(uapi).values() if isinstance(value, Layout)]
    assert sorted(layout.name for layout in there) == sorted(each.name for each in ALL_LAYOUTS)


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=lambda layout: layout.name)
def test_what_is_packed_is_unpacked(layout: Layout) -> None:
    numbers = layout.unpack(bytes(layout.size))
    distinct = {field: at % 127 + 1 for at, field in enumerate(numbers)}
    assert layout.unpack(layout.pack(**distinct)) == distinct
    assert layout.pack(**distinct) != layout.pack() == bytes(layout.size)


def test_a_field_that_the_struct_lacks_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match=r"ublksrv_io_cmd has no field qid"):
        uapi.ublksrv_io_cmd.pack(qid=1)


def test_a_number_too_large_for_its_field_is_refused() -> None:
    with pytest.raises(Exception, match=r"format requires"):
        uapi.ublksrv_io_cmd.pack(q_id=1 << 16)


def all_params() -> dict[str, dict[str, int]]:
    found = {}
    for start, (name, (_, layout)) in enumerate(uapi.PARAM_TYPES.items(), 1):
        found[name] = {
            field: start + at for at, field in enumerate(layout.unpack(bytes(layout.size)))
        }
    return found


def test_params_come_back_as_they_were_packed_but_for_devt() -> None:
    params = all_params()
    packed = uapi.pack_params(params)
    del params["devt"]
    assert len(packed) == uapi.ublk_params.unpack(packed)["len"] == uapi.ublk_params.size
    assert uapi.unpack_params(packed) == params


def test_params_name_only_the_members_whose_bit_is_set() -> None:
    assert uapi.unpack_params(uapi.pack_params({"basic": {"attrs": 3}})).keys() == {"basic"}


def test_devt_is_read_where_the_kernel_gives_it() -> None:
    bit, layout = uapi.PARAM_TYPES["devt"]
    packed = uapi.ublk_params.pack(types=bit, devt=layout.pack(disk_major=259))
    assert uapi.unpack_params(packed)["devt"]["disk_major"] == 259


def test_a_short_answer_of_linux_6_12_gives_the_members_that_it_holds() -> None:
    short = uapi.pack_params(all_params())[:112]
    assert uapi.unpack_params(short).keys() == {"basic", "discard", "zoned"}
