"""Invariants of the router and its balancer (router.py)."""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from common import randomize, tiny_config, tiny_model, tokens
from model import Zaya
from router import Balancer, Router, choose, load_entropy

seeds = st.integers(0, 10**6)


def router(layer=1, seed=0, **changes):
    return randomize(Router(tiny_config(**changes), layer), seed)


def inputs(seed, config=tiny_config()):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 9, config.n_embd, generator=g), torch.randn(2, 9, config.router_dim, generator=g)


@given(seeds, st.booleans())
def test_probabilities_sum_to_one_and_the_weight_is_the_chosen_one_s(seed, skip):
    r, (x, below) = router(seed=seed, skip_expert=skip), inputs(seed)
    expert, weight, state = r(x, below)
    probs = r.out_proj(F.gelu(r.fc2(F.gelu(r.fc1(r.norm(state)))))).softmax(-1)        # eqs. 2-4
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 9))
    torch.testing.assert_close(weight, probs.gather(-1, expert[..., None])[..., 0])
    assert torch.equal(expert, (probs + r.balancing_bias).argmax(-1))


@given(seeds)
def test_the_bias_changes_the_choice_but_never_the_weight(seed):
    probs = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    for e in range(4):
        expert, weight = choose(probs, F.one_hot(torch.tensor(e), 4) * 2.0)
        assert (expert == e).all() and torch.equal(weight, probs[:, e])


def test_no_gradient_reaches_the_bias():
    r, (x, below) = router(), inputs(0)
    r.balancing_bias.requires_grad_()
    r(x, below)[1].sum().backward()
    assert r.balancing_bias.grad is None and r.down_proj.weight.grad is not None


def test_skip_never_wins_with_its_bias_of_minus_one():
    model = Zaya(tiny_config(skip_expert=True)).train()
    model(tokens(4, 50))
    for r in model.routers:
        assert r.balancing_bias[-1] == -1 and r.load[-1] == 0 and r.load.sum() == 200


@given(seeds)
def test_depth_averaging_adds_the_layer_below_scaled(seed):
    r, (x, below) = router(seed=seed), inputs(seed)
    torch.testing.assert_close(r(x, below)[2], r.down_proj(x) + r.eda_scale * below)


def test_layer_0_has_no_depth_averaging():
    r, (x, _) = router(layer=0), inputs(0)
    assert r.eda_scale is None
    assert torch.equal(r(x, None)[2], r.down_proj(x))


def test_gradients_of_the_router_are_right():
    r = router().double()
    x, below = (t.double().requires_grad_() for t in inputs(1))
    names, parameters = zip(*r.named_parameters())

    def f(x, below, *values):
        return torch.func.functional_call(r, dict(zip(names, values)), (x, below))[1:]
    assert torch.autograd.gradcheck(f, (x, below, *(p.detach().clone().requires_grad_() for p in parameters)),
                                    fast_mode=True)


# ---- load and balance ----

@given(st.integers(2, 20))
def test_load_entropy_is_1_when_even_and_0_when_collapsed(N):
    torch.testing.assert_close(load_entropy(torch.full((N,), 1 / N)), torch.tensor(1.0))
    assert load_entropy(torch.eye(N)[0]) == 0


def test_loads_count_each_token_once_and_in_training_only():
    model = tiny_model().train()
    model(tokens(2, 7))
    model.eval()(tokens(2, 7))
    model.train()(tokens(3, 5))
    assert [int(r.load.sum()) for r in model.routers] == [29] * 3


class FakeRouter:
    """A stand-in for Router with a fixed distribution of probabilities."""

    def __init__(self, skew, seed=0):
        self.n_expert, self.g = len(skew), torch.Generator().manual_seed(seed)
        self.skew, self.balancing_bias, self.load = torch.tensor(skew), torch.zeros(len(skew)), None

    def see(self, n=2000):
        probs = (torch.randn(n, self.n_expert, generator=self.g) + self.skew).softmax(-1)
        self.load = torch.bincount(choose(probs, self.balancing_bias)[0], minlength=self.n_expert)


@pytest.mark.parametrize('rule, evenness', [('pid', 0.99), ('sign', 0.95)])    # a step of fixed size oscillates
def test_the_balancer_evens_a_skewed_load_and_recovers_after_a_shift(rule, evenness):
    r = FakeRouter([3.0, 1.0, 0.0, 0.0, -1.0, -2.0])
    balancer = Balancer([r], rule, lr=1e-2)
    r.see()
    assert load_entropy(balancer.step())[0] < 0.6
    for _ in range(2):
        for _ in range(400):
            r.see()
            fractions = balancer.step()
        assert load_entropy(fractions)[0] > evenness
        r.skew = r.skew.flip(0)                                 # the preferred experts change


def test_without_a_rule_a_skewed_load_stays_skewed():
    r = FakeRouter([3.0, 0.0, 0.0])
    balancer = Balancer([r], 'none')
    for _ in range(50):
        r.see()
        fractions = balancer.step()
    assert load_entropy(fractions)[0] < 0.7 and r.balancing_bias.eq(0).all()


def test_pid_is_adamw_on_the_error_and_sign_a_fixed_step_against_it():
    for rule in ('pid', 'sign'):
        r = FakeRouter([0.0] * 4)
        balancer, b = Balancer([r], rule, lr=0.1), torch.zeros(4, requires_grad=True)
        adamw = torch.optim.AdamW([b], lr=0.1, weight_decay=0)
        for load in ([8, 0, 0, 0], [2, 2, 3, 1], [0, 1, 5, 2]):
            r.load = torch.tensor(load)
            b.grad = torch.tensor(load) / 8 - 1 / 4
            with torch.no_grad():
                adamw.step() if rule == 'pid' else b.sub_(0.1 * b.grad.sign())
            balancer.step()
            torch.testing.assert_close(r.balancing_bias, b.detach())


def test_the_balancer_moves_the_models_own_biases_and_leaves_skip_alone():
    model = tiny_model(skip_expert=True).train()
    before = copy.deepcopy([r.balancing_bias for r in model.routers])
    balancer = Balancer(model.routers, 'pid')
    model(tokens(4, 30))
    fractions = balancer.step()
    assert fractions.shape == (3, 4)
    for r, b in zip(model.routers, before):
        assert not torch.equal(r.balancing_bias[:-1], b[:-1]) and r.balancing_bias[-1] == b[-1]
        assert r.load.sum() == 0


@pytest.mark.parametrize('rule', ['pid', 'sign'])
def test_a_skipped_step_clears_the_loads_and_moves_nothing(rule):
    model = tiny_model().train()
    before = copy.deepcopy([r.balancing_bias for r in model.routers])
    model(tokens(4, 30))
    Balancer(model.routers, rule).step(torch.ones(()))
    assert all(torch.equal(r.balancing_bias, b) and r.load.sum() == 0 for r, b in zip(model.routers, before))


@pytest.mark.parametrize('rule', ['pid', 'sign'])
def test_a_step_without_tokens_moves_nothing(rule):
    model = tiny_model().train()
    before = copy.deepcopy([r.balancing_bias for r in model.routers])
    Balancer(model.routers, rule).step()
    assert all(torch.equal(r.balancing_bias, b) for r, b in zip(model.routers, before))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'pdi'"):
        Balancer([], 'pdi')
