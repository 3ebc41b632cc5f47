"""Training: it learns, resumes bit for bit after any kill, and reports each error in one line."""
import contextlib
import csv
import dataclasses
import math
import operator
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import configurator
import train
from common import ENV, HAS_COMPILER, ROOT, TINY_RUN, run_script, tiny_model, tokens
from runtime.checkpoint import load_checkpoint, save_checkpoint, write_log
from data.loader import TokenLoader
from data.prepare import prepare
from model import Zaya, ZayaConfig
from router import load_entropy
from runtime.device import pick_dtype
from train import TrainConfig, lr_at


def flags(dataset, out_dir, **changes):
    changes = dict(dataset=dataset, out_dir=out_dir) | changes
    return TINY_RUN + [f'--{key}={value}' for key, value in changes.items()]


def run(dataset, out_dir, **changes):
    return train.train(*configurator.read(flags(dataset, out_dir, **changes), TrainConfig, ZayaConfig))


def log(out_dir):
    """Return log.csv as a list of dicts of strings, without the speed."""
    with open(out_dir / 'log.csv', newline='') as file:
        return [{key: value for key, value in row.items() if key != 'tokens_per_s'} for row in csv.DictReader(file)]


def losses(out_dir):
    return [float(row['loss']) for row in log(out_dir) if row['loss']]


def assert_same_bits(a, b):
    """Two nested states are equal, tensors bit for bit (NaN equals NaN)."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_same_bits(left, right)
    else:
        assert a == b


def assert_same_run(a, b):
    """The logs are equal as strings, and the last checkpoints except for the folder's name."""
    assert log(a) == log(b)
    a, b = load_checkpoint(a), load_checkpoint(b)
    a['config'].pop('out_dir'), b['config'].pop('out_dir')
    assert_same_bits(a, b)


def assert_equivalent_runs(a, b):
    """Equal up to the rounding of sums. Loads are counts, so the balancing biases are exactly equal."""
    for one, two in zip(log(a), log(b), strict=True):
        for key in one.keys() - {'val_loss', 'residual_0', 'residual_1'}:       # evaluated on other data
            assert float(one[key] or 0) == pytest.approx(float(two[key] or 0), rel=1e-4), key
    one, two = load_checkpoint(a)['model'], load_checkpoint(b)['model']
    for name in one:
        if 'balancing_bias' in name:
            assert one[name].equal(two[name]) and one[name].any(), name
        else:
            assert (one[name] - two[name]).abs().max() < 1e-3, name


@pytest.fixture(scope='session')
def one_batch(tmp_path_factory):
    """A dataset whose training split is a single batch of TINY_RUN, used in every step."""
    folder = tmp_path_factory.mktemp('one_batch')
    prepare([('a', bytes(range(32, 98)))], folder, 262)
    assert TokenLoader(folder, 'train', 4, 16, 0).n_windows == 4
    return folder


# ---- learning ----

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_single_batch_is_memorized(one_batch, tmp_path, dtype):
    run(one_batch, tmp_path, max_steps=60, lr=0.02, dtype=dtype, eval_every=60)
    first, *_, last = losses(tmp_path)
    assert abs(first - math.log(262)) < 0.5 and last < 0.5
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in load_checkpoint(tmp_path)['model'].values())


def test_bfloat16_computes_in_bfloat16(dataset, tmp_path):
    """The losses are close to those of float32, but not equal."""
    for dtype in 'float32', 'bfloat16':
        run(dataset, tmp_path / dtype, dtype=dtype)
    full, half = losses(tmp_path / 'float32'), losses(tmp_path / 'bfloat16')
    assert full != half and max(abs(a - b) for a, b in zip(full, half)) < 0.05


def test_a_resumed_run_keeps_its_dtype(dataset, tmp_path):
    """'auto' measures once per run: with another dtype, a resumed run would not be bit for bit the same."""
    run(dataset, tmp_path, max_steps=2, dtype='bfloat16')
    run(dataset, tmp_path, max_steps=3, dtype='auto')
    assert load_checkpoint(tmp_path)['config']['dtype'] == 'bfloat16'


@pytest.mark.parametrize('precision', ['highest', 'high', 'medium'])
def test_pick_dtype_restores_the_matmul_precision(precision):
    torch.set_float32_matmul_precision(precision)
    pick_dtype('auto', torch.device('cpu'))
    assert torch.get_float32_matmul_precision() == precision


def test_same_seed_gives_the_same_run_and_another_seed_another(dataset, tmp_path):
    for name, seed in ('a', 1), ('b', 1), ('c', 2):
        run(dataset, tmp_path / name, seed=seed)
    assert_same_run(tmp_path / 'a', tmp_path / 'b')
    assert losses(tmp_path / 'a') != losses(tmp_path / 'c')


