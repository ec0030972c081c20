import json
import re

import pytest

from tgeo_jax import config, workdir
from tgeo_jax.errors import CheckpointError, ConfigError
from tgeo_jax.workdir import Workdir


def changed(**fields):
    found = config.default()
    found.update_from_flattened_dict({name.replace("__", "."): v for name, v in fields.items()})
    return found


def test_claiming_makes_the_folder_and_records_the_configuration(tmp_path):
    folder = Workdir(tmp_path / "runs" / "a")
    folder.claim(changed(seed=5))
    assert json.loads((tmp_path / "runs" / "a" / "config.json").read_text())["seed"] == 5
    assert folder.config()["data"]["name"] == "digits"


def test_claiming_again_with_the_same_configuration_is_allowed(tmp_path):
    # A tuple becomes a list in JSON; that is not a difference.
    same = {"optimizer__drop_epochs": (1, 2), "seed": 5}
    Workdir(tmp_path).claim(changed(**same))
    before = (tmp_path / "config.json").read_text()
    Workdir(tmp_path).claim(changed(**same))
    assert (tmp_path / "config.json").read_text() == before


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    Workdir(tmp_path).claim(changed())
    other = changed(data__batch_size=32, loss__kl__temperature=2.0)
    said = "data.batch_size: 64 -> 32\n  loss.kl.temperature: 4.0 -> 2.0\nUse another --workdir"
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} holds a run")) as caught:
        Workdir(tmp_path).claim(other)
    assert said in str(caught.value)


def test_a_refused_claim_changes_nothing(tmp_path):
    Workdir(tmp_path).claim(changed())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1"):
        Workdir(tmp_path).claim(changed(seed=1))
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_has_a_result_once_it_is_finished(tmp_path):
    folder = Workdir(tmp_path)
    assert folder.result() is None
    folder.write_result({"test_accuracy": [0.5, 0.25]})
    assert folder.result() == {"test_accuracy": [0.5, 0.25]}


def test_everything_lies_inside_the_folder(tmp_path):
    folder = Workdir(tmp_path)
    names = [p.relative_to(tmp_path).as_posix() for p in (folder.checkpoints, folder.metrics)]
    names += [p.relative_to(tmp_path).as_posix() for p in (folder.samples, folder.report)]
    assert names == ["checkpoints", "metrics.jsonl", "samples.npz", "report"]


def test_generations_lie_in_folders_of_their_own_in_the_order_of_their_numbers(tmp_path):
    folder = Workdir(tmp_path)
    assert folder.generations() == []
    for number in (10, 2, 0):
        folder.generation(number).claim(changed(generation=number))
    names = [run.path.relative_to(tmp_path).as_posix() for run in folder.generations()]
    assert names == ["generation_0", "generation_2", "generation_10"]  # as numbers: 2 before 10
    assert [run.config()["generation"] for run in folder.generations()] == [0, 2, 10]


def test_a_folder_set_aside_is_not_a_generation(tmp_path):
    for name in ("generation_0", "generation_1", "generation_1_old"):
        (tmp_path / name).mkdir()
    assert [run.path.name for run in Workdir(tmp_path).generations()] == [
        "generation_0", "generation_1",
    ]  # fmt: skip


def test_of_a_finished_chain_the_last_student_teaches(tmp_path):
    whole = Workdir(tmp_path)
    whole.claim(changed())
    for number in range(3):
        whole.generation(number).claim(changed(generation=number))
        whole.generation(number).write_result({})
    # All generations are finished, but the chain has not said so yet.
    with pytest.raises(CheckpointError, match=r"^role\.trikd\.anchor=.*has not finished.*resumes"):
        workdir.trained(str(tmp_path), "role.trikd.anchor")
    whole.write_result({})
    found = workdir.trained(str(tmp_path), "role.trikd.anchor")
    assert found.path == tmp_path / "generation_2"


def test_a_teacher_that_was_never_trained_is_named_with_how_to_get_one(tmp_path):
    path = str(tmp_path / "teacher")
    said = rf"^teacher\.workdir='{re.escape(path)}': no run there; do this\nor name the workdir"
    with pytest.raises(CheckpointError, match=said):
        workdir.trained(path, "teacher.workdir", "do this")


def test_a_teacher_that_is_not_finished_is_told_to_resume(tmp_path):
    Workdir(tmp_path).claim(changed())
    with pytest.raises(CheckpointError, match=r"^teacher\.workdir=.*has not finished.*resumes"):
        workdir.trained(str(tmp_path), "teacher.workdir")


def test_a_finished_teacher_is_found(tmp_path):
    Workdir(tmp_path).claim(changed())
    Workdir(tmp_path).write_result({})
    assert workdir.trained(str(tmp_path), "teacher.workdir").path == tmp_path


def test_a_run_of_an_older_version_goes_on_although_fields_were_added(tmp_path):
    old = json.loads(config.to_json(changed()))
    for name in ("cutout", "mean", "pipeline"):
        del old["data"][name]
    del old["precision"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    Workdir(tmp_path).check_same(changed())
    other = changed()
    other.data.cutout = 4  # what the old version could not do
    with pytest.raises(ConfigError, match=r"data\.cutout: 0 -> 4"):
        Workdir(tmp_path).check_same(other)


def test_a_run_goes_on_elsewhere_and_with_other_workers(tmp_path):
    Workdir(tmp_path).claim(changed())
    other = changed()
    other.data.update(dir="/elsewhere", workers=3, max_corrupt=50)
    other.train.checkpoint_every = 7
    Workdir(tmp_path).claim(other)
    assert Workdir(tmp_path).config()["data"]["workers"] == 0  # as it was begun


def test_every_commit_that_trained_a_run_is_kept_in_order(tmp_path):
    folder = Workdir(tmp_path)
    assert folder.commits() == []
    for commit in ("a", "a", "b", "a"):
        folder.note_commit(commit)
    assert folder.commits() == ["a", "b", "a"]
