"""What a dry run says agrees with hand arithmetic and with what a real run places."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax import stages

from configs.digits import trikd
from tests import pictures
from tgeo_jax import config as configs
from tgeo_jax import device_kinds, dry_run, memory, models, placement, simulated
from tgeo_jax.assemble import assemble
from tgeo_jax.collectives import Collective
from tgeo_jax.dispatch import Dispatcher
from tgeo_jax.dry_run import BEST, DATA, STATE, TEACHER, WORKING
from tgeo_jax.errors import ConfigError
from tgeo_jax.models import convolution
from tgeo_jax.state import Teacher

KINDS = device_kinds.KINDS
HIDDEN = (256, 256)
WEIGHTS = (64 * 256, 256 * 256, 256 * 10)
NUM_PARAMS = sum(WEIGHTS) + 256 + 256 + 10
MLP = ("--config.student.name=mlp", "--config.seeds=1")


@pytest.fixture(scope="module")
def dry(command, tmp_path_factory):
    """Runs the command as a user would; nothing may be left behind."""

    def run(config: str, *arguments: str, check: bool = True):
        folder = tmp_path_factory.mktemp("dry") / "run"
        done = command(
            "-m", "experiments.main", f"--config={config}", f"--workdir={folder}", "--dry_run",
            *arguments, check=check, NPROC="32",
        )  # fmt: skip
        assert not folder.exists()
        return done

    return run


def _figures(said: str) -> dict[str, int]:
    rows = re.findall(r"^  (\S.*?)  +([\d,]+)(?:  \(.*)?$", said, re.MULTILINE)
    return {name: int(value.replace(",", "")) for name, value in rows}


def test_eight_devices_by_hand(dry):
    widths = f"--config.student.mlp.hidden={HIDDEN}"
    said = dry(
        "configs/digits/plain.py", *MLP, widths, "--config.data.batch_size=1024", "--devices=8"
    )
    assert "dry run for 8 devices: seed 1 x data 8 x model 1" in said.stdout
    found = _figures(said.stdout)
    # Parameters and momentum, in float32 on every device; a few counters.
    assert found[STATE] == pytest.approx(2 * 4 * NUM_PARAMS, abs=64)
    assert found[BEST] == pytest.approx(4 * NUM_PARAMS, abs=64)
    assert found[DATA] == 1797 * (64 + 4)
    assert found[TEACHER] == 0
    assert found["together"] == sum(found[p] for p in (STATE, BEST, TEACHER, DATA, WORKING))
    # A pass forward and two back, of which the first layer needs one; then the update.
    rows = 1024 // 8
    assert found["FLOPs"] == pytest.approx(
        2 * rows * (3 * sum(WEIGHTS) - WEIGHTS[0]) + 6 * NUM_PARAMS, rel=0.05
    )
    # The gradients once, and some numbers for the metrics.
    assert found["bytes of their results"] == pytest.approx(4 * NUM_PARAMS, rel=0.01)
    assert found["bytes sent for them"] == pytest.approx(2 * 7 / 8 * 4 * NUM_PARAMS, rel=0.01)
    assert "all-reduce" in said.stdout
    assert [line.split()[-1] for line in _rows(said.stdout)] == ["yes"] * 5
    assert said.stdout.splitlines()[-1] == "It fits on v5e, v5p, v6e, H100, H200."


def _rows(said: str) -> list[str]:
    """Of the table, one for each kind of device."""
    return [line for line in said.splitlines() if line.split()[:1] and line.split()[0] in KINDS]


def test_a_network_that_fits_nowhere_is_told_with_status_2(dry):
    huge = "--config.student.mlp.hidden=(400000,20000)"
    done = dry("configs/digits/plain.py", *MLP, huge, "--devices=8", check=False)
    assert done.returncode == 2
    num_params = 64 * 400_000 + 400_000 * 20_000 + 20_000 * 10 + 420_010
    assert _figures(done.stdout)[STATE] == pytest.approx(8 * num_params, abs=64)
    assert [line.split()[-1] for line in _rows(done.stdout)] == ["NO"] * 5
    assert re.search(r"^error: student\.name='mlp': a step needs 1\d\d\.\d GB .* v5e \(16 GB\), .*"
                     r"GB are state: choose a smaller student\.name", done.stderr)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices=0"], "--devices=0: .*positive"),
        (["--devices=3"], "data.batch_size=64: not divisible by the 3 devices.*use 63 or 66"),
        (["--devices=8", "--config.mesh.model=3"], "mesh.model=3: must divide the 8 devices"),
        (["--device_kind=H10"], "--device_kind='H10': unknown device; did you mean 'H100'"),
        (["--nodry_run", "--devices=8"], "--devices, --device_kind: .* with --dry_run"),
    ],
)
def test_devices_that_cannot_be_are_refused(dry, arguments, said):
    done = dry("configs/digits/plain.py", *arguments, check=False)
    assert done.returncode == 2
    assert re.search(f"^error: (flag )?{said}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_teacher_lies_in_parts_along_the_model_axis(dry, command, tmp_path):
    folder = tmp_path / "teacher"
    command(
        "-m", "experiments.main", "--config=configs/digits/teacher.py", f"--workdir={folder}",
        "--config.train.epochs=1",
    )  # fmt: skip
    taught = (f"--config.teacher.workdir={folder}", "--config.seeds=1")
    parts = dry("configs/digits/tgeo.py", *taught, "--devices=8", "--config.mesh.model=4")
    assert "one step with the hypergradient" in parts.stdout
    assert "seed 1 x data 2 x model 4" in parts.stdout
    assert "all-gather" in parts.stdout
    # The last bias is whole on every device: 10 numbers are not 4 equal parts.
    means = 4 * 10 * 10
    assert _figures(parts.stdout)[TEACHER] == 4 * ((NUM_PARAMS - 10) // 4 + 10) + means
    one = dry("configs/digits/tgeo.py", *taught, "--config.meta.every=4", "--device_kind=v5p")
    assert _figures(one.stdout)[TEACHER] == 4 * NUM_PARAMS + means
    assert _figures(one.stdout)["collectives"] == 0
    assert len(_rows(one.stdout)) == 1
    # The batch is cut over the devices, the update of the parameters is not.
    assert 5 < _figures(one.stdout)["FLOPs"] / _figures(parts.stdout)["FLOPs"] < 8.1


def _alone(digits_dir, name="mlp", **changes):
    config = configs.default()
    config.data.update(dir=digits_dir, batch_size=64)
    config.student.name = name
    config.role.name = "alone"
    config.train.epochs = 2
    config.update(changes)
    return config


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_shapes_are_those_of_what_a_run_places(digits_dir, name):
    config = _alone(digits_dir, name, seeds=2)
    run = assemble(config)
    state, best = placement.first_state(run, (0, 1))
    placed = placement.data(run, 0)
    found = dry_run.plan(config)
    splits = (placed.train, placed.validation, placed.test)
    for part, tree in {STATE: state, BEST: best, DATA: splits}.items():
        assert found.memory[part] == sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), part
    dispatcher = Dispatcher(run.method, run.mesh, 64, 64)
    program, _ = dispatcher.program(state, Teacher(None, None), placed.feed.chunk(0, 1), 1, 0)
    used = (state, placed.train)  # nothing is learned from the validation split
    assert memory.needed(program).arguments == pytest.approx(
        sum(leaf.nbytes for leaf in jax.tree.leaves(used)), abs=64
    )


def test_convolutions_are_an_accelerators_and_seeds_lie_side_by_side(digits_dir, monkeypatch):
    programs, compiled = [], stages.Lowered.compile

    def keep(lowered, *arguments, **options):
        programs.append(lowered.as_text())
        return compiled(lowered, *arguments, **options)

    monkeypatch.setattr(stages.Lowered, "compile", keep)
    flops, convolutions = {}, {}
    for seeds in (1, 2):
        config = _alone(digits_dir, "cnn", seeds=seeds)
        config.student.cnn.widths = (32, 64)
        flops[seeds] = dry_run.plan(config).flops
        convolutions[seeds] = programs[-1].count("stablehlo.convolution")
    assert convolutions == {1: 5, 2: 5}  # the images need no gradient
    assert flops[2] == pytest.approx(2 * flops[1], rel=0.02)
    # Windows of 3x3 on 8x8 images, less what hangs over their edges; the second halves them.
    first, second = (8 * 3 - 2) ** 2 * 32, (4 * 3 - 1) ** 2 * 32 * 64
    assert flops[1] == pytest.approx(64 * 2 * (2 * first + 3 * second), rel=0.1)
    # A run after it gets what is fast on a CPU again.
    images = np.zeros((1, 8, 8, 1), np.float32)
    module = models.build("cnn", 10)
    assert not convolution.has_convolutions(module.init, jax.random.key(0), images)
    with simulated.accelerators():
        module = models.build("cnn", 10)
        assert convolution.has_convolutions(module.init, jax.random.key(0), images)


def test_a_step_reads_its_batch_and_not_all_examples(digits_dir):
    config = _alone(digits_dir)
    whole = dry_run.plan(config)
    config.data.fraction = 0.6
    part = dry_run.plan(config)
    assert part.memory[DATA] < whole.memory[DATA]
    assert part.traffic == pytest.approx(whole.traffic, rel=1e-3)


def test_a_chain_is_planned_with_an_anchor_that_is_not_there_yet(digits_dir):
    config = trikd.get_config()
    config.data.dir = digits_dir
    config.seeds = 2
    found = dry_run.plan(config)
    params = found.memory[BEST]
    # Parameters and momentum of student and teacher, and the anchor.
    assert found.memory[STATE] > 3 * params


def test_a_stream_holds_the_batches_of_two_dispatches(tmp_path):
    pictures.prepare_imagenet(str(tmp_path), 40, 8)
    config = _alone(str(tmp_path), "resnet8")
    config.data.update(
        name="imagenet2012", pipeline="stream", image_size=32, batch_size=8, validation_fraction=0.2
    )
    config.train.steps_per_dispatch = 3
    found = dry_run.plan(config)
    # 32 examples are 4 steps an epoch: two dispatches of two.
    assert found.memory[DATA] == 2 * 2 * 8 * (32 * 32 * 3 + 4)
    assert "batches of two dispatches" in dry_run.told(found, list(KINDS.values()))


def _plan(**changes) -> dry_run.Plan:
    plan = dry_run.Plan(
        config=configs.default(),
        mesh={"seed": 1, "data": 16, "model": 1},
        memory={STATE: 10**9, BEST: 10**9, TEACHER: 0, DATA: 0, WORKING: 18 * 10**9},
        flops=197e9,
        traffic=819e6,
        collectives=[Collective("all-reduce", 10**8, 16)],
        learns=False,
    )
    return dataclasses.replace(plan, **changes)


def test_time_is_the_slower_of_compute_and_memory_and_then_the_links():
    plan, v5e, h100 = _plan(), KINDS["v5e"], KINDS["H100"]
    found = plan.bounds(v5e)
    links = 2 * 15 / 16 * 1e8 / 200e9
    np.testing.assert_allclose(found, (1e-3, 1e-3, links))
    assert found.step == pytest.approx(1e-3 + links)
    assert _plan(traffic=2 * 819e6).bounds(v5e).step == pytest.approx(2e-3 + links)
    # In float32 a GPU multiplies at half its rate for bfloat16, a TPU at the same.
    half = configs.default()
    half.precision = "bfloat16"
    for kind, ratio in ((v5e, 1), (h100, 2)):
        assert plan.bounds(kind).compute / _plan(config=half).bounds(kind).compute == ratio


def test_what_does_not_fit_is_named_with_what_to_change():
    said = dry_run.verdict(_plan(), list(KINDS.values()))
    assert said.startswith("It needs 20.0 GB on each device and does not fit on v5e (16 GB); ")
    assert "18.0 GB are working space: lower data.batch_size=64 or use more devices" in said
    assert "set precision='bfloat16'" in said
    assert "remat" not in said  # the network has no blocks
    config = configs.default()
    config.student.name = "resnet50"
    assert "set remat=True" in dry_run.verdict(_plan(config=config), list(KINDS.values()))
    with pytest.raises(ConfigError, match=r"^data\.batch_size=64: a step needs 20\.0 GB .*v5e"):
        dry_run.verdict(_plan(), [KINDS["v5e"]])


@pytest.mark.parametrize(
    ("part", "field"),
    [(TEACHER, "mesh.model=1"), (DATA, "data.pipeline='resident'"), (STATE, "student.name='cnn'")],
)
def test_the_largest_part_says_which_field(part, field):
    sizes = {**dict.fromkeys((STATE, BEST, TEACHER, DATA, WORKING), 10**9), part: 10**12}
    with pytest.raises(ConfigError, match=f"^{re.escape(field)}: a step needs 1004.0 GB"):
        dry_run.verdict(_plan(memory=sizes), list(KINDS.values()))


def test_a_step_with_a_gpus_memory_says_how_much_of_it_is_taken():
    said = dry_run.told(_plan(), list(KINDS.values()))
    assert "75 %" in said
    assert "more than 8 shared it" in said
    assert "75 %" not in dry_run.told(_plan(), [KINDS["v5e"]])


def test_estimates_in_bfloat16_are_said_to_be_too_high():
    config = configs.default()
    assert "twice too high" not in dry_run.told(_plan(), [KINDS["v5e"]])
    config.precision = "bfloat16"
    assert "twice too high" in dry_run.told(_plan(config=config), [KINDS["v5e"]])
