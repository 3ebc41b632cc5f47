"""Train a ZAYA1 model: `python train.py config/NAME.py --key=value`.

One optimizer step: `grad_accum` micro-batches forward and backward; clip the gradient; Muon and AdamW step (optim.py);
then the Balancer nudges every router's bias by what the experts got in this global batch (router.py). Nothing else in
ZAYA1 needs a special trainer: no auxiliary loss, no capacity limit, no dropped tokens.

The run folder `out_dir` holds all of a run: ckpt.pt and ckpt_previous.pt, log.csv (one line every `log_every` steps), and
the tokenizer. Run the same command again, after a crash or a kill, and training goes on where the last checkpoint was;
on a CPU its losses are bit for bit those of a run that was never interrupted.

Several GPUs: `torchrun --nproc_per_node=8 train.py config/NAME.py`; each process takes grad_accum / 8 of the micro-batches.
"""
import contextlib
import csv
import filecmp
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from data.loader import dataset_folders, open_dataset
from data.tokenizer import load_tokenizer
from model import Block, Zaya, ZayaConfig, load_checkpoint, save_checkpoint, sizes
from optim import make_optimizers
from router import Balancer, load_entropy
from sample import generate, pick_device


@dataclass
class TrainConfig:
    """Every setting of a run besides the model's sizes (ZayaConfig in model.py)."""
    out_dir: str = 'runs/small'     # the run folder
    dataset: str = 'data/stdlib'    # a folder that data/*/prepare.py wrote, or several: 'data/stdlib:0.3 data/chat:0.7'
    init_from: str = ''             # a run folder whose weights to begin with, say to go on at a longer context
    # one optimizer step sees batch_size * context * grad_accum tokens
    batch_size: int = 16            # sequences in a micro-batch
    grad_accum: int = 1             # micro-batches a step, over all processes together, each with the same weight
    max_steps: int = 1000
    # learning rate: up in warmup_steps, flat, then linearly down to min_lr over the last decay_fraction of the steps
    lr: float = 6e-3                # for Muon and AdamW alike (optim.py says why one value fits both; vectors get a tenth)
    min_lr: float = 6e-4
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    weight_decay: float = 0.1
    grad_clip: float = 1.0          # largest norm of the whole gradient; 0: never clip
    balancer: str = 'pid'           # 'pid' (ZAYA1), 'sign' (DeepSeek's), 'none': see router.py
    balancer_lr: float = 3e-2
    eval_every: int = 100           # steps between evaluations, each with a sample of text
    eval_batches: int = 20          # micro-batches of held-out data, the same ones each time
    sample_tokens: int = 100        # length of that sample; 0: none
    checkpoint_every: int = 100
    log_every: int = 10             # steps between lines of log.csv
    seed: int = 0
    device: str = 'auto'            # 'auto': cuda (also AMD's ROCm), else mps, else cpu
    dtype: str = 'auto'             # of the matrix products: 'auto' is bfloat16 on cuda, float32 elsewhere
    compile: bool = False           # torch.compile: slow to start, faster after
    wandb: bool = False             # also log to Weights & Biases (pip install wandb)

    def __post_init__(self):
        for key in ('batch_size', 'grad_accum', 'max_steps', 'eval_every', 'eval_batches', 'checkpoint_every', 'log_every'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key} is {getattr(self, key)}, it must be at least 1')
        for key in ('lr', 'min_lr', 'warmup_steps', 'weight_decay', 'grad_clip', 'balancer_lr', 'sample_tokens', 'seed'):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f'{key} is {getattr(self, key)}, it must not be negative')
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f'decay_fraction is {self.decay_fraction}, it must lie between 0 and 1')
        for key, choices in (('balancer', ('pid', 'sign', 'none')), ('dtype', ('auto', 'float32', 'bfloat16'))):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}, use one of {', '.join(choices)}")


# Dense bf16 peak of a few GPUs in FLOP/s, from their data sheets, for the model FLOPs utilisation (MFU).
PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'MI300X': 1307e12, 'MI325X': 1307e12, '4090': 165e12}


def lr_at(step, config):
    """Learning rate of optimizer step `step` (from 0): linear warm-up, a plateau, linear decay to min_lr."""
    left = (config.max_steps - step) / max(1, config.decay_fraction * config.max_steps)    # 1 where the decay begins
    decayed = config.min_lr + (config.lr - config.min_lr) * min(1, left)
    warm = config.lr * (step + 1) / max(1, config.warmup_steps)
    return min(decayed, warm)                                   # a short run may begin to decay before it is warm


