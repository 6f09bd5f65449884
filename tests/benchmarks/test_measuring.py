"""The instruments of the benchmarks: phases of time, operators, memory."""

import time

import torch

from benchmarks.measuring import Clock, OperatorCount, peak_memory


def test_time_of_an_inner_phase_is_not_that_of_the_outer_one():
    clock = Clock()
    started = time.perf_counter()
    clock.start()
    with clock.phase("outer"):
        time.sleep(0.02)
        with clock.phase("inner"):
            time.sleep(0.2)
    seconds = clock.stop()
    assert sum(seconds.values()) <= time.perf_counter() - started
    assert list(seconds) == ["rest", "outer", "inner"]
    assert seconds["inner"] >= 0.2 and 0.02 <= seconds["outer"] < 0.2 and seconds["rest"] < 0.02
    clock.start()
    assert set(clock.stop()) == {"rest"}


def test_a_phase_ends_with_an_error_too():
    clock = Clock()
    clock.start()
    try:
        with clock.phase("failing"):
            raise KeyError
    except KeyError:
        time.sleep(0.05)
    assert clock.stop()["rest"] >= 0.05


def test_operators_are_counted_and_views_are_not():
    x = torch.randn(3, 4, requires_grad=True)
    with OperatorCount() as count:
        x.t().reshape(2, 6).unsqueeze(0).expand(2, -1, -1)[..., :3].detach()
    assert count.names == {"aten.clone.default": 1}  # the rows of a transposed matrix are not one piece of memory
    with OperatorCount() as count:
        x.detach().add_(1)
    assert count.names == {"aten.add_.Tensor": 1}


def test_operators_of_a_backward_pass_are_counted():
    x = torch.randn(3, 4, requires_grad=True)
    with OperatorCount() as count:
        (x @ x.t()).sum().backward()
    assert (count.names["aten.mm.default"], count.names["aten.sum.default"]) == (3, 1)
    assert count.total == count.names.total()


def test_peak_of_memory_is_beyond_what_was_held():
    held = torch.zeros(1000)
    with peak_memory() as peak:
        (held + 1) * 2
    assert peak.size == 2 * held.nbytes


def test_views_of_what_was_held_take_no_memory():
    layer = torch.nn.Linear(100, 50)
    x = torch.ones(3, 100)
    with peak_memory() as peak:
        held = layer.weight.t(), layer.weight.detach()[:10], layer.weight.view(-1)
        y = layer(x)
    assert peak.size == y.nbytes and len(held) == 3
    with peak_memory() as peak:
        y.sum().backward()
    assert peak.size >= layer.weight.grad.nbytes + layer.bias.grad.nbytes


def test_what_an_operator_fills_or_changes_is_counted_once():
    with peak_memory() as peak:
        filled = torch.empty(0)
        torch.add(torch.ones(1000), 1, out=filled)
        filled.mul_(2).t()
    assert peak.size == 2 * filled.nbytes
