"""row_adamw against AdamW of PyTorch and against the formula, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from hf_efficient.errors import HFEError
from hf_efficient.kernels.row_adamw.api import row_adamw
from hf_efficient.kernels.row_adamw.configs import launch_config
from hf_efficient.kernels.row_adamw.record import RECORD, draw

CPU = torch.device("cpu")


def _state(rows: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "param": torch.randn(rows, width).to(dtype),
        "exp_avg": torch.zeros(rows, width, dtype=moments),
        "exp_avg_sq": torch.zeros(rows, width, dtype=moments),
        "steps": torch.zeros(rows, dtype=torch.int32),
        "log_decays": torch.zeros(rows, dtype=torch.float64),
    }


def test_it_is_the_formula_element_by_element() -> None:
    arguments = draw(CPU, torch.float64, ids=3, rows=6, width=4)
    before = {name: arguments[name].clone() for name in RECORD.mutates}
    (beta1, beta2), lr, eps = arguments["betas"], arguments["lr"], arguments["eps"]
    row_adamw(**arguments, backend="reference")
    for i, r in enumerate(arguments["ids"].tolist()):
        t = before["steps"][r].item() + 1
        assert arguments["steps"][r].item() == t and arguments["log_decays"][r].item() == arguments["log_decay"]
        kept = math.exp(arguments["log_decay"] - before["log_decays"][r].item())
        for j in range(4):
            g = arguments["grad"][i, j].item()
            m = beta1 * before["exp_avg"][r, j].item() + (1 - beta1) * g
            v = beta2 * before["exp_avg_sq"][r, j].item() + (1 - beta2) * g * g
            change = lr / (1 - beta1**t) * m / (math.sqrt(v / (1 - beta2**t)) + eps)
            expected = kept * before["param"][r, j].item() - change
            assert arguments["param"][r, j].item() == pytest.approx(expected, rel=1e-12)
            assert arguments["exp_avg"][r, j].item() == pytest.approx(m, rel=1e-12)
            assert arguments["exp_avg_sq"][r, j].item() == pytest.approx(v, rel=1e-12)


def test_other_rows_keep_every_bit() -> None:
    arguments = draw(CPU, torch.bfloat16, ids=4)
    before = {name: arguments[name].clone() for name in RECORD.mutates}
    row_adamw(**arguments)
    others = [r for r in range(11) if r not in arguments["ids"].tolist()]
    assert len(others) == 7
    for name in RECORD.mutates:
        assert torch.equal(arguments[name][others], before[name][others])
        assert not torch.equal(arguments[name], before[name])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_row_that_takes_part_in_every_step_gets_what_adamw_of_pytorch_gives(weight_decay: float) -> None:
    state = _state(7, 33)
    theirs = torch.nn.Parameter(state["param"].clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.85, 0.95), weight_decay=weight_decay, foreach=False)
    log_decay = 0.0
    for step in range(60):
        grad, lr = torch.randn(7, 33) * (1 + step % 5), 0.1 / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        theirs.grad = grad
        optimizer.step()
        log_decay += math.log1p(-lr * weight_decay)
        order = torch.randperm(7)
        row_adamw(
            **state, ids=order, grad=grad[order], lr=lr, betas=(0.85, 0.95), eps=1e-8, log_decay=log_decay
        )  # fmt: skip
        torch.testing.assert_close(state["param"], theirs.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["exp_avg"], optimizer.state[theirs]["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-7)


def test_the_first_steps_keep_their_digits() -> None:
    """1 - 0.999^1 in single precision would be off by 5e-5; a first step is lr times the sign of the gradient."""
    state = _state(2, 5)
    before, grad = state["param"].clone(), torch.tensor([[1e-3, -2.0, 5.0, -1e-2, 1.0]])
    row_adamw(**state, ids=torch.tensor([1]), grad=grad, lr=1.0, betas=(0.9, 0.999), eps=0.0)
    torch.testing.assert_close(before[1] - state["param"][1], grad[0].sign(), rtol=2e-7, atol=2e-7)


def test_the_scale_is_a_factor_of_the_gradient() -> None:
    one, other = draw(CPU, torch.float32), draw(CPU, torch.float32)
    row_adamw(**{**one, "scale": torch.tensor(0.5)})
    row_adamw(**{**other, "grad": 0.5 * other["grad"]})
    assert all(torch.equal(one[name], other[name]) for name in RECORD.mutates)


def test_an_id_that_occurs_twice_is_refused_where_data_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = draw(CPU, torch.float32) | {"ids": torch.tensor([1, 7, 3, 7, 0])}
    monkeypatch.setenv("HFE_CHECK", "1")
    with pytest.raises(HFEError, match="holds 7 twice; add up"):
        row_adamw(**arguments)


def test_a_parameter_that_is_trained_is_changed_under_no_grad_only() -> None:
    arguments = draw(CPU, torch.float32)
    arguments["param"] = torch.nn.Parameter(arguments["param"])
    with pytest.raises(HFEError, match=r"torch\.no_grad\(\)"):
        row_adamw(**arguments)
    with torch.no_grad():
        assert row_adamw(**arguments) is arguments["param"]


def test_parameter_and_state_are_traced_as_what_changes() -> None:
    from hf_efficient.kernels.row_adamw.op import row_adamw_step

    written = {argument.name for argument in row_adamw_step._schema.arguments if argument.alias_info is not None}
    assert written == {"param", "exp_avg", "exp_avg_sq", "steps", "log_decays"} == set(RECORD.mutates)


def test_tiles_are_no_wider_than_needed() -> None:
    for width in (1, 100, 129, 576, 1024, 8192):
        config = launch_config(width)
        assert config.block_width == 128 * config.num_warps <= 1024
        assert config.block_width < 2 * max(width, 64) + 1


def test_the_byte_model_is_the_one_that_the_notes_state() -> None:
    arguments = draw(CPU, torch.bfloat16, ids=3, width=32)
    assert RECORD.forward_cost(arguments).bytes == 3 * 32 * (2 + 2 * 2 + 16) + 3 * 32
    arguments = draw(CPU, torch.float32, ids=3, width=32)
    assert RECORD.forward_cost(arguments).bytes == 3 * 32 * (4 + 2 * 4 + 16) + 3 * 32
