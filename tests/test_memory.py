"""Slots that fit: by an account made by hand, and by that of a compiled program."""

import types

import jax
import jax.numpy as jnp
import pytest

from instructgpt_jax import sharding
from instructgpt_jax.training import memory


def account(base, each, refused=10**9, asked=None):
    """compile_with of a program that takes base + each · slots bytes, and that the compiler refuses above `refused`."""

    def compile_with(slots):
        if asked is not None:
            asked.append(slots)
        if slots > refused:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
        sizes = dict(temp_size_in_bytes=base + each * slots + 5, output_size_in_bytes=2, alias_size_in_bytes=7)
        return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))

    return compile_with


@pytest.fixture
def free(monkeypatch):
    return lambda count: monkeypatch.setattr(memory, "free_bytes", lambda: count)


def test_all_where_they_fit_and_one_program_is_compiled(free, capsys):
    free(1100)
    asked = []
    assert memory.plan_slots(account(100, 10, asked=asked), 0, 100) == 100 and asked == [100]
    assert "sampling: 100 slots for 100 prompts" in capsys.readouterr().err
    assert memory.plan_slots(account(100, 10), 400, 100) == 100  # no more slots than prompts


@pytest.mark.parametrize(("bytes_free", "refused"), [(1099, 999), (640, 999), (640, 70), (640, 30), (115, 99)])
def test_as_many_as_fit_to_an_eighth(free, bytes_free, refused):
    free(bytes_free)
    fit = min((bytes_free - 100) // 10, refused)
    asked = []
    assert fit * 7 / 8 <= memory.plan_slots(account(100, 10, refused, asked), 0, 100) <= fit
    assert len(asked) <= 8


def test_shards_have_as_many_slots_each(free):
    free(640)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    with jax.set_mesh(mesh):
        assert memory.plan_slots(account(100, 10), 0, 96) in (48, 40)


def test_more_than_fit_are_refused_with_the_number_that_would(free):
    free(640)
    with pytest.raises(ValueError, match="config.rollout.wave must be at most 5[0-4], so many slots fit .*, got 80"):
        memory.plan_slots(account(100, 10), 80, 100)
    free(90)
    for wanted in (0, 80):
        with pytest.raises(ValueError, match="1 slots already take"):
            memory.plan_slots(account(100, 10), wanted, 100)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        memory.plan_slots(broken, 0, 100)


def broken(slots):
    raise jax.errors.JaxRuntimeError("INTERNAL: broken")


def test_a_program_compiled_for_its_account_is_not_compiled_again(caplog):
    program, x = jax.jit(lambda x: (jnp.outer(x, x) ** 2).sum(axis=0)), jnp.ones(64)
    with jax.log_compiles():
        assert 0 < memory.needed_bytes(lambda slots: program.lower(x).compile(), 1) < memory.free_bytes()
        assert "XLA compilation" in caplog.text
        caplog.clear()
        program(x)
    assert "XLA compilation" not in caplog.text
