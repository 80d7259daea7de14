"""RowSparseAdamW compared with PyTorch's AdamW, and with a plain simulation of its documented formula."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficient import HFEError, RowSparseAdamW
from hf_efficient.modeling.stem.token_rows import TokenRows
from hf_efficient.training.row_gradients import RowGradient

ROWS, WIDTH = 9, 5


class Tables(nn.Module):
    """Two embeddings, one after the other, and a linear layer: a model with sparse and dense gradients."""

    def __init__(self, sparse: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Embedding(ROWS, WIDTH, sparse=sparse)
        self.second = nn.Embedding(ROWS, WIDTH, sparse=sparse)
        self.head = nn.Linear(WIDTH, 3)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(ids)) * self.second(ids.flip(0)))

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids).float(), ids % 3)


def _batches(count: int, size: int = 6, rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, rows, (size,), generator=generator) for _ in range(count)]


def _same_state(one: dict, other: dict) -> bool:
    """Equal in every tensor, bit for bit, dtypes included."""
    pairs = [(one["state"][key], other["state"][key]) for key in one["state"]]
    return one["state"].keys() == other["state"].keys() and all(
        a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a) for a, b in pairs
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_it_is_adamw_where_every_row_occurs_in_every_step(weight_decay: float) -> None:
    ours, theirs = Tables(), Tables(sparse=False)
    options = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    optimizers = [RowSparseAdamW(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), **options)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, 40) for each in optimizers]
    for batch in _batches(30):
        ids = torch.cat((torch.randperm(ROWS), batch))
        for model, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            model.loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    for (name, mine), his in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-6, msg=name)


class _Simulated:
    """The documented formula, dense and in float64: rows that do not occur only decay, at every step."""

    def __init__(self, table: Tensor, betas: tuple[float, float], eps: float) -> None:
        self.table = table.detach().double().clone()
        self.m, self.v = torch.zeros_like(self.table), torch.zeros_like(self.table)
        self.t = torch.zeros(len(table), 1, dtype=torch.float64)
        self.betas, self.eps = betas, eps

    def step(self, gradient: Tensor, occurs: Tensor, lr: float, weight_decay: float) -> None:
        beta1, beta2 = self.betas
        occurs = occurs[:, None]
        self.table *= 1 - lr * weight_decay
        self.t += occurs
        self.m = torch.where(occurs, beta1 * self.m + (1 - beta1) * gradient, self.m)
        self.v = torch.where(occurs, beta2 * self.v + (1 - beta2) * gradient**2, self.v)
        change = self.m / (1 - beta1**self.t) / ((self.v / (1 - beta2**self.t)).sqrt() + self.eps)
        self.table -= torch.where(occurs, lr * change, 0.0)


def test_rows_decay_at_every_step_and_move_when_they_occur() -> None:
    table = nn.Parameter(torch.randn(50, 4))
    optimizer = RowSparseAdamW([table], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    simulated = _Simulated(table, (0.8, 0.9), 1e-6)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = lr = 0.1 * (1 + math.cos(step / 9)) / 2
        ids = torch.randperm(50)[: 1 + step % 4]
        rows = torch.randn(len(ids), 4)
        table.grad = torch.sparse_coo_tensor(ids[None], rows, table.shape, check_invariants=True)
        optimizer.step()
        dense = torch.zeros(50, 4, dtype=torch.float64).index_copy_(0, ids, rows.double())
        occurs = torch.zeros(50, dtype=torch.bool)
        occurs[ids] = True
        simulated.step(dense, occurs, lr, 0.3)
        # A row that has just occurred is up to date; the decay of the others is outstanding.
        torch.testing.assert_close(table[ids].double(), simulated.table[ids], rtol=1e-5, atol=1e-6)
        if step == 40:
            optimizer.flush()
            torch.testing.assert_close(table.double(), simulated.table, rtol=1e-5, atol=1e-6)
    assert simulated.t.min() < simulated.t.max()
    assert (table.double() - simulated.table).abs().max() > 1e-3, "rows wait for their decay"
    optimizer.flush()
    torch.testing.assert_close(table.double(), simulated.table, rtol=1e-5, atol=1e-6)
    before = table.detach().clone()
    optimizer.flush()
    assert torch.equal(table, before), "nothing is left to do"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_occur_keep_every_bit(dtype: torch.dtype) -> None:
    model = Tables(dtype=dtype)
    before = model.first.weight.detach().clone()
    optimizer = RowSparseAdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for ids in _batches(10, rows=4):
        model.loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    assert torch.equal(model.first.weight[4:], before[4:])
    assert model.first.weight[:4].ne(before[:4]).any(1).all()


def test_a_batch_in_parts_gives_what_the_whole_gives() -> None:
    whole, parts = Tables(), Tables()
    optimizers = [RowSparseAdamW(model.parameters(), lr=0.05) for model in (whole, parts)]
    for step, batch in enumerate(_batches(6, size=24)):
        whole.loss(batch).backward()
        pieces = batch.split(4)
        # The second embedding looks up reversed ids: reverse the pieces' reversal away.
        targets = [torch.cat((piece, batch.flip(0)[4 * i : 4 * i + 4])) for i, piece in enumerate(pieces)]
        for pair in targets:
            ids, flipped = pair.split(4)
            out = parts.head(torch.tanh(parts.first(ids)) * parts.second(flipped))
            (F.cross_entropy(out, ids % 3, reduction="sum") / 24).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for mine, his in zip(parts.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5, msg=f"step {step}")


def test_gradients_of_many_parts_take_no_more_memory_than_twice_their_sum() -> None:
    table = nn.Parameter(torch.randn(40, 3))
    optimizer = RowSparseAdamW([table], lr=0.1)
    held, occurred = 0, set()
    for ids in _batches(50, size=8, rows=40):
        F.embedding(ids, table, sparse=True).sum().backward()
        assert table.grad is None
        occurred.update(ids.tolist())
        held = sum(part.ids.numel() for part in optimizer._collected[table])
        assert held <= 2 * len(occurred)
    assert held >= len(occurred)


def test_parts_in_half_precision_are_added_in_float32() -> None:
    """256 + 1 is 256 in bfloat16: added there, 200 small gradients after a large one would be lost."""
    table = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    optimizer = RowSparseAdamW([table], lr=0.1, betas=(0.0, 0.0), eps=0.0)
    for factor in [256.0] + [1.0] * 200:
        (F.embedding(torch.tensor([1]), table, sparse=True) * factor).sum().backward()
    optimizer.step()
    assert optimizer.state[table]["exp_avg"][1].tolist() == [456.0, 456.0]


def test_equal_ids_of_one_batch_in_half_precision_are_added_in_float32() -> None:
    table = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    optimizer = RowSparseAdamW([table], lr=0.1, betas=(0.0, 0.0), eps=0.0)
    F.embedding(torch.ones(4097, dtype=torch.long), table, sparse=True).sum().backward()
    optimizer.step()
    assert optimizer.state[table]["exp_avg"][1].tolist() == [4097.0, 4097.0]


class _RowsOfTable(torch.autograd.Function):
    """Looks up distinct, sorted rows, and gives the table a gradient that is known to be coalesced."""

    @staticmethod
    def forward(ctx, table: Tensor, ids: Tensor) -> Tensor:
        ctx.ids, ctx.shape = ids, table.shape
        return table[ids]

    @staticmethod
    def backward(ctx, rows: Tensor) -> tuple[Tensor, None]:
        return torch.sparse_coo_tensor(ctx.ids[None], rows, ctx.shape, is_coalesced=True, check_invariants=True), None


def test_a_coalesced_gradient_is_taken_as_it_is() -> None:
    """Accumulation drops the flag that it is coalesced: coalescing it again would copy it and wait for a GPU."""
    table = nn.Parameter(torch.randn(9, 4))
    optimizer = RowSparseAdamW([table])
    ids, rows = torch.tensor([2, 5, 7]), torch.randn(3, 4)
    for count in (1, 2):
        _RowsOfTable.apply(table, ids).backward(rows)
        assert len(optimizer._collected[table]) == count
        assert optimizer._collected[table][-1].rows.data_ptr() == rows.data_ptr()
    # One that is not coalesced, right after: what is remembered of the one before does not count for it.
    F.embedding(torch.tensor([7, 2, 7]), table, sparse=True).sum().backward()
    optimizer.step()
    assert optimizer.state[table]["step"].tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 0]
    expected = 0.1 * (2 * rows + torch.tensor([[1.0], [0.0], [2.0]]))
    torch.testing.assert_close(optimizer.state[table]["exp_avg"][ids], expected)


def test_rows_are_clipped_together_and_apart_from_dense_gradients() -> None:
    model, free = Tables(), Tables()
    optimizer = RowSparseAdamW(model.parameters(), lr=0.1, betas=(0.0, 0.0), max_row_norm=0.01)
    other = RowSparseAdamW(free.parameters(), lr=0.1, betas=(0.0, 0.0))
    ids = _batches(1)[0]
    for each in (model, free):
        each.loss(ids).backward()
        total = nn.utils.clip_grad_norm_(each.parameters(), 1e3)
        torch.testing.assert_close(total, each.head.weight.grad.norm().hypot(each.head.bias.grad.norm()))
    optimizer.step()
    other.step()
    clipped, whole = (
        [each.state[table.weight]["exp_avg"] for table in (m.first, m.second)]
        for each, m in ((optimizer, model), (other, free))
    )
    norm = torch.stack([m.norm() for m in whole]).norm()
    assert norm > 0.02
    torch.testing.assert_close(optimizer.row_norm, norm)
    torch.testing.assert_close(torch.stack([m.norm() for m in clipped]).norm(), torch.tensor(0.01), rtol=1e-3, atol=0)
    for mine, his in zip(clipped, whole, strict=True):
        torch.testing.assert_close(mine, his * (0.01 / norm), rtol=1e-3, atol=1e-8)
    assert torch.equal(model.head.weight, free.head.weight)


def test_what_walks_over_gradients_meets_only_dense_ones() -> None:
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters())
    model.loss(_batches(1)[0]).backward()
    assert model.first.weight.grad is None and model.second.weight.grad is None
    assert model.head.weight.grad is not None
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


def test_zero_grad_forgets_what_was_collected() -> None:
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    model.loss(_batches(1)[0]).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_a_gradient_is_used_once() -> None:
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters(), lr=0.1)
    model.loss(_batches(1)[0]).backward()
    optimizer.step()
    after = model.first.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.first.weight, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_saved_state_resumes_exactly(dtype: torch.dtype, fused: bool, tmp_path: Path) -> None:
    batches = _batches(12, size=3)

    def train(model: Tables, optimizer: RowSparseAdamW, over: list[Tensor]) -> None:
        for ids in over:
            model.loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[Tables, RowSparseAdamW]:
        model = Tables(dtype=dtype)
        return model, RowSparseAdamW(model.parameters(), lr=0.02, weight_decay=0.5, fused=fused)

    model, optimizer = fresh()
    train(model, optimizer, batches[:6])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed, other = fresh()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    moments = other.state[resumed.first.weight]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32
    assert _same_state(other.state_dict(), saved["optimizer"])
    train(model, optimizer, batches[6:])
    train(resumed, other, batches[6:])
    optimizer.flush()
    other.flush()
    for (name, mine), his in zip(resumed.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, his), name
    assert _same_state(other.state_dict(), optimizer.state_dict())


def test_a_state_of_another_shape_is_refused() -> None:
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters())
    model.loss(_batches(1)[0]).backward()
    optimizer.step()
    larger = nn.Embedding(ROWS + 1, WIDTH)
    other = RowSparseAdamW([larger.weight, *list(model.parameters())[1:]])
    with pytest.raises(HFEError, match=r"\(9, 5\).*\(10, 5\)"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_model_and_optimiser_trains_as_the_original(copied) -> None:
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters(), lr=0.1, max_row_norm=0.5)
    model.loss(_batches(1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    model2, optimizer2 = copied((model, optimizer))
    assert optimizer2.max_row_norm == 0.5
    for ids in _batches(3):
        for m, o in ((model, optimizer), (model2, optimizer2)):
            m.loss(ids).backward()
            assert m.first.weight.grad is None
            o.step()
            o.zero_grad()
    for mine, his in zip(model2.parameters(), model.parameters(), strict=True):
        assert mine is not his and torch.equal(mine, his)


def test_nothing_is_left_behind_when_the_optimiser_is_gone() -> None:
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters())
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model.loss(_batches(1)[0]).backward()
    assert model.first.weight.grad.is_sparse, "as without it"
    assert not model.first.weight._post_accumulate_grad_hooks


def test_parameters_that_come_later_are_watched() -> None:
    model = Tables()
    model.second.weight.requires_grad_(False)
    optimizer = RowSparseAdamW([model.head.weight, model.second.weight], lr=0.1)
    optimizer.add_param_group({"params": [model.first.weight], "lr": 0.2, "weight_decay": 0.0})
    ids = _batches(1)[0]
    model.loss(ids).backward()
    optimizer.step()
    assert optimizer.state[model.first.weight]["step"].sum() == ids.unique().numel()
    model.second.weight.requires_grad_(True)
    optimizer.step()
    model.loss(ids).backward()
    assert model.second.weight.grad is None, "collected"
    optimizer.step()
    assert optimizer.state[model.second.weight]["step"].sum() == ids.unique().numel()


def test_a_closure_and_step_hooks_run_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # makes PyTorch wrap the step of its own class too
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters(), lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = model.loss(_batches(1)[0])
        loss.backward()
        return loss

    before = model.first.weight.detach().clone()
    assert optimizer.step(closure).item() > 0
    assert calls == ["before", "closure", "after"]
    assert not torch.equal(model.first.weight, before)


def test_a_step_without_a_gradient_is_no_step_and_an_empty_gradient_is_one() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = RowSparseAdamW([table], lr=0.5, weight_decay=0.5)
    F.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    optimizer.step()
    optimizer.step()
    optimizer.flush()
    assert table[[0, 2, 3]].eq(0.75).all()
    F.embedding(torch.tensor([], dtype=torch.long), table, sparse=True).sum().backward()
    optimizer.step()
    optimizer.flush()
    assert table[[0, 2, 3]].eq(0.75 * 0.75).all()


def test_a_gradient_scaler_is_refused() -> None:
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model.loss(_batches(1)[0])).backward()
    with pytest.raises(HFEError, match="gradient scaler.*bfloat16"):
        scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    model.loss(_batches(1)[0]).backward()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert not torch.equal(model.first.weight, before["first.weight"]), "one that is switched off does no harm"


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_for_dense_gradients_are_refused_for_sparse_ones(option: str) -> None:
    model = Tables()
    groups = [{"params": model.head.parameters(), option: True}, {"params": [model.first.weight]}]
    optimizer = RowSparseAdamW(groups)
    model.loss(_batches(1)[0]).backward()
    optimizer.step()
    optimizer.param_groups[1][option] = True
    model.loss(_batches(1)[0]).backward()
    with pytest.raises(HFEError, match=rf"{option}=True.*\(9, 5\).*{option}=False"):
        optimizer.step()


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_a_parameter_may_not_change_between_sparse_and_dense(first: str) -> None:
    model = Tables(sparse=first == "sparse")
    optimizer = RowSparseAdamW(model.parameters())
    model.loss(_batches(1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.first.sparse = first != "sparse"
    model.loss(_batches(1)[0]).backward()
    with pytest.raises(HFEError, match="had others before; keep stem_sparse_grad"):
        optimizer.step()


def test_other_bad_input_is_refused() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    with pytest.raises(HFEError, match="max_row_norm=0"):
        RowSparseAdamW([table], max_row_norm=0)
    optimizer = RowSparseAdamW([table], lr=2.0, weight_decay=0.5)
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (4, 2), check_invariants=True)
    with pytest.raises(HFEError, match=r"lr=2.0 times weight_decay=0.5"):
        optimizer.step()
    vector = nn.Parameter(torch.ones(4))
    vector.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=True)
    with pytest.raises(HFEError, match=r"shape \(4,\).*whole rows"):
        RowSparseAdamW([vector]).step()


def test_a_gradient_that_comes_coalesced_is_not_added_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch drops the flag in accumulation; coalescing again would cost more than the update."""
    seen = []
    of = RowGradient.of
    monkeypatch.setattr(RowGradient, "of", lambda p, g: seen.append(g.is_coalesced()) or of(p, g))
    embedding = nn.Embedding(20, 4, sparse=True)
    optimizer = RowSparseAdamW(embedding.parameters())
    expected = embedding.weight.detach().clone()
    reference = RowSparseAdamW([expected.requires_grad_()])
    for ids in (torch.tensor([[3, 5], [5, 5]]), torch.tensor([[0, 19], [5, 1]])):
        tokens = TokenRows(ids)
        tokens.rows(embedding)[tokens.slots].square().sum().backward()
        rows = expected.detach()[ids.flatten()] * 2
        expected.grad = torch.sparse_coo_tensor(ids.flatten()[None], rows, (20, 4), check_invariants=False)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(embedding.weight, expected)
    assert seen == [True, False, True, False]


def test_a_step_in_pieces_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a few rows are processed at a time."""
    results = []
    for elements in (1 << 19, 3 * WIDTH):
        monkeypatch.setattr("hf_efficient.training.row_sparse_adamw._CPU_ELEMENTS", elements)
        model = Tables()
        optimizer = RowSparseAdamW(model.parameters(), lr=0.1, weight_decay=0.1, max_row_norm=0.5)
        for ids in _batches(4, size=12):
            model.loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
    for mine, his in zip(results[1].parameters(), results[0].parameters(), strict=True):
        assert torch.equal(mine, his)
