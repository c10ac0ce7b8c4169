"""What control groups leave of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ondevice import machine


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    return tmp_path / "cgroup"


def test_the_tightest_group_counts_and_pages_of_files_are_free(root):
    machine.OWN.write_text("0::/users/me\n")
    stat = "anon 5\ninactive_file 300\nactive_file 200"
    group(root / "users" / "me", {"memory.max": "2000000", "memory.current": "1500", "memory.stat": stat})
    group(root / "users", {"memory.max": "1000000", "memory.current": "600500", "memory.stat": stat})
    group(root, {"memory.max": "max"})
    assert machine.memory_bytes() == 1_000_000
    assert machine.free_bytes() == 400_000


def test_the_first_version_has_a_folder_a_controller(root):
    machine.OWN.write_text("7:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n")
    stat = "total_inactive_file 10\ntotal_active_file 5"
    files = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "1015", "memory.stat": stat}
    group(root / "memory" / "a" / "b", files)
    assert machine.memory_bytes() == 5000
    assert machine.free_bytes() == 4000
    assert [group.relative_to(root).as_posix() for version, group in machine.groups("cpu") if version == 1] == [
        "cpu/a",
        "cpu",
    ]


def test_without_groups_it_is_the_machine(root):
    assert machine.memory_bytes() is None or machine.memory_bytes() > 1 << 28
    assert list(machine.groups("memory")) == []
