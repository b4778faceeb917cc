"""Trust, on real files: what others could have written is refused, with the way out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ublkwatch.trust import TrustError, check_executable, open_trusted, program

NOBODY = 65534


def script(path: Path, text: str = "#!/bin/sh\n", mode: int = 0o755) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def way(tmp_path: Path) -> Path:
    """A directory of ours, with one above it that a test may spoil."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    return inner


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o755])
def test_a_file_that_only_we_can_write_is_opened(way: Path, mode: int) -> None:
    path = script(way / "file", "content", mode)
    descriptor = open_trusted(path)
    try:
        assert os.read(descriptor, 100) == b"content"
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o777, 0o1777])
@pytest.mark.parametrize("which", ["file", "inner", "outer"])
def test_what_others_can_write_is_refused_wherever_on_the_way_it_is(
    way: Path, which: str, mode: int
) -> None:
    path = script(way / "file")
    bad = {"file": path, "inner": way, "outer": way.parent}[which]
    bad.chmod(mode)
    if bad is not path and mode == 0o1777:
        os.close(open_trusted(path))  # sticky, as /tmp is: what is ours in it stays ours
        return
    for refuse in (open_trusted, check_executable):
        with pytest.raises(
            TrustError, match=rf"^{bad}: others can write it; try: chmod go-w {bad}$"
        ):
            refuse(path)


@pytest.mark.parametrize("which", ["file", "inner", "outer"])
def test_what_belongs_to_others_is_refused_wherever_on_the_way_it_is(way: Path, which: str) -> None:
    path = script(way / "file")
    bad = {"file": path, "inner": way, "outer": way.parent}[which]
    os.chown(bad, NOBODY, NOBODY)
    says = rf"^{bad}: belongs to uid {NOBODY}; try: chown root {bad}$"
    with pytest.raises(TrustError, match=says):
        open_trusted(path)


def test_a_sticky_directory_protects_only_what_is_ours_in_it(way: Path) -> None:
    way.chmod(0o1777)
    theirs = way / "theirs"
    theirs.mkdir()
    path = script(theirs / "file")
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(TrustError, match=f"chown root {theirs}"):
        open_trusted(path)


def test_a_link_is_followed_and_every_directory_on_its_way_is_judged(way: Path) -> None:
    elsewhere = way.parent / "elsewhere"
    elsewhere.mkdir()
    path = script(elsewhere / "file")
    (way / "absolute").symlink_to(path)
    (way / "relative").symlink_to("../elsewhere/./file")
    (way / "directory").symlink_to("../elsewhere")
    ways = [way / "absolute", way / "relative", way / "directory" / "file"]
    for link in ways:
        check_executable(link)
    elsewhere.chmod(0o777)
    for link in ways:
        with pytest.raises(TrustError, match=f"chmod go-w {elsewhere}"):
            check_executable(link)


def test_somebody_elses_link_in_a_sticky_directory_is_refused(way: Path) -> None:
    way.chmod(0o1777)
    link = way / "link"
    link.symlink_to(script(way / "file"))
    os.lchown(link, NOBODY, NOBODY)
    with pytest.raises(TrustError, match=f"{link}: belongs to .*chown -h root {link}"):
        open_trusted(link)


def test_links_in_a_circle_end(way: Path) -> None:
    (way / "a").symlink_to("b")
    (way / "b").symlink_to("a")
    with pytest.raises(TrustError, match="too many symbolic links"):
        open_trusted(way / "a")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (str, FileNotFoundError),
        (Path.mkdir, IsADirectoryError),
        (os.mkfifo, TrustError),
        (lambda path: path.symlink_to("missing"), FileNotFoundError),
        (lambda path: path.symlink_to("/dev/null"), TrustError),
    ],
)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    way: Path, make: Callable[[Path], object], error: type[OSError]
) -> None:
    make(way / "thing")
    with pytest.raises(error):
        open_trusted(way / "thing")


def test_a_file_is_no_directory(way: Path) -> None:
    script(way / "file")
    with pytest.raises(NotADirectoryError, match=f"{way}/file"):
        open_trusted(way / "file" / "inside")


def test_a_relative_path_is_judged_from_here(way: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(way / "file")
    monkeypatch.chdir(way)
    os.close(open_trusted(Path("file")))
    way.parent.chmod(0o777)
    with pytest.raises(TrustError, match="chmod go-w"):
        open_trusted(Path("file"))


def test_descriptors_are_not_leaked(way: Path) -> None:
    path = script(way / "file")
    (way / "link").symlink_to(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("file", "link", "missing", "file/inside"):
        try:
            os.close(open_trusted(way / name))
        except OSError:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- executables ---------------------------------------------------------------------------------


def test_programs_and_scripts_of_ours_are_executables(way: Path) -> None:
    check_executable(Path(sys.executable))
    check_executable(Path("/bin/sh"))
    check_executable(script(way / "script", "#! /bin/sh -e\ntrue\n"))


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("#!/bin/sh\n", 0o644, "is not executable; try: chmod .x "),
        ("echo a shell would run this\n", 0o755, "is neither a program nor a script"),
        ("", 0o755, "is neither a program nor a script"),
        ("#!\n", 0o755, "is neither a program nor a script"),
        ("#!/bin/no-such-shell\n", 0o755, "No such file or directory: '/bin/no-such-shell'"),
    ],
)
def test_what_the_kernel_could_not_execute_is_refused(
    way: Path, text: str, mode: int, says: str
) -> None:
    with pytest.raises(OSError, match=says):
        check_executable(script(way / "file", text, mode))


def test_the_interpreter_of_a_script_is_judged_like_a_program(way: Path) -> None:
    interpreter = script(way / "interpreter", mode=0o775)
    with pytest.raises(TrustError, match=f"chmod go-w {interpreter}"):
        check_executable(script(way / "script", f"#!{interpreter}\n"))


def test_a_script_that_interprets_itself_is_refused(way: Path) -> None:
    with pytest.raises(TrustError, match="script of a script"):
        check_executable(script(way / "self", f"#!{way}/self\n"))


def test_a_program_has_another_name_when_it_or_its_interpreter_is_another(way: Path) -> None:
    interpreter = way / "sh"
    interpreter.write_bytes(Path("/bin/sh").read_bytes())
    interpreter.chmod(0o755)
    server = script(way / "server", f"#!{interpreter}\n")
    names = [program(server)]
    assert program(server) == names[0]
    script(way / "fresh", f"#!{interpreter}\n").rename(server)  # as a package manager does
    names.append(program(server))
    server.write_text(f"#!{interpreter} -e\n")
    names.append(program(server))
    (way / "fresh").write_bytes(interpreter.read_bytes())
    (way / "fresh").chmod(0o755)
    (way / "fresh").rename(interpreter)
    names.append(program(server))
    assert len(set(names)) == 4
    server.chmod(0o777)
    with pytest.raises(TrustError, match="others can write it"):
        program(server)
