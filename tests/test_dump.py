"""Dumps: whole files, the same bytes, one clear refusal."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from pq_compile.dump import Dump, constraints, write_whole
from pq_compile.errors import Refused
from pq_compile.plan import Axis, Group, Groups, Segment
from tests import toy_plans


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_stage_becomes_a_text_file(tmp_path: Path) -> None:
    Dump(tmp_path / "new").write("01_groups", "a\n")
    assert (tmp_path / "new" / "01_groups.txt").read_bytes() == b"a\n"


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Dump(None).write("01_groups", "a\n")
    Dump(None).kernel("gemm", "a\n")
    assert files(tmp_path) == []


def test_several_graphs_are_told_apart_and_share_kernels(tmp_path: Path) -> None:
    for index, prefix in enumerate(("", "graph1_")):
        dump = Dump(tmp_path, prefix)
        dump.write("00_capture", f"{index}\n")
        dump.write("report.html", "<p>\n")
        dump.kernel("gemm_128x128", "pass\n")
    assert files(tmp_path) == [
        "00_capture.txt",
        "graph1_00_capture.txt",
        "graph1_report.html",
        "kernels/gemm_128x128.py",
        "report.html",
    ]


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", ".hidden", "a b\0c"])
def test_a_name_never_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    Dump(tmp_path / "d").kernel(name, "pass\n")
    (written,) = files(tmp_path)
    assert written.startswith("d/kernels/")
    assert not written.startswith("d/kernels/.")


def test_a_failed_write_leaves_the_old_file_and_no_part_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pq_compile.dump.os.replace", full)
    with pytest.raises(Refused, match=r"cannot write .*a\.txt: No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert files(tmp_path) == ["a.txt"]


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="it is a folder; name a file inside it"):
        write_whole(tmp_path, "text")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("in the way")
    with pytest.raises(Refused, match=r"permuquant: cannot write .*00_capture"):
        Dump(tmp_path / "dump").write("00_capture", "text")


def _write_often(folder: Path, letter: str) -> None:
    for _ in range(50):
        Dump(folder).write("00_capture", letter * 100_000)


def test_two_processes_in_one_folder_leave_whole_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(tmp_path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    path, seen = tmp_path / "00_capture.txt", set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen | {path.read_text()} <= {"a" * 100_000, "b" * 100_000}
    assert files(tmp_path) == ["00_capture.txt"]


def test_constraints_are_a_graph_of_groups_and_axes() -> None:
    axis = Axis('odd"name\\.weight', 0)
    text = constraints(Groups({axis: (Segment(0, 8),)}, (Group(str(axis), (0,), 8, (axis,)),)))
    assert text.splitlines() == [
        "graph constraints {",
        "    rankdir=LR; node [fontname=monospace];",
        '    g0 [shape=ellipse, style=solid, label="8\\nfree"];',
        '    "odd\\"name\\\\.weight[0]" [shape=box];',
        '    g0 -- "odd\\"name\\\\.weight[0]";',
        "}",
    ]


def test_constraints_name_what_pins() -> None:
    text = constraints(toy_plans.groups())
    assert 'style=dashed, label="16\\npinned by graph input x"' in text
