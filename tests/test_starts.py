"""On which machines a run was trained: what is kept of each start, and how it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm_decor.training.keeping.folder import RunFolder
from timm_decor.training.keeping.starts import longest, trained_on, versions_used, with_start

VERSIONS = {"torch": "2.14.0", "timm": "1.0.31"}


def machine(threads: int = 1, **others: Any) -> dict[str, Any]:
    return {"gpu": None, "cpu": "a CPU", "processes": 1, "torch_threads": threads, **others}


def starts(*of: tuple[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"steps": steps, "machine": on, "versions": VERSIONS} for steps, on in of]


class TestWhatIsKept:
    def test_a_start_on_the_same_machine_is_none(self):
        first = with_start([], 0, machine(), VERSIONS)
        assert with_start(first, 8, machine(), VERSIONS) == first == starts((0, machine()))

    def test_another_machine_or_version_is_one(self):
        first = with_start([], 0, machine(), VERSIONS)
        assert with_start(first, 8, machine(2), VERSIONS) == starts((0, machine()), (8, machine(2)))
        assert len(with_start(first, 8, machine(), {**VERSIONS, "torch": "2.15.0"})) == 2

    def test_what_is_trained_anew_was_not_trained_there(self):
        """The run went on at update 8 elsewhere, and then from an earlier state here."""
        known = starts((0, machine()), (8, machine(2)), (12, machine(3)))
        assert with_start(known, 8, machine(), VERSIONS) == starts((0, machine()))
        assert with_start(known, 9, machine(), VERSIONS) == starts((0, machine()), (8, machine(2)), (9, machine()))

    def test_a_folder_keeps_them(self, tmp_path: Path):
        folder = RunFolder(tmp_path)
        folder.note_start(0, machine(), VERSIONS)
        assert RunFolder(tmp_path).note_start(4, machine(2), VERSIONS) == starts((0, machine()), (4, machine(2)))
        (tmp_path / "starts.json").write_text("{")
        assert folder.note_start(6, machine(), VERSIONS) == starts((6, machine()))


class TestHowItIsTold:
    def test_of_one(self):
        assert trained_on(starts((0, machine(2))), 10) == "a CPU (2 threads)"
        assert trained_on(starts((0, machine(gpu="a GPU", processes=8))), 10) == "8 x a GPU"
        assert trained_on(starts((0, machine())), 0) == "a CPU (1 thread)"

    def test_of_several(self):
        found = starts((0, machine()), (6, machine(workers=3)), (7, machine(2)), (9, machine(gpu="a GPU")))
        words = "a CPU (1 thread, 70 % of the updates), then a CPU (2 threads, 20 % of the updates), then a GPU"
        assert trained_on(found, 10) == words

    def test_where_nothing_was_trained_is_left_out(self):
        assert trained_on(starts((0, machine()), (10, machine(2))), 10) == "a CPU (1 thread)"

    def test_of_a_run_that_was_stopped_before_the_epoch_it_went_on_in_had_ended(self):
        """Its last epoch on record ended at update 4, it went on after 6."""
        found = starts((0, machine()), (2, machine(2)), (6, machine(3)))
        assert trained_on(found, 4) == "a CPU (1 thread, 33 % of the updates), then a CPU (2 threads)"

    def test_of_a_run_that_began_under_an_earlier_version(self):
        words = "a machine that is not on record (40 % of the updates), then a CPU (1 thread)"
        assert trained_on(starts((4, machine())), 10) == words

    def test_versions(self):
        later = {"steps": 5, "machine": machine(), "versions": {**VERSIONS, "torch": "2.15.0"}}
        found = [*starts((0, machine())), later]
        assert versions_used(found, 10, "torch") == "2.14.0, then 2.15.0"
        assert versions_used(found, 10, "timm") == "1.0.31"
        assert versions_used(found, 5, "torch") == "2.14.0", "the second start trained nothing"
        assert versions_used(found[:1], 0, "torch") == "2.14.0"

    def test_the_longest(self):
        found = starts((0, machine()), (3, machine(2)), (8, machine(3)))
        assert longest(found, 10)["machine"]["torch_threads"] == 2
        assert longest(found, 20)["machine"]["torch_threads"] == 3
