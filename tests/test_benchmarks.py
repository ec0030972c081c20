"""The benchmarks' arithmetic, and the command at its smallest."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import measure, table
from tgeo_jax import collectives


def test_a_ratio_is_taken_round_by_round():
    # A slow second round slows both: the ratios stay 2, 2, 3 whatever the times.
    case, base = (
        measure.Times(np.array([2.0, 20.0, 3.0])),
        measure.Times(np.array([1.0, 10.0, 1.0])),
    )
    assert case.over(base) == (2.0, 2.0, 2.5)
    assert case.milliseconds == 3000


def test_cases_are_timed_in_turn_after_one_call_that_does_not_count():
    seen = []
    cases = {name: lambda n=name: seen.append(n) or jax.numpy.zeros(()) for name in "ab"}
    measure._SAMPLE_SECONDS, kept = 0.0, measure._SAMPLE_SECONDS
    try:
        found = measure.side_by_side(cases, rounds=2, calls={"a": 10})
    finally:
        measure._SAMPLE_SECONDS = kept
    assert "".join(seen) == "aabb" + "ab" + "ba"  # warm-up and its length; two rounds
    assert [len(times.seconds) for times in found.values()] == [2, 2]


def test_costs_of_a_product_by_hand():
    a, b = jnp.ones((8, 4)), jnp.ones((4, 2))
    found = measure.costs(jax.jit(jnp.dot).lower(a, b).compile())
    assert found.flops == 2 * 8 * 4 * 2
    assert found.bytes == 4 * (8 * 4 + 4 * 2 + 8 * 2)


def test_collectives_of_a_program_whose_result_is_a_tuple_with_comments():
    text = """
    %x = (f32[2,3]{1,0}, f32[4]{0}, /*index=2*/bf16[5]{0}) all-reduce(%a, %b, %c), to_apply=%add
    %y = f32[8,64]{1,0} all-gather(%z), dimensions={0}, replica_groups={{0,2},{1,3}}, channel_id=1
    %v = u8[7]{0} reduce-scatter(%z), replica_groups=[2,4]<=[8], dimensions={0}
    %w = f32[] add(%p, %q)
    """
    assert collectives.collectives(text) == [
        ("all-reduce", 50, None), ("all-gather", 2048, 2), ("reduce-scatter", 7, 4)
    ]  # fmt: skip


def test_collectives_of_a_compiled_program():
    if jax.device_count() > 1:
        pytest.skip("written for one device, where nothing has to be said")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    total = jax.jit(jnp.sum, in_shardings=sharding).lower(jnp.ones(8)).compile()
    assert collectives.collectives(total.as_text()) == []


def test_rows_survive_their_file(tmp_path):
    row = table.Row("step", "meta", "plain", ratio=2.5, low=2.0, high=3.0, flops=8e9, note="n")
    path = tmp_path / "speed.jsonl"
    table.write(path, [row], {"device": "cpu", "commit": "abc"})
    assert table.read(path) == [(row, {"device": "cpu", "commit": "abc"})]


def test_the_command_prints_a_table_and_keeps_it(command, tmp_path):
    output = tmp_path / "speed.jsonl"
    done = command("-m", "benchmarks", "--quick", "--only=seeds,devices", f"--output={output}")
    assert "| mlp: 2 seeds in one program | 2 runs of one |" in done.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["part"] for row in rows} == {"seeds", "devices"}
    assert all(row["commit"] and row["device"] for row in rows)
    of_two = [row for row in rows if row["case"] == "cnn, plain step, 2 devices"]
    assert "all-reduce" in of_two[0]["note"]
    shown = command("-m", "benchmarks", f"--show={output}", "--only=devices").stdout
    assert "cnn, plain step, 2 devices" in shown
    assert "2 seeds" not in shown


def test_an_unknown_part_is_named_with_the_nearest(command):
    done = command("-m", "benchmarks", "--only=step,peer", check=False)
    assert done.returncode == 2
    assert "--only=peer: no such part; did you mean 'peers'?" in done.stderr
