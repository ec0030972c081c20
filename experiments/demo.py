"""The main job on real data: a student that learns on which samples to trust its teacher.

Trains a teacher on digits whose labels are 40 % wrong, then three students over three seeds each:
without the teacher, with one constant ratio, and with TGeo-KD's learned one. Prints a table and
writes a report. Run again, it resumes, or says that it is done.

    python -m experiments.demo --workdir=runs/demo
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow_datasets as tfds
from absl import flags

from configs.digits import kd, plain, teacher, tgeo
from experiments import commandline
from tgeo_jax import report, storage, train
from tgeo_jax.data import sources
from tgeo_jax.workdir import Workdir

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the demo's runs and report.")
_EPOCHS = flags.DEFINE_integer("epochs", 0, "Shortens every run to this many epochs; 0: as is.")
_STUDENTS = {"plain student": plain, "constant ratio": kd, "TGeo-KD": tgeo}


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = storage.path(_WORKDIR.value)
    tfds.disable_progress_bar()  # the digits are prepared in a moment
    sources.prepare("digits")
    teacher_folder = Workdir(workdir / "teacher")
    students = {name: Workdir(workdir / name.replace(" ", "_")) for name in _STUDENTS}
    folders = [teacher_folder, *students.values()]
    done = all(folder.result() is not None for folder in folders)

    train.run(_shortened(teacher.get_config()), teacher_folder.path)
    results = {}
    for name, folder in students.items():
        config = _shortened(_STUDENTS[name].get_config())
        if config.role.name != "alone":
            config.teacher.workdir = str(teacher_folder.path)
        results[name] = train.run(config, folder.path)

    if done:
        print(f"{workdir} is finished; nothing to train.")
    taught = results["TGeo-KD"]["teacher"]
    print(
        f"\nThe teacher was taught with 40 % wrong labels: it is right on "
        f"{100 * taught['train_accuracy']:.1f} % of the training samples and "
        f"{100 * taught['test_accuracy']:.1f} % of the test samples.\n"
    )
    print(report.text_table(results))
    index = report.write(students, workdir / "report", title="Whom to trust: TGeo-KD on digits")
    print(f"\nReport: {index}")


def _shortened(config):
    if _EPOCHS.value:
        config.train.epochs = _EPOCHS.value
    return config


if __name__ == "__main__":
    commandline.run(main)
