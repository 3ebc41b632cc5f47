"""Kill processes (SIGKILL) at chosen lines of code or at random moments, for test_train.py and by hand.

    python crash.py train SEED ...      train.py with these arguments, killed at random lines until a process finishes
    python crash.py save FOLDER         save_checkpoint, killed at each of its lines; checks what is left in the folder
    python crash.py all FOLDER N M      N kills at random lines of runs, including checkpoint writes, and M at random
                                        moments of a torchrun of two processes; checks that losses and weights are bit
                                        for bit those of uninterrupted runs

Each prints the number of processes it killed.
"""
import csv
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict

import torch
import torch._dynamo      # imported by the optimizers: once here, not in every child

import configurator
import train
from runtime.checkpoint import load_checkpoint, save_checkpoint, write_log
from runtime.distributed import save_and_sync
from common import ENV, ROOT, TINY_RUN
from data.prepare import prepare
from model import ZayaConfig


def killed(line, functions, work):
    """Run work() in a child process that is killed at the line-th line it reaches in these functions. Return whether it
    was killed. Exit if the child fails for another reason."""
    child = os.fork()
    if not child:
        watched = {function.__code__ for function in functions}

        def trace(frame, event, argument):
            nonlocal line
            if frame.f_code not in watched:
                return None
            line -= event == 'line'
            if line == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f'a child ended with {code}')
    return code != 0


def kill_training(seed, *arguments):
    rng = random.Random(int(seed))
    configs = configurator.read(arguments, train.TrainConfig, ZayaConfig)
    functions = (train.train, train.set_up, train.resume, train.take_steps, train.train_step, write_log,
                 save_checkpoint, load_checkpoint)
    kills = 0
    while killed(rng.randrange(1, 500), functions, lambda: train.train(*configs)):
        kills += 1
    return kills


def kill_saving(folder):
    def state(version):
        return {'model_config': asdict(ZayaConfig(vocab_size=9)), 'step': version,
                'model': {str(i): torch.full((5000,), version) for i in range(3)}}

    kills = 0
    for before in [], [1, 2], [1, 'damaged']:                   # existing checkpoints
        for line in itertools.count(1):
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder)
            for version in before:
                save_checkpoint(folder, state(version if version != 'damaged' else 2))
            if 'damaged' in before:
                path = os.path.join(folder, 'ckpt.pt')
                os.truncate(path, os.path.getsize(path) // 2)
            functions = save_checkpoint, save_and_sync, torch.serialization._save
            died = killed(line, functions, lambda: save_checkpoint(folder, state(3)))
            found = load_checkpoint(folder)
            newest = max((version for version in before if version != 'damaged'), default=None)
            expected = [newest, 3] if died else [3]
            assert (found and found['step']) in expected, f'{before}, line {line}: {found}'
            assert found is None or all((w == found['step']).all() for w in found['model'].values())
            save_checkpoint(folder, state(4))                   # leftover files do not matter
            assert load_checkpoint(folder)['step'] == 4
            kills += died
            if not died:
                break
    return kills


def same_run(a, b):
    """Return whether two runs have equal logs, except for speed, and bit-identical last checkpoints."""
    logs, states = [], []
    for folder in a, b:
        with open(os.path.join(folder, 'log.csv'), newline='') as file:
            logs.append([row | {'tokens_per_s': None} for row in csv.DictReader(file)])
        states.append(load_checkpoint(folder))
        states[-1]['config'].pop('out_dir')
    return logs[0] == logs[1] and same(*states)


def same(a, b):
    if isinstance(a, (dict, list)):
        return len(a) == len(b) and all(same(v, b[k]) for k, v in (a.items() if isinstance(a, dict) else enumerate(a)))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


def kill_all(folder, lines, moments):
    prepare([(str(i), bytes(random.Random(i).choices(b'abc ()\n', k=900))) for i in range(9)], f'{folder}/data', 262)
    flags = lambda name: [*TINY_RUN, f'--dataset={folder}/data', f'--out_dir={folder}/{name}', '--max_steps=24',
                          '--eval_every=4', '--checkpoint_every=3', '--grad_accum=2']
    kills = 0
    killed(0, (), lambda: train.train(*configurator.read(flags('whole'), train.TrainConfig, ZayaConfig)))
    for seed in itertools.count():
        if kills >= int(lines):
            break
        shutil.rmtree(f'{folder}/stopped', ignore_errors=True)
        kills += kill_training(seed, *flags('stopped'))
        assert same_run(f'{folder}/whole', f'{folder}/stopped'), f'seed {seed}: another run'

    def torchrun(name):
        return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                                 'train.py', *flags(name)], cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
    assert int(moments) == 0 or torchrun('whole2').wait() == 0
    rng, here, shot = random.Random(0), os.path.join(folder, 'stopped2'), 0
    while shot < int(moments):
        began, child, path = time.time(), torchrun('stopped2'), os.path.join(here, 'log.csv')
        while child.poll() is None and not (os.path.exists(path) and os.stat(path).st_mtime > began):
            time.sleep(0.01)                                    # until it has written to its log
        time.sleep(rng.random())
        if child.poll() is None:
            with open(os.path.join(here, 'lock')) as file:      # rank 0; torchrun stops the other
                os.kill(int(file.read().split()[1]), signal.SIGKILL)
            shot += 1
        child.wait()
        if load_checkpoint(here) and load_checkpoint(here)['step'] == 24:   # it had finished
            assert same_run(f'{folder}/whole2', here), f'another run after {shot} kills'
            shutil.rmtree(here)
    if os.path.exists(here):
        assert torchrun('stopped2').wait() == 0 and same_run(f'{folder}/whole2', here), 'another run under torchrun'
    return kills + shot


if __name__ == '__main__':
    work = {'train': kill_training, 'save': kill_saving, 'all': kill_all}[sys.argv[1]]
    print('killed', work(*sys.argv[2:]))
