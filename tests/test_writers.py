import json
import struct

from tensorboardX.proto import event_pb2

from tgeo_jax import writers
from tgeo_jax.writers import Writers


def opened(workdir, step=0, progress=False):
    return Writers(workdir, step=step, total_steps=100, title="test", progress=progress)


def record(step, seed=0, loss=1.0):
    return {"step": step, "seed": seed, "train/loss": loss}


def run(workdir, records, step=0):
    """One attempt at a run, which begins after `step`."""
    attempt = opened(workdir, step)
    attempt.write(records)
    attempt.close()


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_records_are_json_lines(tmp_path):
    run(tmp_path, [record(10, loss=0.5), record(10, seed=1, loss=0.25)])
    assert [json.loads(line) for line in lines(tmp_path)] == [
        {"step": 10, "seed": 0, "train/loss": 0.5},
        {"step": 10, "seed": 1, "train/loss": 0.25},
    ]


def test_records_are_on_disk_when_write_returns(tmp_path):
    attempt = opened(tmp_path)
    attempt.write([record(10)])
    assert len(lines(tmp_path)) == 1
    attempt.close()


def test_a_second_write_appends(tmp_path):
    attempt = opened(tmp_path)
    attempt.write([record(10)])
    attempt.write([record(20)])
    attempt.close()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [10, 20]


def test_resuming_removes_records_after_its_step_and_keeps_the_others(tmp_path):
    run(tmp_path, [record(10), record(20), record(20, seed=1), record(30)])
    run(tmp_path, [record(30, loss=7.0)], step=20)
    found = writers.read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["seed"], r["train/loss"]) for r in found] == [
        (10, 0, 1.0),
        (20, 0, 1.0),
        (20, 1, 1.0),
        (30, 0, 7.0),
    ]


def test_starting_again_from_nothing_removes_all_records(tmp_path):
    run(tmp_path, [record(10)])
    run(tmp_path, [], step=0)
    assert lines(tmp_path) == []


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "seed": 0}\n{"step": 20, "see')
    assert writers.read_records(path) == [{"step": 10, "seed": 0}]


def test_resuming_after_a_torn_line_does_not_glue_the_next_record_to_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "seed": 0}\n{"step": 20, "see')
    run(tmp_path, [record(20)], step=20)
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [10, 20]


def test_a_missing_file_has_no_records(tmp_path):
    assert writers.read_records(tmp_path / "metrics.jsonl") == []


def events(folder):
    """Scalars in a folder of TensorBoard files, by the TFRecord format: length, crc, data, crc."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return found


def test_tensorboard_gets_every_number_of_every_seed(tmp_path):
    run(tmp_path, [record(10, loss=0.5), record(10, seed=1, loss=0.25), record(20, loss=0.125)])
    tensorboard = tmp_path / "tensorboard"
    assert events(tensorboard / "seed_0") == [(10, "train/loss", 0.5), (20, "train/loss", 0.125)]
    assert events(tensorboard / "seed_1") == [(10, "train/loss", 0.25)]


def test_the_progress_bar_starts_at_the_resumed_step_and_moves_to_the_given_one(tmp_path, capfd):
    attempt = opened(tmp_path, step=40, progress=True)
    attempt.progress(60, accuracy="0.9")
    attempt.close()
    shown = capfd.readouterr().err
    assert "40/100" in shown
    assert "60/100" in shown
    assert "accuracy=0.9" in shown


def test_no_progress_bar_is_shown_unless_asked_for(tmp_path, capfd):
    attempt = opened(tmp_path)
    attempt.progress(60)
    attempt.close()
    assert capfd.readouterr().err == ""