def test_two_micro_batches_equal_one_of_twice_the_size(dataset, tmp_path):
    run(dataset, tmp_path / 'one', batch_size=4, balancer_lr=0.01)
    run(dataset, tmp_path / 'two', batch_size=2, grad_accum=2, balancer_lr=0.01)
    assert_equivalent_runs(tmp_path / 'one', tmp_path / 'two')


class Split:
    """A loader of micro-batches split from given windows and targets."""
    def __init__(self, x, y, sizes):
        self.batches = [(*parts, None) for parts in zip(x.split(sizes), y.split(sizes))]

    def batch(self, index):
        return self.batches[index]


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=8, max_size=8), st.data())
def test_the_loss_is_the_mean_over_scored_targets_for_any_split(scored, data):
    """8 windows are split into micro-batches, and these over processes; some or all may have no target."""
    cuts = sorted(data.draw(st.sets(st.integers(1, 7), max_size=7)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, 8])]
    world = data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if len(sizes) % n == 0]))
    x, y = tokens(8, 6, seed=1), tokens(8, 6, seed=2)
    y[~torch.tensor(scored)] = -1

    def step(sizes, world):
        """Return the loss and the gradient of train_step, run for one rank after the other."""
        config, total, loss, grads = TrainConfig(grad_accum=len(sizes), grad_clip=0), (y >= 0).sum(), 0, []
        reduce = lambda t: t.copy_(total) if t.dtype == torch.int64 else t      # the targets of all ranks
        for rank in range(world):
            model = tiny_model(seed=1, n_layer=1)
            model.no_sync = contextlib.nullcontext                              # DDP's
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train.dist, 'all_reduce', reduce)
                values, _ = train.train_step(train.Run(
                    config, model, model, [], SimpleNamespace(step=lambda found_inf: None), Split(x, y, sizes),
                    rank=rank, world=world))
            assert values.isfinite().all()
            loss += values[0].item()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return loss, torch.stack(grads).mean(0)                                 # DDP averages over ranks
    loss, grad = step(sizes, world)
    whole, whole_grad = step([8], 1)
    assert loss == pytest.approx(whole, abs=1e-5) and (whole > 0) == bool((y >= 0).any())
    torch.testing.assert_close(grad, whole_grad, atol=1e-5, rtol=1e-4)


def test_clipping_bounds_the_gradient(dataset, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, largest):
        parameters = list(parameters)
        before = clip(parameters, largest)
        norms.append((before.item(), math.sqrt(sum(p.grad.square().sum().item() for p in parameters))))
        return before
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', spy)
    run(dataset, tmp_path / 'clipped', grad_clip=0.5)
    assert all(before > 0.5 and after == pytest.approx(0.5, rel=1e-3) for before, after in norms)
    assert [before for before, _ in norms] == [float(row['grad_norm']) for row in log(tmp_path / 'clipped')[1:]]
    norms.clear()
    run(dataset, tmp_path / 'free', grad_clip=0)
    assert norms and all(after == pytest.approx(before, rel=1e-5) for before, after in norms)


schedules = st.builds(TrainConfig, max_steps=st.integers(1, 300), warmup_steps=st.integers(0, 300),
                      decay_fraction=st.floats(0, 1), lr=st.just(1e-2), min_lr=st.floats(0, 1e-2))


@given(schedules)
def test_learning_rate_is_continuous_and_ends_near_min_lr(c):
    rates = [lr_at(step, c) for step in range(c.max_steps + 1)]
    assert all(0 < rate <= c.lr * (1 + 1e-9) for rate in rates[:-1])
    decay = max(1, c.decay_fraction * c.max_steps)
    slope = max(c.lr / max(1, c.warmup_steps), (c.lr - c.min_lr) / decay)
    assert all(abs(a - b) <= slope * (1 + 1e-6) + 1e-12 for a, b in zip(rates, rates[1:]))
    if c.warmup_steps < c.max_steps and c.decay_fraction:
        assert rates[-1] == pytest.approx(c.min_lr)     # one past the last step


