"""What BHyT promises: bounds on every row, and activations that hardly grow with depth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_efficient.modeling.bhyt.bhyt_norm import BhytNorm
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytModel
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm

WIDTH = 300
LAYER = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}


def site(lam: float = 2.0, **fields: Any) -> BhytNorm:
    return BhytNorm(BhytConfig(**(LAYER | {"bhyt_lambda_input": lam} | fields)), "input", 0)


@pytest.fixture
def rows() -> Tensor:
    """Gaussian ones, heavy-tailed ones, ones with a few huge channels, a constant and a zero row."""
    gaussian = torch.randn(200, WIDTH)
    heavy = torch.distributions.StudentT(2.0).sample((200, WIDTH))
    spiked = gaussian.clone()
    spiked[:, :3] *= 1e3
    return torch.cat((gaussian, 1e4 * heavy, 1e-2 * spiked, torch.full((1, WIDTH), 5.0), torch.zeros(1, WIDTH)))


class TestRows:
    @pytest.mark.parametrize("lam", [1.0, 3.0, 20.0])
    def test_chebyshev_holds_for_every_row(self, lam: float, rows: Tensor) -> None:
        """One channel in kappa^2 may have an argument above lambda; the mean square is at most (lambda / kappa)^2."""
        norm = site(lam)
        normed, _, statistic = norm(rows)
        arguments = rows * norm.tanh_scale(None, statistic)[:, None]
        assert (arguments.abs() > lam).sum(-1).max() <= WIDTH / 100
        assert normed.square().mean(-1).max() <= (lam / 10) ** 2 * (1 + 1e-6)
        assert normed.abs().max() <= 1 and arguments.abs().max() <= lam / 10 * WIDTH**0.5 * (1 + 1e-6)

    def test_one_huge_channel_is_bounded_where_a_norm_is_not(self) -> None:
        x = torch.randn(50, WIDTH)
        x[:, 7] = 1e3
        bounded, stock = site()(x)[0], DecoderRMSNorm(WIDTH, 1e-6)(x)
        assert bounded[:, 7].abs().max() < 1
        assert stock[:, 7].abs().min() > 0.95 * WIDTH**0.5

    @pytest.mark.parametrize("factor", [2.0**-4, 2.0**5, -1.0, -(2.0**3)])
    def test_a_factor_of_the_row_changes_no_more_than_the_sign(self, factor: float) -> None:
        norm = site(bhyt_eps=1e-12)
        x = torch.randn(20, WIDTH)
        assert torch.equal(norm(factor * x)[0], norm(x)[0] * (1 if factor > 0 else -1))

    def test_rows_do_not_depend_on_their_order_and_two_runs_agree_to_the_bit(self, rows: Tensor) -> None:
        norm, order = site(), torch.randperm(len(rows))
        assert torch.equal(norm(rows[order])[0], norm(rows)[0][order])

        def gradients() -> list[Tensor]:
            x = rows.clone().requires_grad_()
            normed, summed, _ = norm(x)
            return list(torch.autograd.grad((normed.sin().sum() + summed.square().sum()), [x, *norm.parameters()]))

        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))

    def test_a_zero_row_gives_zero_and_a_finite_gradient(self) -> None:
        norm = site()
        x = torch.zeros(1, WIDTH, requires_grad=True)
        normed = norm(x)[0]
        (gradient,) = torch.autograd.grad(normed.sum(), x)
        assert not normed.any()
        torch.testing.assert_close(gradient, torch.full_like(x, 0.2 * 1e-6**-0.5))


class TestEstimates:
    """The source's variants as settings of one formula, in a post-attention norm; the first mean square is 0.7."""

    @staticmethod
    def second(kind: str, affine: tuple[float, float] | None = None, branch: tuple[float, float] | None = None) -> Any:
        learnable = kind == "approx" and affine is not None
        options = {"bhyt_second_site": kind, "bhyt_seq_len": 4, "bhyt_learnable_estimate": learnable}
        norm = BhytNorm(BhytConfig(**LAYER, **options), "post", 0)
        with torch.no_grad():
            for name, values in (("affine", affine), ("branch", branch)):
                if values is not None:
                    getattr(norm, name).copy_(torch.tensor(values))
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
        return norm(x, None, (torch.full((5,), 0.7), torch.tensor([3.0])))[0]

    def test_without_growth_the_first_mean_square_is_used_again(self) -> None:
        """eta with e = 0."""
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
        expected = torch.tanh(0.1 * x / (0.7 + 1e-6) ** 0.5)
        torch.testing.assert_close(self.second("affine", (1.0, 0.0)), expected)
        torch.testing.assert_close(self.second("approx", branch=(0.0, 0.0)), expected)

    def test_the_trained_estimate_begins_as_the_baseline(self) -> None:
        """residual_aware with a = 1, b = 0, in the source's letters."""
        branch = (2.0, 0.3)
        baseline = self.second("approx", branch=branch)
        assert torch.equal(self.second("approx", (1.0, 1.0), branch), baseline)
        torch.testing.assert_close(self.second("affine", (1.0, 2.0 * 0.3**2 + 0.3)), baseline)

    def test_growth_by_a_factor_is_the_slope(self) -> None:
        """eta with e = 0.5."""
        assert torch.equal(self.second("approx", (1.5, 0.0), (9.0, 9.0)), self.second("affine", (1.5, 0.0)))

    def test_a_negative_estimate_is_cut_off(self) -> None:
        assert torch.equal(self.second("affine", (1.0, -5.0)), self.second("affine", (1e-3, 0.0)))


