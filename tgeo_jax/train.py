"""The loop: the only place where steps, time and files meet."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tgeo_jax import (
    checkpoint,
    dispatch,
    evaluate,
    memory,
    outcome,
    parallel,
    partial,
    placement,
    profiling,
    samples,
    selection,
    storage,
    teachers,
    verifier,
)
from tgeo_jax import config as configs
from tgeo_jax import workdir as workdirs
from tgeo_jax.assemble import Run, assemble
from tgeo_jax.dispatch import Dispatcher, Outcome
from tgeo_jax.errors import CheckpointError, Interrupted, TrainingError
from tgeo_jax.interruption import Interruption
from tgeo_jax.metrics import MOST_CONFUSED, Mean, summarise
from tgeo_jax.state import Best, Teacher, TrainState
from tgeo_jax.workdir import Workdir
from tgeo_jax.writers import Writers, read_records

PyTree = Any


def run(
    config: ConfigDict,
    workdir: str | storage.Path,
    *,
    progress: bool = True,
    interruption: Interruption | None = None,
) -> dict:
    """Trains what a configuration says, or goes on where an interrupted run stopped.

    Args:
        config: from `config.default()` or a file in configs/.
        workdir: the run's folder; created, resumed, or found finished.
        progress: whether to show a progress bar.
        interruption: who is told to stop; by default this run alone catches signals.

    Returns:
        The result, as in result.json.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is compiled.
        TrainingError: a loss or an update that is not finite; the state before it is saved.
        Interrupted: SIGTERM or Ctrl-C; what was trained is saved.
    """
    folder = Workdir(storage.path(workdir))
    configs.check(config)
    folder.check_same(config)
    finished = folder.result()
    if finished is not None:
        return finished
    assembled = assemble(config)
    folder.claim(config)
    folder.note_commit(outcome.commit())
    with workdirs.only_one(folder):
        own = Interruption() if interruption is None else interruption
        try:
            trainer = _Trainer(assembled, folder, progress, own)
            try:
                return trainer.train()
            finally:
                trainer.close()
        finally:
            if interruption is None:
                own.close()


class _Trainer:
    """One run in one process: state, its programs, its files."""

    def __init__(self, run: Run, folder: Workdir, progress: bool, interruption: Interruption):
        self.run, self.folder = run, folder
        config, mesh, dataset = run.config, run.mesh, run.dataset
        self.seeds = tuple(range(config.seed, config.seed + config.seeds))
        self.total_steps = run.method.total_steps
        self._interval = config.train.eval_every * run.steps_per_epoch
        placed = placement.data(run, self.seeds[0])
        self.train_split, self.validation = placed.train, placed.validation
        self.tests, self.feed = {"test": placed.test, **placed.extra}, placed.feed
        clean_view, size = run.method.clean_view, config.data.eval_batch_size
        self.student = evaluate.Evaluator(
            evaluate.predictor(run.method.student, clean_view),
            size,
            seeds=True,
            one_by_one=run.loop_free,
            mesh=mesh,
        )
        self.verifier = verifier.of(run, run.method.student, seeds=True)
        self.trained_teacher = placement.teacher(run)
        self.teacher_evaluator: evaluate.Evaluator | None = None
        self.said_of_tests: dict[str, np.ndarray] = {}
        if self.trained_teacher is not None:
            trains_along = run.method.role.peer is not None
            self.teacher_evaluator = evaluate.Evaluator(
                self.trained_teacher.predict(clean_view),
                size,
                seeds=trains_along,
                one_by_one=run.loop_free,
                mesh=mesh,
            )
            if not trains_along:
                ask, variables = self.teacher_evaluator.logits, self.trained_teacher.variables
                self.said_of_tests = {name: ask(variables, it) for name, it in self.tests.items()}
        context = teachers.context(
            run.method, self.trained_teacher, self.train_split, dataset.num_classes, size, mesh
        )
        means = parallel.put(context.class_means_KxK, parallel.replicated(mesh))
        self.teacher = context._replace(class_means_KxK=means)
        self.dispatcher = Dispatcher(
            run.method,
            mesh,
            config.data.batch_size,
            config.meta.batch_size,
            streamed=self.feed.streamed,
            loop_free=run.loop_free,
        )
        self.trace = profiling.Trace(config.profile)
        self.interruption = interruption
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
        self.partial = partial.read(folder.partial, int(self.state.step))
        logged = [record["time/seconds"] for record in read_records(folder.metrics)]
        self.seconds_before = max([*logged, self.partial.seconds])
        self.started = time.perf_counter()

    def train(self) -> dict:
        """Trains to the end, or until patience has run out, and writes the result."""
        train = self.run.config.train
        while (step := int(self.state.step)) < self.total_steps and not self._has_run_out(step):
            boundary = min((step // self._interval + 1) * self._interval, self.total_steps)
            sums, seconds = self._advance(step, boundary)
            self.writers.write(self._evaluate(step, boundary, sums, seconds))
            evaluations = boundary // self._interval
            is_last = boundary == self.total_steps or self._has_run_out(boundary)
            if is_last or evaluations % train.checkpoint_every == 0:
                self.checkpoints.save(boundary, self.state, self.best)
        # Weights that live for one batch say nothing of a sample outside of it.
        per_batch = self.run.method.ratio.per_batch is not None
        if self.teacher_evaluator is not None and not per_batch and not self.feed.streamed:
            self._save_samples(self.teacher_evaluator)
        self.checkpoints.close()  # the result must not say more than the disk holds
        taught = self._about_teacher()
        last_and_best = (self.state.student.variables, self.best.variables)
        confusion = {
            which: self.student.confusion(variables, self.tests)
            for which, variables in zip(outcome.WHICH, last_and_best, strict=True)
            if self.run.dataset.num_classes <= MOST_CONFUSED
        }
        if self.verifier is not None:
            known = self.verifier.finish(
                self.run,
                self.folder.verification,
                self.state.student.variables,
                self._teacher_variables,
            )
            taught = {**taught, "verification": known} if taught and known else taught
        result = self._result(taught, confusion) if jax.process_index() == 0 else None
        if result is not None:
            self.folder.write_result(result)
        # Not from the file: another host's view of a shared folder may be old.
        return json.loads(parallel.from_first(json.dumps(result)))

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
        state, best = placement.first_state(self.run, self.seeds)
        if self.checkpoints.latest_step() is None:
            return state, best
        return self.checkpoints.restore(state, best)

    def _has_run_out(self, step: int) -> bool:
        """Whether to stop early: by what a checkpoint holds, so a resumed run does the same."""
        patience = self.run.config.train.patience
        best_step_S = parallel.fetch(self.best.step) if patience else ()
        return selection.has_run_out(patience, best_step_S, step, self._interval)

    def _advance(self, step: int, boundary: int) -> tuple[dict[str, Mean], float]:
        """Trains up to a step; returns sums per seed in float64, and the seconds it took.

        The sums are of all steps since the last evaluation, those before an interruption too.
        """
        started = time.perf_counter()
        total, pending = self.partial.sums, list[Outcome]()
        self.partial = partial.NOTHING
        in_flight = dispatch.most_in_flight(self.run.mesh)
        largest = 1 if self.run.loop_free else self.run.config.train.steps_per_dispatch
        first = boundary - ((boundary - 1) % self._interval + 1)
        chunks = dispatch.chunks_left(first, step, boundary, largest)
        for index, num_steps in enumerate(chunks):
            if self.interruption.reached():
                self._keep(total, pending)
                raise Interrupted(
                    f"{self.folder.path}: stopped after step {step} of {self.total_steps}, which "
                    "is saved; the same command goes on from there",
                    self.interruption.signal,
                )
            try:
                data = self.feed.chunk(step, num_steps)
            except Exception:  # no next batch, but everything up to it is trained
                if jax.process_count() == 1:  # others may be in another step; they cannot save
                    self._keep(total, pending)
                raise
            arguments = (self.state, self.teacher, data, num_steps, step)
            self._check_memory(*self.dispatcher.program(*arguments))
            with self.trace.dispatch(step, len(chunks) - index):
                self.state, found = self.dispatcher.run(*arguments)
            pending.append(found)
            step += num_steps
            while len(pending) > (in_flight if step < boundary else 0):
                total = partial.add(total, self._collect(pending.pop(0)))
            self.writers.progress(step)
        assert total is not None
        traced = self.trace.stop()
        if traced is not None:
            self.writers.say(f"profile: {traced}; open it by: xprof --logdir={traced}")
        return total, time.perf_counter() - started

    def _keep(self, total: dict[str, Mean] | None, pending: list[Outcome]) -> None:
        """Saves between two evaluations, as the last act of a run that stops there."""
        for found in pending:
            total = partial.add(total, self._collect(found))
        step = int(self.state.step)
        # Before the checkpoint: killed between the two, none is there without its sums.
        partial.write(self.folder.partial, partial.Partial(step, self._seconds(), total))
        self.checkpoints.save(step, self.state, self.best)
        self.checkpoints.close()

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

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
        variables = self.state.student.variables
        validation = self.student.metrics(variables, self.validation)
        splits = {"train": sums, "validation": validation}
        for name, split in self.tests.items():
            splits[name] = self.student.metrics(variables, split, self.said_of_tests.get(name))
            if self.teacher_evaluator is not None and self.state.teacher is not None:
                taught = self.teacher_evaluator.metrics(self._teacher_variables(), split)
                splits[f"{name}_teacher"] = taught
        found = parallel.fetch(splits)
        verified = list[dict[str, float]]()
        if self.verifier is not None:
            verified = self.verifier.scores(self.verifier.similarity(variables))
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
            "time/seconds": self._seconds(),
        }
        records = []
        for index, seed in enumerate(self.seeds):
            record: dict[str, Any] = {"step": step, "epoch": step / self.run.steps_per_epoch}
            record["seed"] = seed
            for split, means in found.items():
                of_seed = jax.tree.map(lambda leaf, i=index: leaf[i], means)
                record |= {f"{split}/{name}": v for name, v in summarise(of_seed).items()}
            if verified:
                record |= {f"verification/{name}": v for name, v in verified[index].items()}
            records.append(record | shared)
        select_by = self.run.config.train.select_by
        scores = np.array([selection.score(r, select_by, "validation/") for r in records])
        scores_S = parallel.put(scores, parallel.by_seed(self.run.mesh))
        self.best = selection.update(self.best, self.state, scores_S)
        return records

    def _save_samples(self, asked_teacher: evaluate.Evaluator) -> None:
        train = self.train_split
        student_logits = self.student.logits(self.state.student.variables, train)
        method, run = self.run.method, self.run
        variables = self._teacher_variables()
        said = compared = asked_teacher.logits(variables, train)
        if method.role.num_teachers:  # the ratios look at each of them, the report at their mean
            assert run.teacher is not None
            each = evaluate.predictor(run.teacher.module, method.clean_view)
            size = run.config.data.eval_batch_size
            asked = evaluate.Evaluator(each, size, seeds=False, mesh=run.mesh)
            compared = asked.logits(variables, train)
        train, teacher_means, state = parallel.fetch(
            (train, self.teacher.class_means_KxK, self.state.replace(student=None, anchor=None))
        )
        if jax.process_index() > 0:
            return
        means = Teacher(None, teacher_means)
        ratio = samples.ratios_of_samples(
            method, means, state, student_logits, compared, train.labels_B
        )
        first = teacher_means if state.teacher is None else state.teacher.class_means_KxK[0]
        samples.save(
            self.folder.samples, ratio, said, train, run.dataset.class_names,
            student_logits_SxNxK=student_logits,
            class_means=None if np.ndim(first) == 3 else first,  # of several, each its own
        )  # fmt: skip

    def _result(self, taught: dict[str, Any] | None, confusion: Any) -> dict[str, Any]:
        records = read_records(self.folder.metrics)
        step = int(self.state.step)
        if not records or records[-1]["step"] != step:
            raise CheckpointError(
                f"{self.folder.metrics}: lacks the records of the last step, {step}, "
                f"which {self.folder.checkpoints} has; restore the file, or remove the newest "
                "checkpoint and run the command again"
            )
        commits = self.folder.commits()
        return outcome.result(self.run, records, self.seeds, taught, commits, confusion)

    def _about_teacher(self) -> dict[str, Any] | None:
        if self.teacher_evaluator is None:
            return None
        splits = {"train": self.train_split, "test": self.tests["test"]}
        if self.feed.streamed:  # a pass over it may take hours
            del splits["train"]
        return outcome.of_teacher(
            self.run, self.teacher_evaluator, self._teacher_variables(), splits
        )

    def _teacher_variables(self) -> PyTree:
        """Of the teacher that trains along, with a leading seed axis, or of the frozen one."""
        if self.state.teacher is not None:
            return self.state.teacher.learner.variables
        assert self.trained_teacher is not None
        return self.trained_teacher.variables
