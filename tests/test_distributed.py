"""train.py --shard=True: sharded over any number of processes, a run equals that of one process up to rounding."""
import errno
import glob
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import Shard, distribute_tensor

from runtime import checkpoint, pretrained
import configurator
from runtime.checkpoint import RESUMABLE, load_checkpoint, save_checkpoint
from runtime.pretrained import from_pretrained, save_pretrained
from common import ENV, ROOT, tiny_model
from evidence import paper
from model import ZayaConfig
from sample import generate
from test_train import flags, log, run
from train import TrainConfig

UNEVEN = dict(n_expert=5, grad_accum=4, balancer_lr=0.01, max_steps=20, checkpoint_every=5, log_every=1, eval_every=10,
              sample_tokens=0)      # uneven shards for 2 and 4 processes: of experts, and of some matrices


def torchrun(processes, *arguments, wait=True):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    started = subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    if wait:
        out = started.communicate()[0]
        assert started.returncode == 0, out
    return started


@pytest.fixture
def single_process(monkeypatch):
    """The environment of torchrun with one process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    for key, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=port).items():
        monkeypatch.setenv(key, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def assert_equal_runs(a, b):
    """Losses, gradient norms, weights and momenta are equal within 1e-5."""
    for one, two in zip(log(a), log(b), strict=True):
        for key in one:
            assert float(one[key] or 0) == pytest.approx(float(two[key] or 0), rel=1e-5, abs=1e-6), key
    assert_equal_states(load_checkpoint(a, RESUMABLE), load_checkpoint(b, RESUMABLE))


def assert_equal_states(one, two):
    assert one['step'] == two['step'] and one['model'].keys() == two['model'].keys()
    for name, tensor in one['model'].items():
        assert (tensor - two['model'][name]).abs().max() < 1e-5, name
    for mine, others in zip(one['optimizers'], two['optimizers']):
        for i, momenta in mine['state'].items():
            for name, tensor in momenta.items():
                assert (tensor - others['state'][i][name]).abs().max() < 1e-5, (i, name)


def ranks(out_dir):
    """Return {rank: process id} of the processes that train into out_dir."""
    found = {}
    for path in glob.glob('/proc/[0-9]*/environ'):
        try:
            with open(path, 'rb') as file, open(path.replace('environ', 'cmdline'), 'rb') as line:
                environ, command = file.read().split(b'\0'), line.read()
        except OSError:
            continue
        if os.fsencode(f'--out_dir={out_dir}') in command.split(b'\0') and b'torch.distributed.run' not in command:
            found |= {int(entry[5:]): int(path.split('/')[2]) for entry in environ if entry.startswith(b'RANK=')}
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='finds the process to kill in /proc')
def test_a_sharded_run_killed_on_two_processes_resumes_on_four_and_equals_a_run_of_one(dataset, tmp_path):
    run(dataset, tmp_path / 'one', **UNEVEN)
    out, arguments = tmp_path / 'many', ['train.py', *flags(dataset, tmp_path / 'many', shard=True, **UNEVEN)]
    two = torchrun(2, *arguments, wait=False)
    while two.poll() is None and not (out / 'ckpt_previous.pt').exists():       # step 5's checkpoint, or step 10's
        time.sleep(0.02)
    os.kill(ranks(out)[1], signal.SIGKILL)
    assert two.communicate()[0] and two.returncode != 0
    held = load_checkpoint(out, RESUMABLE)
    assert 5 <= held['step'] < 20
    torchrun(4, *arguments, '--recompute=True')
    assert_equal_runs(tmp_path / 'one', out)
    sizes = [os.path.getsize(out / 'ckpt.pt' / name) for name in sorted(os.listdir(out / 'ckpt.pt')) if 'shard' in name]
    assert len(sizes) == 4 and max(sizes) < 0.5 * sum(sizes)
    model, language = pretrained.load(out)
    assert generate(model, [language.encode('def')], 5)


def test_a_run_may_alternate_between_sharded_and_unsharded(dataset, tmp_path, single_process):
    changes = UNEVEN | dict(checkpoint_every=2, lr=1e-3, min_lr=1e-3)           # the same rate for any max_steps
    run(dataset, tmp_path / 'one', **changes | dict(max_steps=6))
    for stop, shard in (2, False), (4, True), (6, False):
        run(dataset, tmp_path / 'alternating', shard=shard, recompute=shard, **changes | dict(max_steps=stop))
    one, two = (load_checkpoint(tmp_path / name, RESUMABLE) for name in ('one', 'alternating'))
    assert_equal_states(one, two)
    with pytest.raises(ValueError, match='expert_dim is 8, but .* was trained with 16'):
        run(dataset, tmp_path / 'alternating', shard=True, **changes | dict(expert_dim=8))


def test_a_sharded_run_starts_from_the_weights_of_an_unsharded_one(dataset, tmp_path, single_process):
    changes = UNEVEN | dict(max_steps=2)
    run(dataset, tmp_path / 'first', **changes)
    for shard in False, True:
        run(dataset, tmp_path / str(shard), init_from=tmp_path / 'first', shard=shard, **changes)
    one, two = (load_checkpoint(tmp_path / name)['model'] for name in ('False', 'True'))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


def state(step):
    mesh = torch.distributed.init_device_mesh('cpu', (1,))
    return {'model': {'w': distribute_tensor(torch.full((5, 3), float(step)), mesh, [Shard(0)]), 'b': torch.ones(2)},
            'step': step, 'model_config': asdict(ZayaConfig(vocab_size=5))}


@pytest.fixture
def sharded(tmp_path, single_process):
    """A run folder with sharded checkpoints of steps 2 and 4."""
    torch.distributed.init_process_group('gloo')
    for step in 2, 4:
        save_checkpoint(tmp_path, state(step))
        assert (load_checkpoint(tmp_path)['model']['w'] == step).all()
    return tmp_path


def test_a_damaged_shard_is_detected_and_the_previous_checkpoint_used(sharded, capsys):
    part, = (sharded / 'ckpt.pt').glob('*.safetensors')
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    assert load_checkpoint(sharded)['step'] == 2
    assert f'its {part.name} is corrupt' in capsys.readouterr().err
    part.unlink()
    assert load_checkpoint(sharded)['step'] == 2


def test_a_sharded_checkpoint_holds_nothing_that_could_be_executed(sharded):
    for path in (sharded / 'ckpt.pt').iterdir():
        assert path.suffix == '.safetensors' or path.name == 'run.pt'           # which is read with weights_only


def test_non_finite_sharded_weights_are_not_saved(sharded):
    bad = state(6)
    bad['model']['w'].to_local()[0, 0] = float('nan')
    with pytest.raises(ValueError, match='w is not finite after step 6'):
        save_checkpoint(sharded, bad)
    assert load_checkpoint(sharded)['step'] == 4


def test_a_save_stopped_at_any_rename_leaves_a_complete_checkpoint(sharded, monkeypatch):
    for moment in range(5):
        for step in 2, 4:
            save_checkpoint(sharded, state(step))
        calls = []

        def stopped(name, real):
            def call(*arguments):
                calls.append(name)
                if len(calls) > moment:
                    raise KeyboardInterrupt
                return real(*arguments)
            return call
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, 'remove', stopped('remove', checkpoint.remove))
            patch.setattr(checkpoint.os, 'replace', stopped('replace', os.replace))
            save_checkpoint(sharded, state(6))
        assert calls[:moment + 1] == ['remove', 'remove', 'replace', 'remove', 'replace'][:moment + 1]
        assert load_checkpoint(sharded)['step'] == 4
    save_checkpoint(sharded, state(10))                         # leftover files do not matter
    assert load_checkpoint(sharded)['step'] == 10


def test_save_pretrained_splits_large_models_into_several_files(tmp_path, monkeypatch):
    model = tiny_model(skip_expert=True)
    save_pretrained(model, tmp_path / 'one')
    monkeypatch.setattr(pretrained, 'FILE_BYTES', 20_000)
    save_pretrained(model, tmp_path / 'many')
    assert len(list((tmp_path / 'many').glob('model-*-of-*.safetensors'))) > 2
    one, many = (from_pretrained(tmp_path / name).state_dict() for name in ('one', 'many'))
    assert all(one[name].equal(many[name]) for name in one)


def test_sharded_and_unsharded_models_have_the_same_initial_weights_and_release(tmp_path, single_process):
    torch.distributed.init_process_group('gloo')
    config = tiny_model(skip_expert=True).config
    for shard in False, True:
        model = paper.build(TrainConfig(shard=shard), config, torch.device('cpu'))
        save_pretrained(model, tmp_path / str(shard))
    one, two = (from_pretrained(tmp_path / name).state_dict() for name in ('False', 'True'))
    assert all(one[name].equal(two[name]) for name in one)


def test_memory_per_process_is_as_computed_and_proportional_to_1_over_their_number(single_process):
    torch.distributed.init_process_group('gloo')
    held, computed = paper.measure()
    assert held == computed
    one, eight = (sum(paper.memory(ZayaConfig.zaya1_8b(), W).values()) for W in (1, 8))
    assert one / 8 == eight


def test_the_recipe_of_the_8b_shape_fits_its_gpus():
    config, sizes = configurator.read(['config/8b.py'], TrainConfig, ZayaConfig)
    released = ZayaConfig.zaya1_8b()
    assert all(getattr(sizes, key) == getattr(released, key) for key in ('n_layer', 'n_embd', 'n_expert', 'expert_dim'))
    tokens = config.batch_size * sizes.context
    assert config.shard and config.recompute
    sizes = replace(sizes, vocab_size=50_304)                   # that of the data in the config's comment
    held = paper.memory(sizes, 8, tokens)
    assert sum(held.values()) < 80e9 < sum(paper.memory(sizes, 1).values())
    assert sum(held.values()) + 7 * held['activations'] < 192e9                 # as its comment says of larger GPUs


def test_a_full_disk_gets_a_one_line_error_and_loses_no_checkpoint(sharded, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(HuggingFaceStorageWriter, 'write_data', full)
    with pytest.raises(OSError, match='ckpt.tmp: cannot be written .*No space left'):
        save_checkpoint(sharded, state(6))
    assert load_checkpoint(sharded)['step'] == 4 and not (sharded / 'ckpt.tmp').exists()


def test_an_unsharded_checkpoint_replaces_a_sharded_one_and_leftover_files(sharded):
    (sharded / 'ckpt.tmp').mkdir()
    for step in 6, 8:
        save_checkpoint(sharded, state(step) | {'model': {'w': torch.full((5, 3), float(step))}})
        assert load_checkpoint(sharded)['step'] == step
    save_checkpoint(sharded, state(10))
    assert load_checkpoint(sharded)['step'] == 10


def test_more_processes_than_experts_are_refused(single_process):
    torch.distributed.init_process_group('gloo')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match='at most n_expert processes'):
        patch.setattr('torch.distributed.get_world_size', lambda: 5)
        paper.build(TrainConfig(shard=True), tiny_model().config, torch.device('cpu'))


def test_shard_without_torchrun_explains_what_to_run(dataset, tmp_path):
    with pytest.raises(ValueError, match='start it by torchrun'):
        run(dataset, tmp_path, shard=True)