class TestDepth:
    """32 layers of random weights N(0, 1/d), embeddings N(0, 1): mean variance over channels after each layer."""

    SHAPE = {
        **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 32},
        **{"num_attention_heads": 4, "initializer_range": 1 / 16, "use_cache": False},
    }

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> BhytModel:
        torch.manual_seed(0)
        model = BhytModel(BhytConfig(**cls.SHAPE, bhyt_seq_len=64)).eval()
        nn.init.normal_(model.embed_tokens.weight)
        return model

    @staticmethod
    def sites(model: BhytModel, lam: float = 1.0, gamma: float = 1.0, efficient: bool = True) -> list[BhytNorm]:
        """Its sites, set to these values; a stock RMSNorm where not `efficient`."""
        found = [module for module in model.modules() if isinstance(module, BhytNorm)]
        for module in found:
            nn.init.constant_(module.lam, lam)
            nn.init.constant_(module.weight, gamma)
            module.efficient = efficient
        return found

    @staticmethod
    @torch.no_grad()
    def variances(model: BhytModel) -> list[float]:
        ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(2))
        states: list[Tensor] = []  # the last one that transformers records is the final norm's
        handles = [
            layer.register_forward_hook(lambda m, inputs, output: states.append(output)) for layer in model.layers
        ]
        model(input_ids=ids)
        for handle in handles:
            handle.remove()
        return [state.var(-1, unbiased=False).mean().item() for state in states]

    def test_bhyt_hardly_grows_where_rms_norm_does(self, model: BhytModel) -> None:
        self.sites(model, efficient=False)
        stock = self.variances(model)
        assert len(stock) == 32 and stock[-1] / stock[0] > 10
        self.sites(model, lam=1.0)
        bounded = self.variances(model)
        assert bounded[-1] / bounded[0] < 1.2 and bounded[-1] < stock[-1] / 20
        self.sites(model, lam=3.0)
        wider = self.variances(model)
        assert bounded[-1] / bounded[0] < wider[-1] / wider[0] < 2.5

    def test_at_the_start_that_is_the_scale_and_not_the_tanh(self, model: BhytModel) -> None:
        """An RMSNorm whose gamma is lambda / kappa = 0.1 does the same, and so does BHyT with exact second sites."""
        self.sites(model, lam=1.0)
        bounded = self.variances(model)
        self.sites(model, gamma=0.1, efficient=False)
        control = self.variances(model)
        exact = copy.deepcopy(model)
        for module in self.sites(exact, lam=1.0):
            module.estimate, module.branch = "exact", None
        for ours, theirs, whole in zip(bounded, control, self.variances(exact), strict=True):
            assert ours == pytest.approx(theirs, rel=0.05) and whole == pytest.approx(ours, rel=0.01)

    @pytest.mark.parametrize(("lam", "bound"), [(1.0, 0.005), (3.0, 0.02)])
    def test_the_estimate_is_near_the_exact_mean_square(self, lam: float, bound: float, model: BhytModel) -> None:
        """Error of the scale, averaged over the tokens of a layer, in the worst layer."""
        self.sites(model, lam=lam)
        errors: list[float] = []

        def compare(module: Any, inputs: tuple, output: tuple) -> None:
            estimated = (module.lam / module.kappa / module.tanh_scale(inputs[2], output[2])).square()
            true = output[1].square().mean(-1) + module.eps
            errors.append(((estimated / true).sqrt() - 1).abs().mean().item())

        handles = [layer.post_attention_layernorm.register_forward_hook(compare) for layer in model.layers]
        self.variances(model)
        for handle in handles:
            handle.remove()
        assert len(errors) == 32 and 0 < max(errors) < bound


class TestDecoding:
    @pytest.mark.parametrize("second", ["exact", "approx", "affine"])
    def test_a_step_from_the_cache_equals_the_whole_sequence(
        self, second: str, bhyt_model: Callable, some_ids: Callable
    ) -> None:
        model = bhyt_model(bhyt_second_site=second, bhyt_final="bhyt")
        ids = some_ids(2, 12)
        with torch.no_grad():
            whole = model(input_ids=ids).logits[:, -1]
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            step = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, whole, rtol=1e-5, atol=1e-5)
