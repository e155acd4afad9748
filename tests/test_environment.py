"""What a run records of where it came from."""

import subprocess

import pytest

from jdistill.environment import commit_of


def git(folder, *arguments):
    own = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *own, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""
    for name in ("jdistill/run.py", "results/e/table.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("before")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "dirty"), [(None, False), ("jdistill/run.py", True), ("results/e/table.md", False), ("jdistill/new.py", False)]
)
def test_a_changed_file_of_the_code_makes_a_run_dirty_and_a_table_does_not(changed, dirty, checkout):
    if changed:
        (checkout / changed).write_text("after")
    assert commit_of(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": dirty}


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert commit_of(tmp_path) == {"commit": None, "dirty": None}
