"""Small models and runs for the tests."""
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch

from model import Zaya, ZayaConfig

ROOT = Path(__file__).parent.parent
# For subprocesses: they import from the project's root, and do not fight over the cores.
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}

# What torch.compile compiles with, on a CPU.
HAS_COMPILER = bool(shutil.which(os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')))

# A model that trains at a few milliseconds a step, as flags of train.py.
TINY_RUN = [f'--{key}={value}' for key, value in dict(
    n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=8, n_expert=4, expert_dim=16, router_dim=8, context=16,
    batch_size=4, max_steps=4, warmup_steps=2, eval_every=4, eval_batches=1, sample_tokens=8, checkpoint_every=2,
    log_every=1, device='cpu').items()]


def tiny_config(**changes):
    return ZayaConfig(**dict(vocab_size=50, context=64, n_layer=3, n_embd=32, n_head=4, n_kv_head=2, head_dim=8,
                             n_expert=4, expert_dim=16, router_dim=8) | changes)


@torch.no_grad()
def randomize(module, seed=0):
    """Every parameter and float buffer random: a fresh model's ones and zeros would hide errors."""
    g = torch.Generator().manual_seed(seed)
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if t.is_floating_point() and 'inv_freq' not in name:     # RoPE's frequencies are not learned
            t.copy_(torch.randn(t.shape, generator=g) * (0.3 if t.ndim < 2 else t.shape[-1] ** -0.5)
                    + ('scale' in name or 'norm' in name or 'temp' in name))
    return module


def tiny_model(seed=0, **changes):
    return randomize(Zaya(tiny_config(**changes)), seed).eval()


def tokens(*shape, seed=0, vocab_size=50):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def run_script(monkeypatch, capsys, script, *arguments):
    """`python script arguments`, or `python -m script ...`, in this process -> (stdout, None), or (stdout, message) if
    it ends with sys.exit(message), which means exit code 1 and the message on stderr."""
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    message = None
    try:
        if script.endswith('.py'):
            runpy.run_path(str(ROOT / script), run_name='__main__')
        else:
            runpy.run_module(script, run_name='__main__', alter_sys=True)
    except SystemExit as error:
        message = error.code
        assert type(message) is str and message.startswith(f'{script}: ') and '\n' not in message
    return capsys.readouterr().out, message
