"""The attacks of attack.py and fuzz.py, in short: both are run by hand for long."""

import signal
from pathlib import Path

import attack
import fuzz


def test_killed_at_any_moment_and_resumed_a_run_ends_as_if_nothing_were(tmp_path: Path) -> None:
    attack.interrupt(attack.Place(tmp_path), 4, (signal.SIGKILL,), ["cass-bf16"], seed=1)


def test_mutated_files_are_read_or_refused_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = fuzz.fuzz(tmp_path, 250, tmp_path)
    assert found.total() >= 240 and found["read"] > 10 and not found["broken"]
