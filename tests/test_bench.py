"""bench.py runs, compares equal work, and rejects what it cannot do. Its figures are not tested."""
import itertools

import pytest
import torch

import bench
from common import run_script
from model import Zaya
from router import Balancer, load_entropy

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """Measure memory in this process: a fresh one takes seconds to start."""
    monkeypatch.setattr(bench, 'memory', bench.peak_memory)


def test_quick_prints_every_row_of_the_comparison(capsys):
    bench.side_by_side(CPU, torch.float32, bench.BenchConfig(quick=True, repeats=1))
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert [row[0][2:] for row in rows[2:]] == ['training step, AdamW', 'training step, own optimizers', 'prefill',
                                                'prefill', 'decode', 'decode']
    assert all(float(row[4]) > 0 for row in rows[2:])


def test_models_that_disagree_are_not_compared(monkeypatch):
    forward = Zaya.forward
    monkeypatch.setattr(Zaya, 'forward', lambda self, idx: (forward(self, idx)[0] * 1.01, None))
    with pytest.raises(ValueError, match='do not agree'):
        bench.make_pair(bench.TINY, CPU, seed=0)


@torch.no_grad()
@pytest.mark.parametrize('n_expert', [4, 16])
def test_measured_routers_use_all_experts(n_expert):
    config = bench.replace(bench.SMALL, n_expert=n_expert, n_embd=64)
    model, _ = bench.make_pair(config, CPU, seed=1)
    model.train()
    Balancer(model.routers).step(torch.ones(()))                                  # reset the counts
    model(torch.randint(512, (8, 64)))
    assert load_entropy(Balancer(model.routers).step(torch.ones(()))).min() > 0.8


def test_decoding_does_the_same_work_on_both_sides():
    ours, theirs = (bench.decoding(model, 2, 4, 8)() for model in bench.make_pair(bench.TINY, CPU, seed=0))
    assert ours == theirs[:, 4:].tolist()


def test_a_training_step_does_the_same_work_every_time_and_has_gradients():
    model = bench.zaya(bench.TINY, CPU, 0)
    before = [p.detach().clone() for p in model.parameters()]
    seen = []
    model.embedding.weight.register_hook(lambda g: seen.append(g.norm().item()))
    step = bench.training(model, 2, 8)
    for _ in range(2):
        bench.timed(step, CPU)
    assert len(seen) == 2 and seen[0] > 0 and seen[0] == pytest.approx(seen[1], rel=1e-3)
    assert all(torch.allclose(a, p, atol=1e-5) for a, p in zip(before, model.parameters()))


def test_a_speedrun_reports_the_median_seconds_and_the_last_val_loss_of_whole_processes(monkeypatch, capsys):
    took = itertools.count(1)

    def fake(words):
        if words.startswith('evaluate.py'):
            return 0.0, f'scores of {words[-3:]}'
        return float(next(took)), 'step 0: val loss 8.3\nstep 2: val loss 5.0\n'
    monkeypatch.setattr(bench, 'run_program', fake)
    bench.speedrun(repeats=3)
    out = capsys.readouterr().out
    n = len(bench.RUNS)
    assert out.splitlines()[3:3 + n] == [f'| {name} | {i + n} | {i}, {i + n}, {i + 2 * n} | 5.0 |'
                                         for i, name in enumerate(bench.RUNS, 1)]
    assert f'scores of {n - 1}-2' in out                        # of the last run of the last configuration


def test_a_program_that_fails_ends_the_speedrun_with_its_message():
    with pytest.raises(ValueError, match='train.py config/nothing.py: .*config/nothing.py'):
        bench.run_program('train.py config/nothing.py')


@pytest.mark.parametrize('argument', ['--repeats=0', '--dtype=int8', '--repeat=3', '--device=nowhere'])
def test_bad_arguments_get_one_line(monkeypatch, capsys, argument):
    _, message = run_script(monkeypatch, capsys, 'bench.py', argument)
    assert message


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__('sys').modules, 'transformers', None)
    _, message = run_script(monkeypatch, capsys, 'bench.py', '--quick=True')
    assert 'pip install transformers' in message
