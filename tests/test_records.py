"""The metrics file and the trackers."""

import json
import sys

import pytest

from jdistill.errors import RunError, UsageError
from jdistill.records import MetricsFile, flatten
from jdistill.registry import build, options

ROW = {"stage": "distil", "epoch": 1, "step": 5, "train": {"loss": 0.1, "deep": {"x": 2}}, "fine": True, "none": None}


def test_rows_are_lines_and_lengths_are_bytes(tmp_path):
    seen = []
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl", (seen.append,))
    file.truncate(0)
    assert file.last() == {}
    lengths = [file.append({"epoch": i, "value": 1 / 3}) for i in range(3)]
    text = file.path.read_bytes()
    assert lengths[-1] == len(text) and lengths == [len(b"\n".join(text.split(b"\n")[: i + 1])) + 1 for i in range(3)]
    assert [json.loads(line) for line in text.splitlines()] == seen == [{"epoch": i, "value": 1 / 3} for i in range(3)]
    assert file.last() == seen[-1]


def test_truncate_forgets_what_came_after(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate(0)
    first = file.append({"epoch": 1})
    whole = [file.append({"epoch": 2}), file.path.read_bytes()]
    with file.path.open("a") as half:
        half.write('{"epoch": 3, "tr')
    file.truncate(first)
    assert file.path.read_bytes() == b'{"epoch": 1}\n'
    assert [file.append({"epoch": 2}), file.path.read_bytes()] == whole


def test_a_file_shorter_than_its_checkpoint_says_is_no_silent_hole(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl is shorter than its checkpoint says; delete"):
        file.truncate(10)


def test_numbers_json_lacks_become_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"validation": {"cross_entropy": float("inf"), "kl": [float("nan"), 1.0]}})
    assert file.path.read_text() == '{"validation": {"cross_entropy": null, "kl": [null, 1.0]}}\n'


def test_flatten_keeps_the_numbers():
    assert flatten(ROW) == {"epoch": 1, "step": 5, "train/loss": 0.1, "train/deep/x": 2}


def test_jsonl_listens_to_nothing(tmp_path):
    tracker = build("tracker", {"name": "jsonl"})
    assert tracker.start(tmp_path, "run", {}) is None and tracker.finish({}) is None
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401 (the reader below is of the same package)
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    tracker = build("tracker", {"name": "tensorboard"})
    listener = tracker.start(tmp_path, "run", {})
    listener(ROW)
    listener({**ROW, "step": 10, "train": {"loss": 0.05}})
    tracker.finish({"metrics": {"test": {"accuracy": 0.75}}, "size": {"bytes": 100}, "steps": 10})
    (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    found = {}
    for record in records(path.read_bytes()):
        event = Event.FromString(record)
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 6)))
    assert found == {
        "train/loss": [(5, 0.1), (10, 0.05)], "train/deep/x": [(5, 2.0)],
        "result/metrics/test/accuracy": [(10, 0.75)], "result/size/bytes": [(10, 100.0)],
    }  # fmt: skip


def records(content):
    """TFRecord: length [8], checksum [4], data [length], checksum [4]."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield content[12 : 12 + length]
        content = content[16 + length :]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_tracker_that_is_not_installed_names_its_extra(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as error:
        build("tracker", {"name": name}).start(tmp_path, "run", {})
    assert str(error.value) == f"tracker={name} needs {module}, which is not installed: pip install 'jdistill[{name}]'"


def test_trackers_are_options_and_check_their_keys():
    assert list(options("tracker")) == ["jsonl", "mlflow", "tensorboard", "wandb"]
    with pytest.raises(UsageError, match=r"^tracker\.mode must be online or offline, got 'of'"):
        build("tracker", {"name": "wandb", "mode": "of"})
