"""Kills processes (SIGKILL) at chosen lines of the code, for test_train.py.

    python crash.py train SEED ...      train.py with these arguments, killed at random lines, until it reaches its end
    python crash.py save FOLDER         save_checkpoint, killed at each of its lines; checks what is then in the folder

Both print how many processes they killed.
"""
import itertools
import os
import random
import shutil
import signal
import sys
import traceback

import torch
import torch._dynamo      # the optimizers need it; here, so that not every child must import it

import configurator
import train
from checkpoint import load_checkpoint, save_checkpoint, write_log
from model import ZayaConfig


def killed(line, functions, work):
    """Do work() in a child process, which dies at the line-th line it reaches in these functions. Did it die there?
    A child that fails by itself ends this process, too."""
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
    functions = train.train, train.take_up, train.train_step, write_log, save_checkpoint, load_checkpoint
    kills = 0
    while killed(rng.randrange(1, 500), functions, lambda: train.train(*configs)):
        kills += 1
    return kills


def kill_saving(folder):
    def state(version):
        return {'model_config': {'vocab_size': 9}, 'step': version,
                'model': {str(i): torch.full((5000,), version) for i in range(3)}}

    kills = 0
    for before in [], [1, 2], [1, 'damaged']:                   # the checkpoints that are there
        for line in itertools.count(1):
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder)
            for version in before:
                save_checkpoint(folder, state(version if version != 'damaged' else 2))
            if 'damaged' in before:
                path = os.path.join(folder, 'ckpt.pt')
                os.truncate(path, os.path.getsize(path) // 2)
            died = killed(line, (save_checkpoint, torch.serialization._save), lambda: save_checkpoint(folder, state(3)))
            found = load_checkpoint(folder)
            newest = max((version for version in before if version != 'damaged'), default=None)
            expected = [newest, 3] if died else [3]
            assert (found and found['step']) in expected, f'{before}, line {line}: {found}'
            assert found is None or all((w == found['step']).all() for w in found['model'].values())
            save_checkpoint(folder, state(4))                   # whatever was left behind is no hindrance
            assert load_checkpoint(folder)['step'] == 4
            kills += died
            if not died:
                break
    return kills


if __name__ == '__main__':
    print('killed', {'train': kill_training, 'save': kill_saving}[sys.argv[1]](*sys.argv[2:]))
