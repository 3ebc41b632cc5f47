"""Train a baseline on data/stdlib, for the speedrun of bench.py: `python -m evidence.speedrun --model=gpt`.

    gpt             a plain nanoGPT-style GPT (baselines.py): four layers of width 256, 4.3M parameters
    transformers    transformers' ZayaForCausalLM, with the sizes and initial weights of config/demo.py, and
                    skip_expert=True, which it needs; its balancing biases stay as initialized

Both use AdamW and float32, and the data, batch size and form of schedule of config/demo.py, with their own learning
rate and number of steps. Prints the last validation loss; bench.py measures the seconds, from the start of the process.
"""
import sys
import tempfile
from dataclasses import dataclass, replace

import configurator
import torch
import torch.nn.functional as F

from data.loader import open_dataset
from evidence.baselines import GPT
from model import Zaya, ZayaConfig
from runtime.pretrained import save_pretrained
from train import TrainConfig, lr_at

# Learning rate and steps. The rate is the best of four. Val loss after
#   400 steps of gpt             5e-4: 5.63   1e-3: 5.50   2e-3: 6.04   4e-3: over 6.5 after 300
#   300 steps of transformers    1e-3: 5.48   2e-3: 5.34   4e-3: 5.48   8e-3: 5.59
# transformers has the steps that it needs for a val loss of about 5.06; gpt, which is far from it, has twice our time.
DEFAULTS = {'gpt': (1e-3, 400), 'transformers': (2e-3, 420)}


@dataclass
class SpeedrunConfig:
    model: str = 'gpt'              # or 'transformers'
    lr: float = 0.0                 # 0: that of DEFAULTS
    steps: int = 0                  # 0: those of DEFAULTS
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, model=(*DEFAULTS,), lr=(0, 1), steps=(0, None), seed=(0, None))


def baseline(name, config):
    """Return a new model of that name, and loss_of(model, tokens, targets) -> scalar; tokens, targets (B, S)."""
    if name == 'gpt':
        return GPT(replace(config, n_layer=4)), lambda model, x, y: model(x, y)
    transformers = configurator.package('transformers')
    with tempfile.TemporaryDirectory() as folder:               # with our initial weights
        save_pretrained(Zaya(replace(config, skip_expert=True)), folder)
        model = transformers.ZayaForCausalLM.from_pretrained(folder, attn_implementation='sdpa')
    return model.train(), lambda model, x, y: F.cross_entropy(
        model(x, use_cache=False).logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def run(config, settings, model_config):
    """Train the baseline. Return the mean loss on the validation batches of train.py."""
    torch.manual_seed(settings.seed)
    loader, val_loader = (open_dataset(config.dataset, split, config.batch_size, model_config.context, settings.seed)[0]
                          for split in ('train', 'val'))
    model, loss_of = baseline(settings.model, model_config)
    decays = lambda decay: [p for p in model.parameters() if (p.ndim > 1) == decay]
    optimizer = torch.optim.AdamW([{'params': decays(True), 'weight_decay': config.weight_decay},
                                   {'params': decays(False), 'weight_decay': 0.0}], betas=(0.9, 0.95), fused=True)
    for step in range(config.max_steps):
        x, y, _ = loader.batch(step)
        loss_of(model, x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, config)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        batches = [val_loader.batch(i)[:2] for i in range(config.eval_batches)]
        return sum(loss_of(model, x, y).item() for x, y in batches) / len(batches)


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.speedrun'):
        settings, = configurator.read(sys.argv[1:], SpeedrunConfig)
        default_lr, default_steps = DEFAULTS[settings.model]
        lr, steps = settings.lr or default_lr, settings.steps or default_steps
        config, model_config = configurator.read(['config/demo.py', f'--lr={lr}', f'--min_lr={lr / 10}',
                                                  f'--max_steps={steps}'], TrainConfig, ZayaConfig)
        print(f'step {steps}: val loss {run(config, settings, model_config):.4f}')
