from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hvpkit._utils import files
from hvpkit._utils.files import atomic_write, check_file, check_folder


def write(path: Path, text: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(text)


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write(path, "old")

    def interrupted() -> None:
        with atomic_write(path) as draft:
            draft.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "a.txt", tmp_path / "a.txt"
    target.parent.mkdir()
    for text in ("one", "two"):  # a link that dangles, and one that does not
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
        assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_content_is_flushed_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append("replace"), replace(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda n: (seen.append("fsync"), fsync(n))[1])
    write(tmp_path / "a.txt", "text")
    assert seen == ["fsync", "replace", "fsync"]


def test_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            write(path, "text")
    assert Path("/dev/null").is_char_device()


def test_drafts_of_dead_processes_are_swept_and_of_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead, alive = (
        f"a.txt.{files._system()}.{done.pid}.0.part",
        f"a.txt.{files._system()}.{os.getpid()}.0.part",
    )
    elsewhere, forgotten = f"a.txt.0123456789ab.{done.pid}.0.part", "a.txt.0123456789ab.1.1.part"
    others = (
        "b.txt.part",
        "a.txt.part",
        "a.txt.of.mine.x.part",
        f"ba.txt.{files._system()}.{done.pid}.0.part",
    )
    for name in (dead, alive, elsewhere, forgotten, *others):
        (tmp_path / name).write_text("")
    long_ago = time.time() - 2 * files.STALE_SECONDS
    os.utime(tmp_path / forgotten, (long_ago, long_ago))
    write(path, "text")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.txt", alive, elsewhere, *others}


def test_threads_do_not_share_a_draft(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.txt", [str(k) * 100_000 for k in range(8)]
    threads = [threading.Thread(target=write, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_name_has_a_draft(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120)
    write(path, "text")
    assert path.read_text() == "text"


def test_path_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert check_file("out", path) == path
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    assert check_file("out", str(path)) == path
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere/a.txt", "there is no folder"),
        ("/dev/full", "not a regular file"),
        ("/proc/a.txt", "cannot be written"),
        (f"{__file__}/a.txt", "there is no folder"),
        ("", "not a regular file"),
        ("a" * 300, "cannot be written"),
    ],
)
def test_path_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^out: .*{said}"):
        check_file("out", path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_found(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from hvpkit._utils.files import check_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    check_file("out", {str(tmp_path / "a.txt")!r})
except ValueError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "out: " in found.stdout
    assert "File too large" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_path_of_another_type_is_named() -> None:
    with pytest.raises(TypeError, match=r"^out must be a path"):
        check_file("out", 3)


def test_folder_below_a_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--out: cannot make the folder"):
        check_folder("--out", Path(__file__) / "folder")
