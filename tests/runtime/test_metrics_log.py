import json
import resource

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from ppojax.errors import CannotWriteError, DataError
from ppojax.runtime.metrics import MetricsLog, read_metrics


def rows_without_time(path):
    return [{name: value for name, value in row.items() if name != "time"} for row in read_metrics(path)]


def write(path, steps, **kwargs):
    with MetricsLog(path, **kwargs) as log:
        for step in steps:
            log.log(step, {"reward/mean": step / 4, "actor/lr": 1e-6})


def test_one_object_a_step_on_the_disk_at_once(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log(1, {"reward/mean": np.float32(0.5), "compile/count": 3})
        assert (tmp_path / "m.jsonl").read_bytes().endswith(b"\n")
        row = json.loads((tmp_path / "m.jsonl").read_text())
    assert list(row) == ["step", "time", "reward/mean", "compile/count"]
    assert row["step"] == 1 and row["reward/mean"] == 0.5 and row["compile/count"] == 3.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_number_that_is_not_finite_is_null(tmp_path, value):
    with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb") as log:
        log.log(1, {"actor/grad_norm": value, "b": 1.0})
    (row,) = rows_without_time(tmp_path / "m.jsonl")
    assert row == {"step": 1, "actor/grad_norm": None, "b": 1.0}


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 7, "time": 1.0, "rewa', b'{"step": 3', b"\x00" * 100, b"\xff\n"], ids=range(5)
)
def test_resuming_gives_the_rows_of_an_uninterrupted_run(tmp_path, tail):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write(whole, range(1, 9))
    write(resumed, range(1, 7))
    with resumed.open("ab") as file:
        file.write(tail)
    write(resumed, range(5, 9), resume_step=4)
    assert rows_without_time(resumed) == rows_without_time(whole)


def test_a_torn_row_directly_after_the_checkpoint_is_taken_away(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2])
    with path.open("ab") as file:
        file.write(b'{"step": 3, "ti')
    write(path, [3], resume_step=2)
    assert [row["step"] for row in rows_without_time(path)] == [1, 2, 3]


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2, 3])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:-4], *lines[2:]]))
    with pytest.raises(DataError, match=r"m\.jsonl:2: is not a row of metrics; mend or remove the line"):
        MetricsLog(path, resume_step=3)


def test_resuming_without_a_file_starts_one(tmp_path):
    write(tmp_path / "m.jsonl", [5], resume_step=4)
    assert [row["step"] for row in rows_without_time(tmp_path / "m.jsonl")] == [5]


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(CannotWriteError, match=r"m\.jsonl: cannot be written: No such file or directory"):
        MetricsLog(tmp_path / "absent" / "m.jsonl")


def limited(size):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    return former


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.log(1, {"a": 1.0})
        # Room for a part of the next row only: a torn row must not stay behind.
        former = limited(path.stat().st_size + 10)
        try:
            log.log(2, {"a": 2.0})
            log.log(3, {"a": 3.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        log.log(4, {"a": 4.0})
    assert [row["step"] for row in rows_without_time(path)] == [1, 2, 3, 4]
    assert caplog.text.count("a row is kept back: File too large") == 2


def test_three_refusals_in_a_row_end_the_run(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    former = limited(0)
    try:
        log.log(1, {})
        log.log(2, {})
        with pytest.raises(CannotWriteError, match="cannot be written, 3 times in a row: File too large; free some"):
            log.log(3, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    log.close()
    assert [row["step"] for row in rows_without_time(tmp_path / "m.jsonl")] == [1, 2, 3]


def read_events(folder):
    """Read TensorBoard's record format: length, checksum, an Event, checksum."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_tensorboard_gets_the_finite_numbers_and_the_place_of_the_restart(tmp_path):
    for steps, resume_step in (([1, 2, 3], -1), ([3], 2)):
        with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", resume_step=resume_step) as log:
            for step in steps:
                log.log(step, {"reward/mean": step / 2, "x": float("nan")})
    events = read_events(tmp_path / "tb")
    assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [
        (1, "reward/mean", 0.5),
        (2, "reward/mean", 1.0),
        (3, "reward/mean", 1.5),
        (3, "reward/mean", 1.5),
    ]
    assert [e.step for e in events if e.HasField("session_log")] == [3]


def test_a_tensorboard_folder_that_cannot_be_made_warns_once(tmp_path, caplog):
    (tmp_path / "tb").write_text("a file")
    write(tmp_path / "m.jsonl", [1, 2, 3], tensorboard=tmp_path / "tb")
    assert len(rows_without_time(tmp_path / "m.jsonl")) == 3
    assert caplog.text.count("TensorBoard is off") == 1


def test_a_tensorboard_that_fails_on_the_way_warns_once(tmp_path, caplog):
    with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb") as log:
        log.log(1, {"a": 1.0})
        # Room for the second row, not for the second event.
        former = limited(2 * (tmp_path / "m.jsonl").stat().st_size + 2)
        try:
            log.log(2, {"a": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        for step in range(3, 30):
            log.log(step, {"a": 1.0})
    assert len(rows_without_time(tmp_path / "m.jsonl")) == 29
    assert caplog.text.count("TensorBoard is off: File too large; metrics.jsonl goes on") == 1
