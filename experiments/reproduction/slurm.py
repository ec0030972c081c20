"""The runs of a table as job arrays of Slurm: scripts that are written, and submitted by sbatch."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Sequence

from experiments.reproduction.runs import Run, stages
from tgeo_jax.errors import ConfigError

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{at_a_time}
#SBATCH --requeue --open-mode=append --output={folder}/{stage}-%a.log
#SBATCH --signal=TERM@300
{options}
# Line by line the runs of this stage; a task trains the one of its number.
mapfile -t commands < {folder}/{stage}.txt
cd {root}
eval "srun ${{commands[$SLURM_ARRAY_TASK_ID]}}"
status=$?
# 75: stopped and saved, or a peer died; srun says 137 where one of its tasks was killed. 2: an
# error that would come again. Anything else is tried again.
case $status in
    0 | 2) ;;
    75 | 137) [ "${{SLURM_RESTART_COUNT:-0}}" -lt 100 ] && scontrol requeue "$SLURM_JOB_ID" ;;
    *) [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $status
"""
_SUBMIT = """\
#!/bin/bash
# Students begin when all teachers have ended, however they ended.
set -euo pipefail
after=
{lines}
"""


def write(
    runs: Sequence[Run],
    folder: pathlib.Path,
    name: str,
    *,
    root: pathlib.Path,
    options: Sequence[str] = (),
    at_a_time: int = 0,
    retries: int = 1,
) -> pathlib.Path:
    """Writes the scripts of what is not finished.

    Args:
        runs: of the table; those that are done or cannot run are left out.
        folder: for scripts and logs, seen by all nodes.
        name: of the jobs.
        root: the repository's folder, with its environment active where the script is submitted.
        options: of sbatch, such as `--partition=gpu`, a string each.
        at_a_time: how many tasks of an array may run together; 0: no limit.
        retries: of a run that failed.

    Returns:
        The script that submits all, to be run by bash.

    Raises:
        ConfigError: nothing is left to train, or an option that is none.
    """
    for option in options:
        if not option.startswith("-") or "\n" in option:
            raise ConfigError(f"--sbatch={option!r}: must begin with a hyphen, as in --partition=x")
    left = stages(runs)
    if not left:
        raise ConfigError("--backend=slurm: nothing is left to train")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()
    lines = []
    for stage, own in left.items():
        (folder / f"{stage}.txt").write_text("".join(f"{shlex.join(run.command)}\n" for run in own))
        script = folder / f"{stage}.sh"
        script.write_text(
            _SCRIPT.format(
                name=f"{name}-{stage}",
                last=len(own) - 1,
                at_a_time=f"%{at_a_time}" if at_a_time else "",
                folder=shlex.quote(str(folder)),
                stage=stage,
                options="\n".join(f"#SBATCH {option}" for option in options),
                root=shlex.quote(str(root.absolute())),
                retries=retries,
            )
        )
        lines.append(f"job=$(sbatch --parsable $after {shlex.quote(str(script))})")
        lines.append(f'echo "{stage}: $job"')
        lines.append("after=--dependency=afterany:$job")
    submit = folder / "submit.sh"
    submit.write_text(_SUBMIT.format(lines="\n".join(lines)))
    return submit
