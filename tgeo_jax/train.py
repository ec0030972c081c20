"""The loop: the only place where steps, time and files meet."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tgeo_jax import (
    checkpoint,
    dispatch,
    distill,
    evaluate,
    feeds,
    memory,
    origins,
    outcome,
    parallel,
    profiling,
    samples,
    teachers,
)
from tgeo_jax import config as configs
from tgeo_jax import workdir as workdirs
from tgeo_jax.assemble import Run, assemble
from tgeo_jax.data import fingerprints, streaming
from tgeo_jax.dispatch import Dispatcher, Outcome, Resident
from tgeo_jax.errors import CheckpointError, TrainingError
from tgeo_jax.metrics import Mean, summarise
from tgeo_jax.randomness import of_generation
from tgeo_jax.state import Best, TrainState
from tgeo_jax.workdir import Workdir
from tgeo_jax.writers import Writers, read_records

PyTree = Any


def run(config: ConfigDict, workdir: str | pathlib.Path, *, progress: bool = True) -> dict:
    """Trains what a configuration says, or goes on where an interrupted run stopped.

    Args:
        config: from `config.default()` or a file in configs/.
        workdir: the run's folder; created, resumed, or found finished.
        progress: whether to show a progress bar.

    Returns:
        The result, as in result.json.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is compiled.
        TrainingError: a loss or an update that is not finite; the state before it is saved.
    """
    folder = Workdir(pathlib.Path(workdir))
    configs.check(config)
    folder.check_same(config)
    finished = folder.result()
    if finished is not None:
        return finished
    assembled = assemble(config)
    folder.claim(config)
    folder.note_commit(outcome.commit())
    with workdirs.only_one(folder):
        trainer = _Trainer(assembled, folder, progress)
        try:
            return trainer.train()
        finally:
            trainer.close()


class _Trainer:
    """One run in one process: state, its programs, its files."""

    def __init__(self, run: Run, folder: Workdir, progress: bool):
        self.run, self.folder = run, folder
        config, mesh, dataset = run.config, run.mesh, run.dataset
        self.seeds = tuple(range(config.seed, config.seed + config.seeds))
        self.total_steps = run.method.total_steps
        replicated = parallel.replicated(mesh)
        self.test = feeds.placed(dataset.test, replicated)
        self.train_split, self.validation, self.feed = self._place(dataset)
        clean_view, size = run.method.clean_view, config.data.eval_batch_size
        one_by_one = run.loop_free and mesh.shape["seed"] == 1
        self.student = evaluate.Evaluator(
            evaluate.predictor(run.method.student, clean_view),
            size,
            seeds=True,
            one_by_one=one_by_one,
        )
        self.teacher_evaluator, self.said_of_test = None, None
        if run.teacher is not None:
            trains_along = run.method.role.peer is not None
            self.teacher_evaluator = evaluate.Evaluator(
                run.teacher.predict(clean_view),
                size,
                seeds=trains_along,
                one_by_one=one_by_one,
            )
            if not trains_along:
                self.said_of_test = self.teacher_evaluator.logits(run.teacher.variables, self.test)
        context = teachers.context(
            run.method, run.teacher, self.train_split, dataset.num_classes, size
        )
        self.teacher = jax.device_put(context, replicated)
        self.dispatcher = Dispatcher(
            run.method,
            mesh,
            config.data.batch_size,
            config.meta.batch_size,
            streamed=self.feed.streamed,
            loop_free=run.loop_free,
        )
        self.trace = profiling.Trace(config.profile)
        self.told_of: memory.Needed | None = None
        self.checkpoints = checkpoint.Checkpoints(folder.checkpoints)
        self.state, self.best = self._start()
        self.writers = Writers(
            folder.path,
            step=int(self.state.step),
            total_steps=self.total_steps,
            title=folder.path.name,
            progress=progress,
        )
        self.seconds_before = max(
            (record["time/seconds"] for record in read_records(folder.metrics)), default=0.0
        )
        self.started = time.perf_counter()

    def _place(self, dataset: Any) -> tuple[Any, Any, feeds.InMemory | feeds.Streamed]:
        """Training and validation split, on the devices unless streamed, and what feeds the steps.

        Where the role is `cached`, stored teacher logits lie beside the images.
        """
        run, sharding = self.run, parallel.replicated(self.run.mesh)
        splits = (dataset.train, dataset.validation)
        if isinstance(dataset, streaming.StreamedDataset):
            seed = of_generation(self.seeds[0], run.config.generation)
            feed = feeds.Streamed(run.config, run.method, dataset, run.mesh, seed)
            return *splits, feed
        parts = [feeds.placed(split, sharding) for split in splits]
        if run.method.role.cached is not None:
            assert run.teacher is not None
            found = teachers.with_logits(run.config, run.method, run.teacher, dataset)
            parts = [
                part._replace(
                    ids_B=jax.device_put(split.ids, sharding),
                    teacher_logits_BxVxK=jax.device_put(logits, sharding),
                )
                for part, split, logits in zip(parts, splits, found, strict=True)
            ]
        return *parts, feeds.InMemory(Resident(*parts))

    def train(self) -> dict:
        """Trains to the end and writes the result."""
        train = self.run.config.train
        interval = train.eval_every * self.run.steps_per_epoch
        while (step := int(self.state.step)) < self.total_steps:
            boundary = min((step // interval + 1) * interval, self.total_steps)
            sums, seconds = self._advance(step, boundary)
            self.writers.write(self._evaluate(step, boundary, sums, seconds))
            if boundary == self.total_steps or boundary // interval % train.checkpoint_every == 0:
                self.checkpoints.save(boundary, self.state, self.best)
        # Weights that live for one batch say nothing of a sample outside of it.
        per_batch = self.run.method.ratio.per_batch is not None
        if self.teacher_evaluator is not None and not per_batch and not self.feed.streamed:
            self._save_samples(self.teacher_evaluator)
        self.checkpoints.close()  # the result must not say more than the disk holds
        result = self._result()
        self.folder.write_result(result)
        return result

    def close(self) -> None:
        """Waits for writes under way and closes files."""
        try:
            self.trace.stop()
        finally:
            self.feed.close()
            self.checkpoints.close()
            self.writers.close()

    def _start(self) -> tuple[TrainState, Best]:
        """The state to go on from: the newest checkpoint, or the beginning."""
        method, images = self.run.method, jnp.asarray(self.run.dataset.example)
        trained = None if self.run.teacher is None else self.run.teacher.variables
        init = jax.vmap(
            lambda seed, trained, anchor: distill.init_state(
                method, seed, images, trained_teacher=trained, anchor=anchor
            ),
            in_axes=(0, None, 0),
            out_axes=parallel.SEED_AXES,
        )
        shardings = parallel.state_shardings(self.run.mesh)
        own = [of_generation(seed, self.run.config.generation) for seed in self.seeds]
        state = jax.jit(init, out_shardings=shardings)(
            np.asarray(own, np.uint32), trained, self.run.anchor
        )
        best = jax.device_put(
            Best(
                params=state.student.params,
                batch_stats=state.student.batch_stats,
                fusion=state.fusion.params,
                validation_accuracy=jnp.full(len(self.seeds), -1.0),
                step=jnp.zeros(len(self.seeds), jnp.int32),
            ),
            parallel.by_seed(self.run.mesh),
        )
        # The state's buffers are donated to the first dispatch; best must not share them.
        best = jax.tree.map(jnp.copy, best)
        if self.checkpoints.latest_step() is None:
            return state, best
        return self.checkpoints.restore(state, best)

    def _advance(self, step: int, boundary: int) -> tuple[dict[str, Mean], float]:
        """Trains up to a step; returns sums per seed in float64, and the seconds it took."""
        started = time.perf_counter()
        total: dict[str, Mean] | None = None
        pending: list[Outcome] = []
        in_flight = dispatch.most_in_flight(self.run.mesh)
        largest = 1 if self.run.loop_free else self.run.config.train.steps_per_dispatch
        chunks = dispatch.chunks(boundary - step, largest)
        for index, num_steps in enumerate(chunks):
            try:
                data = self.feed.chunk(step, num_steps)
            except Exception:  # no next batch, but everything up to it is trained
                self.checkpoints.save(int(self.state.step), self.state, self.best)
                raise
            arguments = (self.state, self.teacher, data, num_steps, step)
            self._check_memory(*self.dispatcher.program(*arguments))
            with self.trace.dispatch(step, len(chunks) - index):
                self.state, found = self.dispatcher.run(*arguments)
            pending.append(found)
            step += num_steps
            while len(pending) > (in_flight if step < boundary else 0):
                sums = self._collect(pending.pop(0))
                total = sums if total is None else jax.tree.map(np.add, total, sums)
            self.writers.progress(step)
        assert total is not None
        traced = self.trace.stop()
        if traced is not None:
            self.writers.say(f"profile: {traced}; open it by: xprof --logdir={traced}")
        return total, time.perf_counter() - started

    def _check_memory(self, program: jax.stages.Compiled, is_new: bool) -> None:
        if not is_new:
            return
        jax.block_until_ready(self.state)  # what the dispatch before used is free again
        wanted, device = memory.needed(program), self.run.mesh.local_devices[0]
        available = memory.free(device)
        if self.told_of is None:  # later ones differ little, and steps were trained
            memory.check(wanted, available)
        if wanted != self.told_of:  # two programs of an epoch often need the same
            self.writers.say(memory.told(wanted, available))
            self.told_of = wanted

    def _collect(self, found: Outcome) -> dict[str, Mean]:
        """Waits for a dispatch; stops the run, after saving, if something was not finite."""
        found = jax.device_get(found)
        bad = [
            f"{term} (seed {self.seeds[index]})"
            for term, flags in found.failed.items()
            for index in np.flatnonzero(flags)
        ]
        if bad:
            step = int(self.state.step)
            self.checkpoints.save(step, self.state, self.best)
            self.checkpoints.close()
            raise TrainingError(
                f"step {step} (epoch {step // self.run.steps_per_epoch + 1}): not finite: "
                f"{', '.join(bad)}. The state before that step is saved in "
                f"{self.folder.checkpoints}. Usual cures: a lower optimizer.learning_rate, "
                "optimizer.clip_norm=1, warm-up by optimizer.warmup_epochs"
            )
        return jax.tree.map(lambda values: np.asarray(values, np.float64), found.sums)

    def _evaluate(
        self, first_step: int, step: int, sums: dict[str, Mean], seconds: float
    ) -> list[dict[str, Any]]:
        """Evaluates all seeds, updates the best ones, and returns the records to log."""
        variables = _variables(self.state)
        validation = self.student.metrics(variables, self.validation)
        test = self.student.metrics(variables, self.test, self.said_of_test)
        accuracy = validation["accuracy"].total / validation["accuracy"].count
        self.best = _update_best(self.best, self.state, accuracy)
        splits = {"train": sums, "validation": validation, "test": test}
        if self.teacher_evaluator is not None and self.state.teacher is not None:
            taught = self.teacher_evaluator.metrics(_teacher_variables(self.state), self.test)
            splits["test_teacher"] = taught
        found = jax.device_get(splits)
        self.writers.progress(
            step, validation=f"{float(np.mean(found['validation']['accuracy'].total)):.0f}"
            f"/{found['validation']['accuracy'].count[0]:.0f}"
        )  # fmt: skip
        shared = {
            "time/train_seconds": seconds,
            "time/samples_per_second": (step - first_step)
            / seconds
            * self.run.config.data.batch_size
            * len(self.seeds),
            "time/seconds": self.seconds_before + time.perf_counter() - self.started,
        }
        records = []
        for index, seed in enumerate(self.seeds):
            record: dict[str, Any] = {"step": step, "epoch": step / self.run.steps_per_epoch}
            record["seed"] = seed
            for split, means in found.items():
                of_seed = jax.tree.map(lambda leaf, i=index: leaf[i], means)
                record |= {f"{split}/{name}": v for name, v in summarise(of_seed).items()}
            records.append(record | shared)
        return records

    def _save_samples(self, teacher: evaluate.Evaluator) -> None:
        train = self.train_split
        student_logits = self.student.logits(_variables(self.state), train)
        method, run = self.run.method, self.run
        variables = _teacher_variables(self.state, run.teacher)
        said = compared = teacher.logits(variables, train)
        if method.role.num_teachers:  # the ratios look at each of them, the report at their mean
            assert run.teacher is not None
            each = evaluate.predictor(run.teacher.module, method.clean_view)
            size = run.config.data.eval_batch_size
            compared = evaluate.Evaluator(each, size, seeds=False).logits(variables, train)
        ratio = samples.ratios_of_samples(
            method, self.teacher, self.state, student_logits, compared, np.asarray(train.labels_B)
        )
        samples.save(self.folder.samples, ratio, said, train, self.run.dataset.class_names)

    def _result(self) -> dict[str, Any]:
        records = read_records(self.folder.metrics)
        if not records or records[-1]["step"] != self.total_steps:
            raise CheckpointError(
                f"{self.folder.metrics}: lacks the records of the last step, {self.total_steps}, "
                f"which {self.folder.checkpoints} has; restore the file, or remove the newest "
                "checkpoint and run the command again"
            )
        taught, commits = self._about_teacher(), self.folder.commits()
        return outcome.result(self.run, records, self.seeds, taught, commits)

    def _about_teacher(self) -> dict[str, Any] | None:
        """Accuracies and, of a frozen one, a fingerprint."""
        if self.teacher_evaluator is None:
            return None
        splits = {"train": self.train_split, "test": self.test}
        if isinstance(self.train_split, streaming.Stream):  # a pass over it may take hours
            del splits["train"]
        variables = _teacher_variables(self.state, self.run.teacher)
        found = {
            name: self.teacher_evaluator.metrics(variables, split)["accuracy"]
            for name, split in splits.items()
        }
        # Of one that trained along, the mean over the seeds.
        about: dict[str, Any] = {
            f"{k}_accuracy": float(np.mean(v.total / v.count)) for k, v in found.items()
        }
        if self.state.teacher is None:
            about["fingerprint"] = fingerprints.of(jax.device_get(variables))
            about["converted"] = origins.converted(self.run.config)
        return about


@jax.jit
def _update_best(best: Best, state: TrainState, accuracy_S: jax.Array) -> Best:
    better = accuracy_S > best.validation_accuracy

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

    candidate = Best(
        params=state.student.params,
        batch_stats=state.student.batch_stats,
        fusion=state.fusion.params,
        validation_accuracy=accuracy_S,
        step=jnp.full_like(best.step, state.step),
    )
    return jax.tree.map(choose, candidate, best)


def _variables(state: TrainState) -> PyTree:
    return {"params": state.student.params, "batch_stats": state.student.batch_stats}


def _teacher_variables(state: TrainState, trained: teachers.Trained | None = None) -> PyTree:
    """Of the teacher that trains along, with a leading seed axis, or of the frozen one."""
    if state.teacher is None:
        assert trained is not None
        return trained.variables
    learner = state.teacher.learner
    return {"params": learner.params, "batch_stats": learner.batch_stats}