def flops_per_token(model_config):
    """Of a training step, 6 for each parameter at work (2 forward, 4 backward), the output head among them, and 6 in each of
    two products (q k^T, probabilities times v) for each dim of a query head and position attended to, on average half the
    context."""
    c = model_config
    attention = 2 * c.n_layer * c.n_head * c.head_dim * c.context / 2
    return 6 * (sizes(c)['active'] + c.vocab_size * c.n_embd + attention)


@torch.no_grad()
def evaluate(model, loader, n_batches, autocast):
    """Mean loss over the first n_batches batches, and the RMS of the residual stream after each layer, both float lists."""
    n_batches = min(n_batches, max(1, loader.n_windows // loader.batch_size))   # not beyond the set's end
    squares = []                                                # [layer 0, layer 1, ..., layer 0, ...] over the batches
    hooks = [layer.register_forward_hook(lambda module, args, out: squares.append(out[0].float().square().mean()))
             for layer in model.layers]
    model.eval()
    losses = []
    for index in range(n_batches):
        x, y, start = (None if t is None else t.to(model.device) for t in loader.batch(index))
        with autocast:
            losses.append(model(x, y, start)[1])
    model.train()
    for hook in hooks:
        hook.remove()
    rms = torch.stack(squares).view(n_batches, -1).mean(0).sqrt()
    return torch.stack(losses).mean().item(), rms.tolist()


def write_log(path, rows, columns, keep_until=None):
    """Append rows (dicts) to log.csv. keep_until: begin the file anew, with its rows up to that step only: what a killed
    run logged after its last checkpoint goes."""
    if keep_until is None:
        with open(path, 'a', newline='') as file:
            csv.DictWriter(file, columns).writerows(rows)
        return
    kept = []
    if os.path.exists(path):
        with open(path, newline='') as file:                    # a kill or a full disk may have cut the last line short
            kept = [row for row in csv.DictReader(file) if None not in row.values() and int(row['step']) <= keep_until]
    with open(path + '.tmp', 'w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(kept + rows)
    os.replace(path + '.tmp', path)                             # a kill before this line leaves the old log whole


def train(config, model_config):
    """Run or continue the training of `config` (TrainConfig) and `model_config` (ZayaConfig). Returns the losses
    that it logged as {step: loss}. Raises ValueError for settings, data or checkpoints that do not fit."""
    # 1. Processes and devices. Under torchrun every process runs all of this; rank 0 alone speaks and writes.
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(config.device)
    if world > 1:
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    if config.grad_accum % world:
        raise ValueError(f'grad_accum ({config.grad_accum}) must be a multiple of the {world} processes')
    say = tqdm.write if rank == 0 else lambda text: None        # tqdm's print keeps the progress bar in one piece
    dtype = {'auto': 'bfloat16' if device.type == 'cuda' else 'float32'}.get(config.dtype, config.dtype)
    autocast = torch.autocast(device.type, torch.bfloat16) if dtype == 'bfloat16' else contextlib.nullcontext()

    # 2. Data. The data decides the vocabulary.
    loader = open_dataset(config.dataset, 'train', config.batch_size, model_config.context, config.seed)
    val_loader = open_dataset(config.dataset, 'val', config.batch_size, model_config.context, config.seed)
    tokenizer_path = os.path.join(dataset_folders(config.dataset)[0][0], 'bpe.json')      # all the sets have the same
    tokenizer = load_tokenizer(tokenizer_path)
    if model_config.vocab_size not in (ZayaConfig.vocab_size, loader.vocab_size):
        raise ValueError(f'vocab_size is {model_config.vocab_size}, but {config.dataset} has {loader.vocab_size}: leave it out')
    model_config = replace(model_config, vocab_size=loader.vocab_size)

    # 3. Model, optimizers, balancer.
    torch.manual_seed(config.seed)                              # the same weights in every process
    model = Zaya(model_config).to(device)
    optimizers = make_optimizers(model, config.lr, config.weight_decay)
    balancer = Balancer(model.routers, config.balancer, config.balancer_lr)
    step = 0
    # 4. Continue a run, if the folder holds one.
    os.makedirs(config.out_dir, exist_ok=True)
    checkpoint = load_checkpoint(config.out_dir)
    if checkpoint is not None:
        for key, value in asdict(model_config).items():
            if key != 'kernel' and checkpoint['model_config'].get(key) != value:        # the kernel changes nothing that is kept
                raise ValueError(f"{key} is {value}, but {config.out_dir} was trained with "
                                 f"{checkpoint['model_config'].get(key)}: use it, or another out_dir")
        changed = [f'{key} {checkpoint["config"].get(key)} -> {value}' for key, value in asdict(config).items()
                   if checkpoint['config'].get(key) != value]
        model.load_state_dict(checkpoint['model'])
        # Of their state dicts take what was learned (momenta), not the old settings: those may have been changed.
        for thing, saved in zip([*optimizers, balancer], [*checkpoint['optimizers'], checkpoint['balancer']]):
            thing.load_state_dict(thing.state_dict() | {'state': saved['state']})
        step = checkpoint['step']
        torch.set_rng_state(checkpoint['rng'])
        if device.type == 'cuda' and checkpoint['rng_cuda'] is not None:
            torch.cuda.set_rng_state(checkpoint['rng_cuda'], device)
        say(f'continuing {config.out_dir} at step {step} of {config.max_steps}'
            + (f'; changed: {", ".join(changed)}' if changed else ''))
    elif config.init_from:                                      # weights and biases only: a new run with a head start
        before = load_checkpoint(config.init_from)
        if before is None:
            raise ValueError(f'init_from: {config.init_from} holds no checkpoint of train.py')
        try:
            model.load_state_dict(before['model'])
        except RuntimeError as error:                           # context and rope_base may differ, sizes may not
            detail = str(error).split('\n')[1].strip()
            raise ValueError(f'init_from: the model of {config.init_from} has other sizes ({detail})') from None
        say(f"starting from the weights of {config.init_from} after {before['step']} steps")
    folder = config.out_dir if checkpoint else config.init_from                 # where the weights are from, if any
    if folder and os.path.exists(old := os.path.join(folder, 'bpe.json')):      # they know their own tokens only
        if not filecmp.cmp(old, tokenizer_path, shallow=False):
            raise ValueError(f'{folder} was trained with another tokenizer than that of {config.dataset}: '
                             'use the dataset it was trained on, or another out_dir')
    if rank == 0 and checkpoint is None:
        shutil.copy(tokenizer_path, config.out_dir)             # sample.py finds it with the weights
    resumed = checkpoint is not None
    checkpoint = None                                           # its memory is needed

    def save():
        if rank == 0:
            save_checkpoint(config.out_dir, {
                'model': model.state_dict(), 'optimizers': [o.state_dict() for o in optimizers],
                'balancer': balancer.state_dict(), 'step': step, 'config': asdict(config),
                'model_config': asdict(model_config), 'rng': torch.get_rng_state(),
                'rng_cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None})

    # 5. The log.
    L = model_config.n_layer
    columns = ['step', 'tokens', 'loss', 'val_loss', 'grad_norm', 'lr', 'tokens_per_s', 'mfu', 'entropy',
               *(f'entropy_{layer}' for layer in range(L)), *(f'residual_{layer}' for layer in range(L))]
    log_path = os.path.join(config.out_dir, 'log.csv')
    if rank == 0:
        write_log(log_path, [], columns, keep_until=step if resumed else -1)     # a new run begins with a new log
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name and dtype == 'bfloat16'), None)
    n, tokens_per_step = sizes(model_config), config.batch_size * model_config.context * config.grad_accum
    say(f'{n["total"]:,} parameters, {n["active"]:,} active a token (without the embedding), on {name} in {dtype}'
        f'{" x " + str(world) if world > 1 else ""}; data: {loader.n_tokens:,} tokens, {tokens_per_step:,} a step, '
        f'{config.max_steps * tokens_per_step / loader.n_tokens:.2f} epochs')
    wandb = None
    if config.wandb and rank == 0:
        try:
            import wandb
        except ImportError:
            raise ValueError('wandb is not installed: pip install wandb, or leave --wandb out') from None
        wandb.init(project='nanozaya', name=os.path.basename(config.out_dir), config=asdict(config) | asdict(model_config))

    def evaluation():
        """Held-out loss and residual sizes; rank 0 also shows what the model would write."""
        val_loss, rms = evaluate(model, val_loader, config.eval_batches, autocast)
        say(f'step {step}: val loss {val_loss:.4f}')
        if config.sample_tokens and rank == 0:
            prompt = [tokenizer.eot_token]                      # what a document begins after
            with autocast:
                text = generate(model, [prompt], min(config.sample_tokens, model_config.context - 1), seed=step)[0]
            say('    ' + tokenizer.decode(text).strip().replace('\n', '\n    '))
        return {'val_loss': val_loss} | {f'residual_{layer}': value for layer, value in enumerate(rms)}

    # 6. The loop.
    model.train()
    if config.compile:                                          # one layer, once for all: six times faster than the whole
        model.train_layer = torch.compile(Block.__call__)
    forward = model
    if world > 1:       # buffers are the balancer's business: it sums the loads over ranks and moves all biases alike
        forward = DistributedDataParallel(model, broadcast_buffers=False)
    if step == 0:                                               # before any learning: val loss is near ln(vocab_size)
        row = {'step': 0, 'tokens': 0} | evaluation()
        if rank == 0:
            write_log(log_path, [row], columns)
    history, bad_in_a_row, steps, seconds = {}, 0, 0, 0.0       # steps and seconds since the last line of the log
    with tqdm(total=config.max_steps, initial=step, disable=rank != 0, dynamic_ncols=True, mininterval=1,
              unit='step') as bar:                              # 'with': an error must not leave half a bar before its line
        while step < config.max_steps:
            began = time.perf_counter()
            lr = lr_at(step, config)
            loss = torch.zeros((), device=device)
            n_micro = config.grad_accum // world
            for micro in range(n_micro):
                # Which data comes is a function of the step alone: no loader state to save, no overlap between ranks.
                index = step * config.grad_accum + micro * world + rank
                x, y, begins = (None if t is None else t.to(device) for t in loader.batch(index))
                last = micro == n_micro - 1                     # DDP averages gradients over ranks in the last backward
                with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                    with autocast:
                        _, micro_loss = forward(x, y, begins)
                    (micro_loss / n_micro).backward()
                loss += micro_loss.detach() / n_micro
            if world > 1:
                dist.all_reduce(loss)
                loss /= world
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
            if finite:
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group['lr'] = lr * group['lr_scale']
                    optimizer.step()
            fractions = balancer.step(update=finite)            # (layers, N); clears the counts in any case
            for optimizer in optimizers:
                optimizer.zero_grad()
            step, steps, seconds = step + 1, steps + 1, seconds + time.perf_counter() - began
            bad_in_a_row = 0 if finite else bad_in_a_row + 1
            if not finite:
                say(f'step {step}: loss {loss.item()}, gradient norm {norm.item()}: not finite, step skipped')
                if bad_in_a_row == 10:
                    raise ValueError('ten steps in a row had no finite loss or gradient; the last good checkpoint is '
                                     f'kept in {config.out_dir}. Try a smaller lr (now {config.lr}) or dtype=float32')

            done = step == config.max_steps
            row = evaluation() if step % config.eval_every == 0 or done else {}
            if step % config.log_every == 0 or row:
                entropy = load_entropy(fractions)
                speed = steps * tokens_per_step / seconds       # of training alone, evaluations not counted
                row |= {'step': step, 'tokens': step * tokens_per_step, 'loss': loss.item(), 'grad_norm': norm.item(),
                        'lr': lr, 'tokens_per_s': round(speed),
                        'mfu': peak and speed * flops_per_token(model_config) / peak / world,
                        'entropy': entropy.mean().item()} | {f'entropy_{i}': e.item() for i, e in enumerate(entropy)}
                steps, seconds = 0, 0.0
                history[step] = row['loss']
                if rank == 0:
                    write_log(log_path, [row], columns)
                    bar.set_postfix_str(f'loss {row["loss"]:.3f}, {speed:,.0f} tok/s, load entropy {row["entropy"]:.3f}')
                if wandb:
                    wandb.log(row, step=step)
            bar.update()
            # Not after a skipped step: the count of those in a row is not in a checkpoint.
            if (step % config.checkpoint_every == 0 or done) and finite:
                save()
    if world > 1:
        dist.destroy_process_group()
    return history


if __name__ == '__main__':
    with configurator.one_line_errors('train.py', 'try a smaller batch_size with a larger grad_accum',
                                      'run the same command again to go on from the last checkpoint'):
        train(*configurator.read(sys.argv[1:], TrainConfig, ZayaConfig))