def test_learning_rate_warms_up_stays_flat_and_decays():
    c = TrainConfig(lr=1.0, min_lr=0.1, max_steps=100, warmup_steps=10, decay_fraction=0.5)
    assert [lr_at(step, c) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert [lr_at(step, c) for step in range(10, 51)] == [1.0] * 41
    assert lr_at(75, c) == pytest.approx(0.55) and lr_at(99, c) == pytest.approx(0.1 + 0.9 / 50)


def test_the_scheduled_rate_reaches_the_optimizers(one_batch, tmp_path):
    """A rate of zero keeps the initial weights; the balancing biases have a rate of their own."""
    run(one_batch, tmp_path, lr=0, min_lr=0, seed=3)
    state = load_checkpoint(tmp_path)
    torch.manual_seed(3)
    fresh = Zaya(ZayaConfig(**state['model_config']))
    assert all(p.equal(state['model'][name]) for name, p in fresh.named_parameters())
    assert any(state['model'][name].any() for name, _ in fresh.named_buffers() if name in state['model'])


# ---- the log ----

def test_log_has_all_columns_in_the_right_steps(dataset, tmp_path):
    run(dataset, tmp_path, max_steps=6, eval_every=3, log_every=2)
    rows = log(tmp_path)
    layers = [f'{kind}_{layer}' for kind in ('entropy', 'residual') for layer in range(2)]
    experts = [f'{kind}_{layer}_{e}' for kind in ('load', 'bias') for layer in range(2) for e in range(4)]
    assert list(rows[0]) == ['step', 'tokens', 'loss', 'val_loss', 'grad_norm', 'lr', 'mfu', 'entropy', *layers,
                             *experts]
    assert [row['step'] for row in rows] == ['0', '2', '3', '4', '6']
    for row in rows:
        evaluated, trained = row['step'] in '036', row['step'] != '0'
        for key in 'val_loss', 'residual_0', 'residual_1':
            assert bool(row[key]) == evaluated, key
        for key in 'loss', 'grad_norm', 'lr', 'entropy', 'entropy_0', 'entropy_1', *experts:
            assert bool(row[key]) == trained, key
        assert int(row['tokens']) == int(row['step']) * 64
        if trained:
            assert 0 <= float(row['entropy']) <= 1
            mean = (float(row['entropy_0']) + float(row['entropy_1'])) / 2
            assert float(row['entropy']) == pytest.approx(mean, rel=1e-5)
            loads = torch.tensor([[float(row[f'load_{layer}_{e}']) for e in range(4)] for layer in range(2)])
            assert load_entropy(loads).tolist() == pytest.approx([float(row['entropy_0']), float(row['entropy_1'])])
    biases = load_checkpoint(tmp_path)['model']
    assert [float(rows[-1][f'bias_1_{e}']) for e in range(4)] == biases['layers.1.moe.router.balancing_bias'].tolist()


def test_logged_val_loss_and_residual_equal_those_of_the_saved_weights(dataset, tmp_path):
    run(dataset, tmp_path, eval_batches=3)
    state = load_checkpoint(tmp_path)
    model = Zaya(ZayaConfig(**state['model_config']))
    model.load_state_dict(state['model'])
    loader = TokenLoader(dataset, 'val', 4, 16, 0)
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    with torch.no_grad():
        values = [model(*loader.batch(i))[1].item() for i in range(3)]
    scored = [(loader.batch(i)[1] >= 0).sum().item() for i in range(3)]
    last, mean = log(tmp_path)[-1], sum(map(operator.mul, values, scored)) / sum(scored)
    assert float(last['val_loss']) == pytest.approx(mean, rel=1e-5) and min(scored) < max(scored)
    for layer in range(2):
        rms = torch.cat(outputs[layer::2]).square().mean().sqrt().item()
        assert float(last[f'residual_{layer}']) == pytest.approx(rms, rel=1e-5)


def test_a_log_cut_anywhere_in_its_last_line_keeps_the_lines_before(tmp_path):
    path, columns = tmp_path / 'log.csv', ['step', 'loss']
    rows = [{'step': step, 'loss': f'0.{step}5'} for step in (8, 9, 10, 111)]
    write_log(tmp_path, None, columns, keep_until=-1)
    for row in rows:
        write_log(tmp_path, row, columns)
    whole = path.read_bytes()
    start = whole.index(b'\n111') + 1
    for size in range(start, len(whole) + 1):
        path.write_bytes(whole[:size])
        write_log(tmp_path, None, columns, keep_until=10)
        assert path.read_bytes() == whole[:start], size
        write_log(tmp_path, rows[3], columns)
        assert path.read_bytes() == whole, size
    write_log(tmp_path, None, columns, keep_until=9)
    assert [row['step'] for row in log(tmp_path)] == ['8', '9']


def test_a_kill_while_the_log_is_rewritten_leaves_the_old_one(tmp_path, monkeypatch):
    path, columns = tmp_path / 'log.csv', ['step', 'loss']
    write_log(tmp_path, None, columns, keep_until=-1)
    for step in range(5):
        write_log(tmp_path, {'step': step, 'loss': 1}, columns)
    whole = path.read_bytes()

    class Killed(BaseException):
        pass

    def kill(*paths):
        raise Killed
    monkeypatch.setattr(os, 'replace', kill)
    with pytest.raises(Killed):
        write_log(tmp_path, None, columns, keep_until=2)
    assert path.read_bytes() == whole


# ---- resuming ----

KILLED_RUN = dict(max_steps=24, eval_every=4, checkpoint_every=3)


@pytest.fixture(scope='module')
def uninterrupted(dataset, tmp_path_factory):
    """The folder of an uninterrupted run, made by a subprocess as the killed ones are."""
    out_dir = tmp_path_factory.mktemp('uninterrupted')
    subprocess.run([sys.executable, 'train.py', *flags(dataset, out_dir, **KILLED_RUN)], cwd=ROOT, env=ENV, check=True,
                   capture_output=True)
    assert [int(row['step']) for row in log(out_dir)] == list(range(25))        # each step once
    return out_dir


@pytest.mark.parametrize('seed', [0, 1])
def test_a_run_killed_at_random_lines_equals_an_uninterrupted_one(dataset, uninterrupted, tmp_path, seed):
    arguments = flags(dataset, tmp_path, **KILLED_RUN)
    out = subprocess.run([sys.executable, ROOT / 'tests/crash.py', 'train', str(seed), *arguments], env=ENV,
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout.split()[-1]) >= 5             # kills
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_killed_from_outside_equals_an_uninterrupted_one(dataset, uninterrupted, tmp_path):
    """Three processes: one gets Ctrl-C and reports it, one is killed, the last one completes the run."""
    for step, stop in ('step 4:', signal.SIGINT), ('step 12:', signal.SIGKILL), (None, None):
        child = subprocess.Popen([sys.executable, 'train.py', *flags(dataset, tmp_path, **KILLED_RUN)], cwd=ROOT,
                                 env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 # processes started in the background by a shell ignore SIGINT
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        if stop:
            assert any(line.startswith(step) for line in child.stdout)
            child.send_signal(stop)
        _, err = child.communicate()
        assert child.returncode == {signal.SIGINT: 1, signal.SIGKILL: -signal.SIGKILL, None: 0}[stop]
        assert 'Traceback' not in err and ('train.py: stopped' in err) == (stop == signal.SIGINT)
    assert_same_run(tmp_path, uninterrupted)


def test_a_save_killed_at_any_line_leaves_a_complete_checkpoint(tmp_path):
    """Also inside torch.save; with zero, one or two existing checkpoints, and with a damaged one."""
    out = subprocess.run([sys.executable, ROOT / 'tests/crash.py', 'save', tmp_path / 'run'], env=ENV,
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout.split()[-1]) > 100            # kills


def test_a_checkpoint_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """Against a power cut: first all bytes, then fsync of this file, then the renames."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (calls.append(os.fstat(fd)), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (calls.append(Path(b).name), replace(a, b)))
    for names in ['ckpt.pt'], ['ckpt_previous.pt', 'ckpt.pt']:
        save_checkpoint(tmp_path, {'weights': torch.zeros(10_000)})
        synced, *renamed = calls
        written = (tmp_path / 'ckpt.pt').stat()
        assert renamed == names and (synced.st_ino, synced.st_size) == (written.st_ino, written.st_size)
        calls.clear()


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(dataset, tmp_path, capsys):
    run(dataset, tmp_path / 'whole')
    run(dataset, tmp_path / 'parts', max_steps=2, decay_fraction=0)         # the other does not decay before step 2
    run(dataset, tmp_path / 'parts')
    assert 'continuing' in capsys.readouterr().out
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')


def test_changed_settings_are_reported_and_take_effect(dataset, tmp_path, monkeypatch, capsys):
    run(dataset, tmp_path, max_steps=2, lr=0.003)
    made = {}
    for name in 'make_optimizers', 'Balancer':
        def spy(*args, name=name, make=getattr(train, name)):
            made[name] = make(*args)
            return made[name]
        monkeypatch.setattr(train, name, spy)
    capsys.readouterr()
    run(dataset, tmp_path, max_steps=4, weight_decay=0.3, balancer_lr=0.5, lr=0.01, min_lr=0.01)
    out = capsys.readouterr().out
    assert 'at step 2 of 4; changed: max_steps 2 -> 4, lr 0.003 -> 0.01' in out and 'weight_decay 0.1 -> 0.3' in out
    muon, adamw = made['make_optimizers']
    assert [group['weight_decay'] for group in muon.param_groups + adamw.param_groups] == [0.3, 0.3, 0.0]
    for group in muon.param_groups + adamw.param_groups:
        assert group['lr'] == 0.01 * group['lr_scale']
    assert made['Balancer'].adamw.param_groups[0]['lr'] == 0.5
    steps = [state['step'] for optimizer in (adamw, made['Balancer'].adamw) for state in optimizer.state.values()]
    assert steps and set(map(int, steps)) == {4}        # the moments were kept


def test_a_run_without_a_checkpoint_restarts_with_a_new_log(dataset, tmp_path):
    for _ in range(2):
        run(dataset, tmp_path, max_steps=2)
        assert [row['step'] for row in log(tmp_path)] == ['0', '1', '2']
        (tmp_path / 'ckpt.pt').unlink()


def test_a_run_keeps_its_tokenizer(dataset, one_batch, tmp_path):
    run(dataset, tmp_path / 'a')
    before = (tmp_path / 'a' / 'bpe.json').read_bytes()
    other = tmp_path / 'other'
    words = [str(n) for n in range(100, 200)]                  # another text, the same vocabulary size
    prepare([(str(i), ' '.join(words[i:]).encode() * 3) for i in range(9)], other, 300)
    for arguments in dict(out_dir=tmp_path / 'a'), dict(out_dir=tmp_path / 'b', init_from=tmp_path / 'a'):
        with pytest.raises(ValueError, match='another tokenizer'):
            run(other, **arguments)
    assert (tmp_path / 'a' / 'bpe.json').read_bytes() == before


def test_a_finished_run_is_unchanged(dataset, tmp_path):
    run(dataset, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(dataset, tmp_path) == {}
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


# ---- damaged checkpoints ----

def flip(path, where):
    data = bytearray(path.read_bytes())
    for i in range(8):
        data[int(where * len(data)) + i] ^= 0xff
    path.write_bytes(data)


DAMAGE = {
    'truncated': lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    'a few bytes short': lambda path: os.truncate(path, path.stat().st_size - 10),
    'empty': lambda path: os.truncate(path, 0),
    'flipped at the front': lambda path: flip(path, 0.1),
    'flipped in the middle': lambda path: flip(path, 0.5),
    'flipped in the directory at the end': lambda path: flip(path, 0.99),
    'text': lambda path: path.write_text('no checkpoint'),
    'another zip': lambda path: zipfile.ZipFile(path, 'w').close(),
}


@pytest.fixture(scope='module')
def finished(dataset, tmp_path_factory):
    """The folder of a run of 4 steps, with checkpoints of steps 2 and 4."""
    run(dataset, out_dir := tmp_path_factory.mktemp('finished'))
    return out_dir


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(finished, tmp_path, capsys, kind):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    DAMAGE[kind](tmp_path / 'ckpt.pt')
    assert load_checkpoint(tmp_path)['step'] == 2
    err = capsys.readouterr().err
    assert err.startswith(f'{tmp_path / "ckpt.pt"} is damaged (') and err.count('\n') == 1
    DAMAGE[kind](tmp_path / 'ckpt_previous.pt')
    with pytest.raises(ValueError, match='every checkpoint is damaged') as error:
        load_checkpoint(tmp_path)
    assert '\n' not in str(error.value)


def test_a_run_with_a_damaged_checkpoint_ends_like_an_undamaged_one(dataset, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    DAMAGE['flipped in the middle'](tmp_path / 'ckpt.pt')
    _, message = run_script(monkeypatch, capsys, 'train.py', *flags(dataset, tmp_path))
    assert message is None
    assert_same_run(tmp_path, finished)
    for name in 'ckpt.pt', 'ckpt_previous.pt':
        DAMAGE['truncated'](tmp_path / name)
    _, message = run_script(monkeypatch, capsys, 'train.py', *flags(dataset, tmp_path))
    assert 'every checkpoint is damaged' in message


@given(st.data())
def test_a_flipped_bit_is_detected_or_has_no_effect(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / 'flipped'
    folder.mkdir(exist_ok=True)
    state = {'step': 3, 'model': {'a': torch.arange(50.), 'b': torch.arange(7)},
             'model_config': dataclasses.asdict(ZayaConfig(vocab_size=9, init_std=0.1))}
    (folder / 'ckpt.pt').unlink(missing_ok=True)
    save_checkpoint(folder, state)
    content = bytearray((folder / 'ckpt.pt').read_bytes())
    for _ in range(20):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        (folder / 'ckpt.pt').write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            assert_same_bits(load_checkpoint(folder), state)
        except ValueError as error:
            assert 'damaged' in str(error)


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f'touch {self.canary}',)


@pytest.mark.parametrize('write', [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_checkpoint_is_not_run(dataset, tmp_path, monkeypatch, capsys, write):
    write({'model': Malicious(tmp_path / 'canary')}, tmp_path / 'ckpt.pt')
    for script in 'train.py', 'sample.py':
        arguments = flags(dataset, tmp_path) if script == 'train.py' else [f'--ckpt={tmp_path}', '--prompt=a']
        _, message = run_script(monkeypatch, capsys, script, *arguments)
        assert 'every checkpoint is damaged' in message
    with pytest.raises(ValueError):
        load_checkpoint(tmp_path)
    err = capsys.readouterr().err                       # torch's own message advises to run the code
    assert err.count('\n') == 1 and 'weights_only' not in err
    assert not (tmp_path / 'canary').exists()


@pytest.mark.parametrize('thing', [{'model': {}, 'iter_num': 3}, [1], torch.zeros(3)])
def test_a_checkpoint_of_another_program_is_refused_and_unchanged(dataset, tmp_path, monkeypatch, capsys, thing):
    torch.save(thing, tmp_path / 'ckpt.pt')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    for script, arguments in (('train.py', flags(dataset, tmp_path)),
                              ('train.py', flags(dataset, tmp_path / 'new', init_from=tmp_path)),
                              ('sample.py', [f'--ckpt={tmp_path}', '--prompt=a'])):
        _, message = run_script(monkeypatch, capsys, script, *arguments)
        assert 'every checkpoint is damaged' in message
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


# ---- a full disk ----

@pytest.fixture
def limit_files():
    """limit_files(size): writing more than size bytes to a file fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_to_a_full_disk_changes_nothing(tmp_path, limit_files):
    state = {'weights': [torch.zeros(n) for n in (10, 10_000, 3, 50_000)]}
    save_checkpoint(tmp_path, state | {'step': 1})
    save_checkpoint(tmp_path, state | {'step': 2})
    size = (tmp_path / 'ckpt.pt').stat().st_size
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for limit in 0, 100, 5000, 41_000, 50_000, size - 1000, size - 1:       # torch raises different errors
        limit_files(limit)
        with pytest.raises(OSError) as error:
            save_checkpoint(tmp_path, state | {'step': 3})
        limit_files(resource.RLIM_INFINITY)
        assert str(error.value) == f'{tmp_path / "ckpt.tmp"}: cannot be written (File too large)'
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_run_stopped_by_a_full_disk_can_be_resumed(dataset, tmp_path):
    whole, full = tmp_path / 'whole', tmp_path / 'full'
    run(dataset, whole, max_steps=6)
    run(dataset, full, max_steps=4, lr=0.003)
    checkpoint = (full / 'ckpt.pt').read_bytes()
    small_disk = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # only the log fits
    out = subprocess.run([sys.executable, 'train.py', *flags(dataset, full, max_steps=6)], cwd=ROOT, env=ENV,
                         preexec_fn=small_disk, capture_output=True, text=True)
    assert out.returncode == 1 and 'Traceback' not in out.stderr
    assert out.stderr.splitlines()[-1] == f'train.py: {full / "ckpt.tmp"}: cannot be written (File too large)'
    assert sorted(path.name for path in full.iterdir()) == [
        'bpe.json', 'ckpt.pt', 'ckpt_previous.pt', 'lock', 'log.csv']
    assert (full / 'ckpt.pt').read_bytes() == checkpoint
    run(dataset, full, max_steps=6)
    assert log(full)[-1]['step'] == '6'


# ---- non-finite steps ----

@pytest.fixture
def poison(monkeypatch):
    """poison(steps, what, value): in these steps (from 0) the loss or the gradient is NaN or infinite. Returns a list
    that holds the model and the optimizers once the run is set up."""
    made = []

    def poison(steps, what, value):
        def make_optimizers(model, *args):
            made[:] = [model, make(model, *args)]
            step = -1

            def count(module, args, out):
                nonlocal step
                step += module.training
                return (out[0], out[1] + value) if what == 'loss' and module.training and step in steps else out
            model.register_forward_hook(count)
            if what == 'gradient':
                model.layers[0].attn.q_proj.weight.register_hook(lambda g: g * value if step in steps else g)
            return made[1]
        make = train.make_optimizers
        monkeypatch.setattr(train, 'make_optimizers', make_optimizers)
        return made
    return poison


@pytest.mark.parametrize('what', ['loss', 'gradient'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_non_finite_step_changes_nothing(dataset, tmp_path, poison, capsys, what, value):
    made = poison({0, 1}, what, value)
    with pytest.raises(ValueError, match='2 steps in a row'):      # all steps: an error, not a finished run
        run(dataset, tmp_path, max_steps=2)
    model, optimizers = made
    torch.manual_seed(0)
    assert_same_bits(dict(model.state_dict()), dict(Zaya(model.config).state_dict()))       # with balancing biases
    assert not any(optimizer.state for optimizer in optimizers)
    out = capsys.readouterr().out
    assert 'step 1: loss ' in out and 'step 2: loss ' in out and out.count('not finite, step skipped') == 2
    assert load_checkpoint(tmp_path) is None            # no finite step


def test_every_skipped_step_is_reported_when_the_next_row_is_logged(dataset, tmp_path, poison, capsys):
    poison({1, 2, 5}, 'loss', math.nan)
    run(dataset, tmp_path, max_steps=8, log_every=4, eval_every=100, checkpoint_every=100)
    out = capsys.readouterr().out
    assert [f'step {i}: loss nan' in out for i in range(1, 9)] == [i in (2, 3, 6) for i in range(1, 9)]


def test_ten_bad_steps_between_two_rows_of_the_log_stop_the_run_too(dataset, tmp_path, poison):
    poison(range(3, 13), 'gradient', math.nan)          # finite again before the row
    with pytest.raises(ValueError, match='10 steps in a row'):
        run(dataset, tmp_path, max_steps=100, log_every=20, eval_every=100, checkpoint_every=3)
    assert load_checkpoint(tmp_path)['step'] == 3


def test_training_continues_after_nine_skipped_steps(dataset, tmp_path, poison):
    poison(range(1, 10), 'gradient', math.nan)
    run(dataset, tmp_path, max_steps=30, lr=0.01, checkpoint_every=1, eval_every=100)
    values = losses(tmp_path)
    assert len(values) == 30 and values[-1] < values[0] - 0.5
    assert load_checkpoint(tmp_path)['step'] == 30


def test_a_run_whose_last_step_was_skipped_saves_its_last_good_state(dataset, tmp_path, poison):
    poison({3}, 'loss', math.nan)
    run(dataset, tmp_path / 'skipped', checkpoint_every=10)
    run(dataset, tmp_path / 'three', max_steps=3, decay_fraction=0)         # neither run decays before step 3
    one, other = load_checkpoint(tmp_path / 'skipped'), load_checkpoint(tmp_path / 'three')
    assert one['step'] == 4
    assert_same_bits(one['model'], other['model'])


def test_non_finite_weights_are_not_saved(dataset, tmp_path, monkeypatch):
    make = train.make_optimizers

    def poisoned(model, *args):
        made, step = make(model, *args), train.Balancer.step

        def spoil(balancer, found_inf):                         # after the optimizers: the loss was finite
            model.norm.weight.data[3] = math.nan
            return step(balancer, found_inf)
        monkeypatch.setattr(train.Balancer, 'step', spoil)
        return made
    monkeypatch.setattr(train, 'make_optimizers', poisoned)
    with pytest.raises(ValueError, match='norm.weight is not finite after step 1'):
        run(dataset, tmp_path, max_steps=1)
    assert load_checkpoint(tmp_path) is None


def test_ten_bad_steps_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(dataset, tmp_path, poison):
    poison({2, *range(4, 100)}, 'loss', math.nan)
    with pytest.raises(ValueError, match='10 steps in a row'):
        run(dataset, tmp_path, max_steps=100, checkpoint_every=1, eval_every=100)
    assert log(tmp_path)[-1]['step'] == '13'            # the 14th step is the tenth bad one in a row
    state = load_checkpoint(tmp_path)
    assert state['step'] == 4 and all(p.isfinite().all() for p in state['model'].values())


# ---- several processes, torch.compile ----

def test_two_processes_equal_one_with_the_same_grad_accum(dataset, tmp_path):
    changes = dict(grad_accum=4, balancer_lr=0.01, max_steps=5)
    run(dataset, tmp_path / 'one', **changes)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    out = subprocess.run([*torchrun, 'train.py', *flags(dataset, tmp_path / 'two', **changes)], cwd=ROOT, env=ENV,
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count('parameters') == 1 and 'cpu in float32 x 2' in out.stdout       # only rank 0 prints
    assert_equivalent_runs(tmp_path / 'one', tmp_path / 'two')


def test_accumulation_must_be_a_multiple_of_the_processes(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train.dist, 'init_process_group', lambda backend: None)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='multiple of the 2 processes'):
        run(dataset, tmp_path, grad_accum=3)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason='torch.compile needs a C++ compiler on a CPU')
def test_compiled_training_equals_eager_training(dataset, tmp_path):
    for compile in False, True:
        run(dataset, tmp_path / str(compile), compile=compile, max_steps=3, n_layer=1, n_expert=2)
    assert losses(tmp_path / 'True') == pytest.approx(losses(tmp_path / 'False'), rel=1e-4)
    names = [load_checkpoint(tmp_path / name)['model'].keys() for name in ('True', 'False')]
    assert names[0] == names[1]                         # each run can resume from the other's checkpoint


# ---- invalid input ----

BAD_SETTINGS = {
    '--lr=-1': '--lr=-1: lr is -1.0, it must lie between 0 and 1e+09',
    '--lr=1e999': '--lr=1e999: lr is inf',
    '--lr=1e300': 'lr is 1e+300',
    '--lr=fast': "lr must be float, got 'fast'",
    '--learning_rate=1': "unknown key 'learning_rate'",
    '--out_dir=': 'out_dir is empty',
    '--n_layer=10_000_000': 'n_layer is 10000000, it must lie between 1 and 1000',
    '--n_embd=1_000_000_000': 'out of memory',
    '--n_embd=36': 'n_embd and expert_dim must be multiples of 8',
    '--max_steps=0': 'max_steps is 0, it must be at least 1',
    '--decay_fraction=2': 'decay_fraction is 2.0',
    '--dtype=float8': "dtype is 'float8', it must be one of auto, float32, bfloat16",
    '--balancer=fair': "balancer is 'fair', it must be one of pid, sign, none",
    '--kernel=cuda': "kernel is 'cuda', it must be one of torch, hip, auto",
    '--n_head=0': 'n_head is 0, it must lie between 1 and 1e+09',
    '--n_kv_head=4': 'n_head (2) must be a multiple of n_kv_head (4)',
    '--seed=99999999999999999999': 'seed must be int',
    '--device=nonsense': "device 'nonsense' cannot be used here",
    '--device=meta': "device 'meta' cannot be used here",
    '--device=': "device '' cannot be used here",
    '--vocab_size=77': 'vocab_size is 77, but',
    '--dataset=nowhere': 'nowhere/meta.json: cannot be read',
    '--batch_size=1_000_000_000_000': 'out of memory',
    '--wandb=True': 'needs the package wandb: pip install wandb',
    'nowhere.py': 'nowhere.py: cannot be read',
}


@pytest.mark.parametrize('flag', BAD_SETTINGS)
def test_invalid_settings_get_a_one_line_error(dataset, tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setitem(sys.modules, 'wandb', None)     # as if it were not installed
    _, message = run_script(monkeypatch, capsys, 'train.py', *flags(dataset, tmp_path / 'run'), flag)
    assert BAD_SETTINGS[flag] in message


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tmp_path):
    out = subprocess.run([sys.executable, 'train.py', f'--dataset={tmp_path}', f'--out_dir={tmp_path / "run"}'],
                         cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.returncode == 1 and out.stdout == ''
    assert out.stderr.startswith(f'train.py: {tmp_path / "meta.json"}: cannot be read') and out.stderr.count('\n') == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252'])
def test_a_terminal_without_the_characters_does_not_end_training(tmp_path, encoding):
    prepare([(str(i), ('漢字' * 50).encode()) for i in range(20)], tmp_path / 'data', 270)
    out = subprocess.run([sys.executable, 'train.py', *flags(tmp_path / 'data', tmp_path / '漢'), '--max_steps=1'],
                         cwd=ROOT, env=ENV | {'PYTHONIOENCODING': encoding}, capture_output=True)
    assert out.returncode == 0 and b'step 1: val loss' in out.stdout and b'?' in out.stdout, out.stderr


def test_a_run_folder_of_another_model_is_refused(dataset, one_batch, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for change, message in ((dict(n_embd=64), 'n_embd is 64, but'), (dict(n_layer=3), 'n_layer is 3, but'),
                            (dict(dataset=one_batch), 'vocab_size is 262, but')):
        _, got = run_script(monkeypatch, capsys, 'train.py', *flags(**dict(dataset=dataset, out_dir=tmp_path) | change))
        assert message in got and 'was trained with' in got
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_unfinished_data_and_a_file_as_run_folder_are_named(dataset, tmp_path, monkeypatch, capsys):
    for name in 'meta.json', 'bpe.json', 'val.bin':
        shutil.copytree(dataset, tmp_path / name)
        (tmp_path / name / name).unlink()
        _, message = run_script(monkeypatch, capsys, 'train.py', *flags(tmp_path / name, tmp_path / 'run'))
        assert f'{name}/{name}' in message
    _, message = run_script(monkeypatch, capsys, 'train.py', *flags(dataset, tmp_path / 'val.bin/bpe.json'))
    assert 'val.bin/bpe.json' in message


def test_a_config_file_of_the_project_trains(dataset, tmp_path, monkeypatch, capsys):
    out, message = run_script(monkeypatch, capsys, 'train.py', 'config/tiny.py', f'--dataset={dataset}',
                              f'--out_dir={tmp_path}', '--max_steps=1', '--device=cpu')
    assert message is None and 'step 1: val loss' in out
    assert load_checkpoint(tmp_path)['config']['log_every'] == 5


def test_every_config_file_is_readable():
    for path in Path(ROOT / 'config').glob('*.py'):
        c, model = configurator.read([str(path)], TrainConfig, ZayaConfig)
        assert dataclasses.is_dataclass(c) and isinstance(model, ZayaConfig)
