"""`nbdshard jobs` on journals that were made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdshard.cli.main import main
from nbdshard.common.ranges import Range
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JournalState
from support.journals import facts

UUID = "0b5a7a52-6d0e-4a1f-9f0a-3b8a0b1c2d3e"


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that died with some of it durable, in the state directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    path = tmp_path / "nbdshard" / f"{UUID}.journal"
    what = facts()
    with Journal.create(str(path), what) as one:
        one.record([Range(0, what.size // 4)])
    return path


def test_a_job_that_died_is_listed_as_interrupted(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs"]) == 0
    out = capsys.readouterr().out
    assert "interrupted, 25 % durable" in out
    assert str(journal) in out


def test_json_has_the_figures(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal.open(str(journal)) as one:
        one.set_state(JournalState.PAUSED)
    assert main(["jobs", "--json", str(journal)]) == 0
    (job,) = json.loads(capsys.readouterr().out)
    assert (job["state"], job["run"], job["holder_pid"]) == ("paused", 2, None)
    assert job["bytes_durable"] * 4 == job["bytes_total"]


@pytest.mark.usefixtures("journal")
@pytest.mark.parametrize("name", [UUID, UUID[:6]])
def test_export_finds_a_job_by_its_uuid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "export", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("# Mapfile")
    assert lines[-2].startswith("0x00000000") and lines[-2].endswith("+")
    assert lines[-1].endswith("?")


@pytest.mark.usefixtures("journal")
def test_a_job_nobody_knows_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "export", "ffff"]) == 1
    assert "ffff: is the beginning of no job's uuid" in capsys.readouterr().err


def test_export_wants_one_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "export"]) == 2
    assert "export takes one JOB" in capsys.readouterr().err


def test_no_journals_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == ""


def test_a_damaged_journal_is_told_and_the_others_are_listed(journal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (journal.parent / "broken.journal").write_bytes(b"nothing of ours")
    assert main(["jobs"]) == 1
    captured = capfd.readouterr()
    assert "interrupted" in captured.out
    assert "broken.journal" in captured.err
