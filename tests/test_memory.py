"""What a program needs is known before it runs, and a run that cannot fit says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import memory
from tgeo_jax.errors import ConfigError


def test_arguments_results_and_temporaries_are_counted():
    @jax.jit
    def sorted_twice(x):
        return jnp.sort(x), x + 1

    found = memory.needed(sorted_twice.lower(jnp.zeros(1000)).compile())
    assert found.arguments == 4000
    assert found.working >= 8000  # two results, which replace nothing


def test_a_donated_argument_is_not_counted_as_a_result_too():
    add = lambda x: x + 1.0  # noqa: E731
    x = jnp.zeros(100_000)
    kept = memory.needed(jax.jit(add).lower(x).compile())
    donated = memory.needed(jax.jit(add, donate_argnums=0).lower(x).compile())
    assert kept.total - donated.total == x.nbytes


def test_what_fits_passes_and_what_does_not_names_both_figures_and_the_cures():
    wanted = memory.Needed(arguments=2_000_000_000, working=5_000_000_000)
    memory.check(wanted, 5_000_000_000)
    memory.check(wanted, None)  # a device that does not say
    said = r"data\.batch_size.* 5,000 MB .* 2,000 MB .* 4,999 MB"
    with pytest.raises(ConfigError, match=said) as e:
        memory.check(wanted, 4_999_000_000)
    for cure in ("meta.batch_size", "remat=True", "precision='bfloat16'", "fewer seeds"):
        assert cure in str(e.value)


def test_free_memory_of_a_device_is_its_limit_less_what_is_in_use():
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 30}

    assert memory.free(Device()) == 70


def test_free_memory_of_a_host_is_about_what_it_has(monkeypatch, tmp_path):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000",
        "/sys/fs/cgroup/memory.current": "2500000",
        "/sys/fs/cgroup/memory.stat": "anon 100\nfile 400000\n",
    }
    monkeypatch.setattr(memory, "_read", lambda path: files[path])
    assert memory.free(jax.devices("cpu")[0]) == 900_000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert memory.free(jax.devices("cpu")[0]) == 4_096_000
    files.update(dict.fromkeys(files, ""))
    assert memory.free(jax.devices("cpu")[0]) is None


def test_activations_grow_with_the_batch():
    def loss(w, x):
        for _ in range(4):
            x = jnp.sin(x @ w)
        return x.sum()

    def working(batch):
        x = jax.ShapeDtypeStruct((batch, 64), np.float32)
        w = jax.ShapeDtypeStruct((64, 64), np.float32)
        return memory.needed(jax.jit(jax.grad(loss)).lower(w, x).compile()).working

    assert working(2048) > 1.8 * working(1024)
