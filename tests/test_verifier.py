"""Verification in a run: at every evaluation, in the result, in the report."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from tests import tiny_faces
from tgeo_jax import (
    assemble,
    checkpoint,
    dry_run,
    models,
    report,
    roles,
    storage,
    train,
    verification,
    verifier,
)
from tgeo_jax import config as configs
from tgeo_jax.data import faces
from tgeo_jax.errors import DataError
from tgeo_jax.workdir import Workdir
from tgeo_jax.writers import read_records

pytestmark = pytest.mark.xdist_group("faces")
NET = {"widths": (2, 4), "depths": (1,), "embedding": 6, "stem_strides": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    source = tiny_faces.write_folder(folder / "source")
    faces.prepare("face_folder", source, str(folder))
    return str(folder)


def config(data_dir, role="alone"):
    chosen = configs.default()
    chosen.data.update(
        name="face_folder", dir=data_dir, validation_fraction=0.2, batch_size=10, eval_batch_size=4
    )
    chosen.student.name = chosen.teacher.name = "iresnet"
    for which in ("student", "teacher"):
        chosen[which].iresnet.update(NET)
    chosen.role.name, chosen.loss.hard, chosen.ratio.name = role, "cosface", "weighted"
    chosen.train.epochs, chosen.seeds = 2, 2
    return chosen


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = train.run(config(data_dir, "dml"), folder, progress=False)
    return Workdir(folder), result


def by_hand(folder, index, flip_average=True):
    """Similarities of one seed's trained student, with its images one by one."""
    run = assemble.assemble(config(*[folder.config()["data"]["dir"]]))
    module, pairs = run.method.student, run.dataset.verification
    variables = checkpoint.load_network(folder.checkpoints, "last", index)

    @jax.jit
    def embed(image):
        inputs = run.method.clean_view(image[None])
        return module.apply(variables, inputs, train=False, method="embed")[0]

    embeddings = [np.float64(embed(image)) for image in pairs.images]
    if flip_average:
        embeddings = [
            one + np.float64(embed(image[:, ::-1]))
            for one, image in zip(embeddings, pairs.images, strict=True)
        ]
    unit = [one / np.linalg.norm(one) for one in embeddings]
    return np.array([unit[i] @ unit[j] for i, j in pairs.pairs]), pairs


def test_similarities_are_cosines_of_flip_averaged_embeddings(trained):
    folder = trained[0]
    stored = storage.read_arrays(folder.verification)
    assert stored["student"].shape == stored["teacher"].shape == (2, 8)
    for index in range(2):
        expected, pairs = by_hand(folder, index)
        np.testing.assert_allclose(stored["student"][index], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(stored["same"], pairs.same)
    plain, _ = by_hand(folder, 0, flip_average=False)
    assert np.abs(plain - stored["student"][0]).max() > 1e-4


def test_every_record_has_the_scores_and_the_result_their_mean(trained):
    folder, result = trained[0], trained[1]
    stored = storage.read_arrays(folder.verification)
    records = read_records(folder.metrics)
    assert [record["epoch"] for record in records] == [1, 1, 2, 2]
    expected = [
        verification.scores(one, stored["same"], stored["folds"]) for one in stored["student"]
    ]
    for record, scores in zip(records[-2:], expected, strict=True):
        for name, value in scores.items():
            assert record[f"verification/{name}"] == pytest.approx(value)
    accuracies = [scores["accuracy"] for scores in expected]
    figures = result["figures"]["last"]
    assert figures["verification/accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert result["per_seed"][1]["last"]["verification/auc"] == pytest.approx(expected[1]["auc"])
    taught = [
        verification.scores(one, stored["same"], stored["folds"]) for one in stored["teacher"]
    ]
    assert result["teacher"]["verification"]["auc"] == pytest.approx(
        np.mean([scores["auc"] for scores in taught])
    )
    assert json.loads((folder.path / "result.json").read_text())["figures"]["last"] == figures


def test_the_report_has_a_roc_figure(trained, tmp_path):
    runs = {"one": trained[0], "two": trained[0]}
    page = report.write(runs, tmp_path).read_text()
    assert "Verification of people who were never trained on" in page
    assert (tmp_path / "figures" / "roc.png").stat().st_size > 10_000


def test_damaged_similarities_are_named(trained, tmp_path):
    content = trained[0].verification.read_bytes()
    (tmp_path / "verification.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"verification\.npz: damaged .*or delete it"):
        storage.read_arrays(tmp_path / "verification.npz")


def test_a_network_without_embeddings_is_not_verified(data_dir, tmp_path):
    chosen = config(data_dir)
    chosen.student.name, chosen.loss.hard, chosen.train.epochs = "mlp", "cross_entropy", 1
    chosen.student.mlp.hidden = (2,)
    result = train.run(chosen, tmp_path, progress=False)
    assert "verification" not in result
    assert not Workdir(tmp_path).verification.exists()


def test_several_seeds_are_embedded_as_each_by_itself(data_dir):
    run = assemble.assemble(config(data_dir))
    module = run.method.student
    both = [
        jax.jit(module.init)(jax.random.key(seed), np.float32(run.dataset.example))
        for seed in range(2)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *both)
    together = verifier.of(run, module, seeds=True).similarity(stacked)
    for index, variables in enumerate(both):
        alone = verifier.of(run, module, seeds=False).similarity(variables)
        np.testing.assert_allclose(together[index], alone[0], rtol=1e-5, atol=1e-6)


def test_what_a_dry_run_counts_of_data_holds_the_pairs(data_dir):
    plan = dry_run.plan(config(data_dir))
    dataset = assemble.assemble(config(data_dir)).dataset
    splits = (dataset.train, dataset.validation, dataset.test)
    pixels = sum(split.images.nbytes for split in splits) + dataset.verification.images.nbytes
    labels = sum(4 * len(split) for split in splits)
    assert plan.memory[dry_run.DATA] == pixels + labels


def test_an_ensemble_has_no_embeddings(data_dir):
    run = assemble.assemble(config(data_dir))
    ensemble = roles.Ensemble((models.build("mlp", 3), models.build("mlp", 3)))
    assert verifier.of(run, ensemble, seeds=False) is None
