"""On a GPU the host does not wait: a training step reads nothing, a decode step its tokens. Traced without a GPU."""
import pytest
import torch

import decode
import rsa
import sample
import train
from common import tiny_config, tiny_model, tokens
from evidence.launches import CUDA, FakeGPU, count_decoding, count_training, make_run
from optim import make_optimizers
from rsa import RSASettings
from sample import SamplingOptions
from tasks.policy import Policy

# Where the host may read a value, or wait for a copy to the device: FILE: beginning of the line of code.
PER_LOGGED_STEP = ['runtime/checkpoint.py: for i, (loss, norm) in', 'train.py: by_expert =', "train.py: 'mfu':",
                   "train.py: **{f'entropy_{layer}'", 'train.py: bar.set_postfix_str(']
PER_DECODE_STEP = ['sample.py: sampled = tokens.tolist()']
# The positions of the new tokens: in `generate`, after the tokens were read, so that nothing is queued on the GPU.
COPIES_PER_DECODE_STEP = ['cache.py: positions = torch.tensor(self.lengths']
COPIES_PER_PREFILL = ['sample.py: for i in range(len(prompts))]', 'sample.py: logits, _ = model(torch.tensor(padded',
                      'cache.py: positions = torch.tensor(self.lengths', 'cache.py: n = torch.tensor(self.n_new',
                      'model.py: last = torch.tensor(n_new', 'sample.py: logits = logits[copies]',
                      'cache.py: index = torch.tensor(rows']


def unnamed(places, *names):
    """Return the places that no name is the beginning of."""
    return [place for place in places if not any(place.startswith(name) for group in names for name in group)]


@pytest.mark.parametrize('settings', [
    dict(packed=True), dict(grad_accum=2, balancer='sign'), dict(balancer='none', grad_clip=0)])
@pytest.mark.parametrize('skip_expert', [False, True])
def test_a_training_step_reads_no_value(settings, skip_expert):
    gpu = count_training(tiny_config(skip_expert=skip_expert), batch_size=2, **settings)
    assert not gpu.reads and not gpu.copies
    assert gpu.operators['aten._fused_adamw_'] == 2 + (settings.get('balancer', 'pid') == 'pid')
    assert gpu.operators['aten._grouped_mm'] > 0


def test_training_reads_once_per_logged_step_and_copies_nothing_it_waits_for(monkeypatch):
    rows = []
    monkeypatch.setattr(train, 'log', lambda run, row: rows.append(run.step))
    monkeypatch.setattr(train, 'evaluate', lambda run: {})
    monkeypatch.setattr(train, 'save', lambda run: None)
    with FakeGPU() as gpu:
        run = make_run(gpu, tiny_config(), batch_size=2, max_steps=6, log_every=2, eval_every=100)
        train.take_steps(run)
    assert rows == [0, 2, 4, 6] and not gpu.copies
    assert not unnamed(gpu.reads, PER_LOGGED_STEP)
    assert sum(n for place, n in gpu.reads.items() if place.startswith(PER_LOGGED_STEP[0])) == 3


def test_a_decode_step_reads_no_value():
    gpu = count_decoding(tiny_config(skip_expert=True))
    assert not gpu.reads and not unnamed(gpu.copies, COPIES_PER_DECODE_STEP)


def test_generation_reads_the_tokens_once_per_decode_step():
    with FakeGPU() as gpu:
        model = gpu.model(tiny_config(), torch.bfloat16)
        step = decode.folded(model)
        gpu.reads.clear(), gpu.copies.clear()
        outputs = sample.generate(model, [[1, 2], [3, 4, 5], [1, 2]], 6, SamplingOptions(top_k=3, min_p=0.1), step=step)
    assert outputs == [[1] * 6] * 3
    assert not unnamed(gpu.reads, PER_DECODE_STEP) and gpu.reads.total() == 6
    assert not unnamed(gpu.copies, COPIES_PER_DECODE_STEP, COPIES_PER_PREFILL)
    assert gpu.copies.total() - 5 == len(COPIES_PER_PREFILL)                   # and one per decode step


def test_a_round_of_rsa_reads_only_the_tokens_of_its_decode_steps():
    with FakeGPU() as gpu:
        model = gpu.model(tiny_config(), torch.bfloat16)
        policy = Policy(model, decode.folded(model), [], list, list, lambda question, tails: sum(tails, list(question)),
                        lambda output: None, list)
        gpu.reads.clear(), gpu.copies.clear()
        rounds = rsa.markovian_rsa([[1, 2, 3]], policy.sampler(SamplingOptions()), policy,
                                   RSASettings(population=4, candidates=2, rounds=1, budget=5, tail=3))
    assert [r.tokens for r in rounds[0]] == [20, 20]
    assert not unnamed(gpu.reads, PER_DECODE_STEP) and gpu.reads.total() == 10
    assert not unnamed(gpu.copies, COPIES_PER_DECODE_STEP, COPIES_PER_PREFILL)


@pytest.mark.parametrize('read', [
    lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: x.cpu(), lambda x: float(x[0]),
    lambda x: f'{x[0]:.3f}', lambda x: x.to('cpu')])
def test_the_trace_finds_reads(read):
    with FakeGPU() as gpu:
        read(torch.zeros(3, device=CUDA))
    assert gpu.reads.total() == 1


@pytest.mark.parametrize('read', [
    lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.add(x, x, alpha=x[0]), lambda x: x.unique(),
    lambda x: x.repeat_interleave(x.long())])
def test_other_operators_that_need_a_value_raise(read):
    with FakeGPU(), pytest.raises(RuntimeError):
        read(torch.zeros(3, device=CUDA))


def test_the_trace_finds_copies_that_the_host_waits_for():
    with FakeGPU() as gpu:
        x = torch.tensor([1.0, 2.0], device=CUDA)
        x[[0, 1]], torch.zeros(3).to(CUDA), torch.zeros(3).to(CUDA, non_blocking=True)
        assert gpu.copies.total() == 4
        torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
        assert gpu.copies.total() == 4


# ---- what the host no longer reads: a step that is not finite ----

def test_found_inf_leaves_weights_and_state_of_all_optimizers_as_they_are():
    """As on a GPU: the optimizers get the flag, and are called in every step."""
    models = [tiny_model(seed=1, n_layer=2).train() for _ in range(2)]
    optimizers = [make_optimizers(model, 1e-2) for model in models]
    for step, bad in enumerate([True, False, False, True, True, False]):
        for model, both, skips in zip(models, optimizers, (False, True)):
            model(tokens(2, 8, seed=step), tokens(2, 8, seed=step + 1))[1].backward()
            for optimizer in both:
                if skips:
                    optimizer.found_inf = torch.tensor(float(bad))
                    for p in model.parameters() if bad else ():
                        p.grad.fill_(float('nan'))
                if skips or not bad:                            # the reference is not called in a bad step
                    optimizer.step()
            model.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for one, other in zip(*optimizers):
        for p, q in zip(*(o.state.values() for o in (one, other))):
            assert p.keys() == q.keys()
            for name in p:
                torch.testing.assert_close(p[name], q[name], rtol=1e-5, atol=1e-7)
