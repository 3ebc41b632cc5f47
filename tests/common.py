"""Small models, small runs and helpers shared by the tests."""
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch

from model import Zaya, ZayaConfig

ROOT = Path(__file__).parent.parent
# For subprocesses: import from the project root, one thread each.
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}

# Whether the C++ compiler that torch.compile needs on a CPU is installed.
HAS_COMPILER = bool(shutil.which(os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')))

# Flags of train.py for a model that trains at a few milliseconds per step.
TINY_RUN = [f'--{key}={value}' for key, value in dict(
    n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=8, n_expert=4, expert_dim=16, router_dim=8, context=16,
    batch_size=4, max_steps=4, warmup_steps=2, eval_every=4, eval_batches=1, sample_tokens=8, checkpoint_every=2,
    log_every=1, device='cpu').items()]


def tiny_config(**changes):
    return ZayaConfig(**dict(vocab_size=50, context=64, n_layer=3, n_embd=32, n_head=4, n_kv_head=2, head_dim=8,
                             n_expert=4, expert_dim=16, router_dim=8) | changes)


@torch.no_grad()
def randomize(module, seed=0):
    """Fill all parameters and float buffers with random values: the ones and zeros of a new model would hide errors."""
    g = torch.Generator().manual_seed(seed)
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if t.is_floating_point() and 'inv_freq' not in name:     # RoPE frequencies are fixed
            t.copy_(torch.randn(t.shape, generator=g) * (0.3 if t.ndim < 2 else t.shape[-1] ** -0.5)
                    + ('scale' in name or 'norm' in name or 'temp' in name))
    return module


def tiny_model(seed=0, **changes):
    return randomize(Zaya(tiny_config(**changes)), seed).eval()


def tokens(*shape, seed=0, vocab_size=50):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def run_script(monkeypatch, capsys, script, *arguments):
    """Run `python script arguments`, or `python -m script ...`, in this process. Return (stdout, None), or
    (stdout, message) if it ends with sys.exit(message), that is exit code 1 and the message on stderr."""
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
