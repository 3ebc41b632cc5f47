"""Train a ZAYA1 model: `python train.py config/NAME.py --key=value`.

One optimizer step: `grad_accum` micro-batches forward and backward; clip the gradient; Muon and AdamW step (optim.py);
then the Balancer nudges every router's bias by what the experts got in this global batch (router.py). Nothing else in
ZAYA1 needs a special trainer: no auxiliary loss, no capacity limit, no dropped tokens.

The run folder `out_dir` holds all of a run: ckpt.pt and ckpt_previous.pt, log.csv (one line every `log_every` steps),
and the tokenizer. Run the same command again, after a crash or a kill, and training goes on where the last checkpoint
was; on a CPU its losses are bit for bit those of a run that was never interrupted.

Several GPUs: `torchrun --nproc_per_node=8 train.py config/NAME.py`. Every process runs all of this file, on its share
of the micro-batches; the one of rank 0 alone speaks and writes. A model too large for one GPU: --shard=True as well,
and each holds a part of every tensor (runtime/distributed.py).
"""
import contextlib
import functools
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
import kernels
from runtime.checkpoint import save_checkpoint, resume, write_log
from runtime.checkpoint import exclusive_lock
from data.loader import open_dataset
from runtime.distributed import copy_into, orthogonalize_shards, shard
from data.tokenizer import digest, save_tokenizer
from model import Block, Zaya, ZayaConfig, sizes
from optim import make_optimizers, orthogonalize
from router import Balancer, load_entropy
from sample import generate
from runtime.device import name_and_peak, pick_device, pick_dtype, products_in


@dataclass
class TrainConfig:
    """Every setting of a run besides the model's sizes (ZayaConfig in model.py)."""
    out_dir: str = 'runs/small'     # the run folder
    dataset: str = 'data/stdlib'    # a folder that data/*/prepare.py wrote, or several: 'data/stdlib:0.3 data/chat:0.7'
    init_from: str = ''             # a run folder whose weights to begin with, say to go on at a longer context
    batch_size: int = 16            # sequences in a micro-batch; a step sees batch_size * context * grad_accum tokens
    grad_accum: int = 1             # micro-batches a step, over all processes; the loss is the mean over all targets
    max_steps: int = 1000
    lr: float = 6e-3                # for Muon and AdamW alike, vectors a tenth (optim.py says why)
    min_lr: float = 6e-4
    warmup_steps: int = 50          # in which the learning rate rises linearly to lr
    decay_fraction: float = 0.5     # of the steps, the last ones: there it falls linearly to min_lr
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
    dtype: str = 'auto'             # of the matrix products: 'auto' is bfloat16 where it is faster, else float32
    compile: bool = False           # torch.compile: half a minute to start, faster after
    kernel: str = 'torch'           # 'hip' or 'auto': CCA's own kernel, see kernels/README.md
    shard: bool = False             # under torchrun: each process holds a part of every tensor
    recompute: bool = False         # keep of each layer only what goes into it, and compute the rest again in backward
    wandb: bool = False             # also log to Weights & Biases (pip install wandb)

    def __post_init__(self):
        if not self.out_dir:
            raise ValueError('out_dir is empty: name a folder')
        low = lambda least, names: dict.fromkeys(names.split(), (least, None))
        configurator.check_ranges(
            self, **low(1, 'batch_size grad_accum max_steps eval_every eval_batches checkpoint_every log_every'),
            **low(0, 'lr min_lr warmup_steps weight_decay grad_clip balancer_lr sample_tokens seed'),
            decay_fraction=(0, 1), balancer=('pid', 'sign', 'none'), dtype=('auto', 'float32', 'bfloat16'),
            kernel=('torch', 'hip', 'auto'))


def lr_at(step, config):
    """Learning rate of optimizer step `step` (from 0): linear warm-up, a plateau, linear decay to min_lr."""
    left = (config.max_steps - step) / max(1, config.decay_fraction * config.max_steps)    # 1 where the decay begins
    decayed = config.min_lr + (config.lr - config.min_lr) * min(1, left)
    warm = config.lr * (step + 1) / max(1, config.warmup_steps)
    return min(decayed, warm)                                   # a short run may begin to decay before it is warm


# ---- setting up ----

def start_processes(config):
    """Join the processes of torchrun, if there are any. Return rank, number of processes, device."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1 and torch.cuda.is_available():                 # first of all, or each would put something on GPU 0
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    device = pick_device(config.device)
    if config.shard and 'RANK' not in os.environ:
        raise ValueError('shard spreads a model over processes: start it by torchrun --nproc_per_node=8 train.py ...')
    if world > 1 or config.shard:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    if config.grad_accum % world:
        raise ValueError(f'grad_accum ({config.grad_accum}) must be a multiple of the {world} processes')
    return rank, world, device


def open_data(config, model_config):
    """Open the dataset. Return its loader, that of held-out data, its tokenizer, and the model's config with its
    vocabulary. Raises ValueError if that config names another vocab_size."""
    (loader, tokenizer), (val_loader, _) = (
        open_dataset(config.dataset, split, config.batch_size, model_config.context, config.seed)
        for split in ('train', 'val'))
    V = loader.vocab_size
    if model_config.vocab_size not in (ZayaConfig.vocab_size, V):
        raise ValueError(f'vocab_size is {model_config.vocab_size}, but {config.dataset} has {V}: leave it out')
    return loader, val_loader, tokenizer, replace(model_config, vocab_size=V)


def build(config, model_config, device):
    """A new Zaya on device, all of it or, with --shard, this process's part, with the same weights."""
    torch.manual_seed(config.seed)                              # the same weights in every process
    if not config.shard:
        return Zaya(model_config).to(device)
    if dist.get_world_size() > model_config.n_expert:           # others would hold a copy: FSDP splits by whole experts
        raise ValueError(f'shard splits the {model_config.n_expert} experts: take at most n_expert processes')
    # A Zaya draws numbers twice, in the constructors of torch's modules and in initialize(): the first are thrown away.
    nn.Embedding(model_config.vocab_size, model_config.n_embd)
    for layer in range(model_config.n_layer):
        Block(model_config, layer)
    with torch.device('meta'):                                  # without memory
        model = Zaya(model_config)
    shard(model, device, pick_dtype(config.dtype, device) if device.type == 'cuda' else torch.float32)
    model.initialize(copy_into)
    return model


# ---- running ----

def train_step(step, config, forward, optimizers, balancer, loader, autocast, rank, world):
    """Take one optimizer step. forward: the model, or DDP around it. Return the loss, the gradient's norm, whether both
    are finite (if not, nothing was changed), and the load fractions (layers, N)."""
    # Which data comes is a function of the step alone: no loader state to save, no overlap between ranks.
    device, first, end = next(forward.parameters()).device, step * config.grad_accum, (step + 1) * config.grad_accum
    batches = [[None if t is None else t.to(device) for t in loader.batch(i)] for i in range(first + rank, end, world)]
    scored = torch.stack([(y >= 0).sum() for _, y, _ in batches])               # targets of each micro-batch
    n, loss = scored.sum(), 0
    if world > 1:
        dist.all_reduce(n)
    for micro, (x, y, start) in enumerate(batches):
        last = micro == len(batches) - 1        # DDP averages gradients over ranks in the last backward, FSDP in each
        with contextlib.nullcontext() if last or world == 1 or config.shard else forward.no_sync():
            with autocast:
                _, micro_loss = forward(x, y, start)
            weight = scored[micro] / n.clamp_min(1)             # the loss is the mean over all the step's targets
            (micro_loss * weight * world).backward()
        loss += micro_loss.detach() * weight
    if world > 1:
        dist.all_reduce(loss)
    norm = nn.utils.clip_grad_norm_(forward.parameters(), config.grad_clip or math.inf)
    norm = norm.full_tensor() if config.shard else norm         # of the whole gradient
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, config) * group['lr_scale']
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return loss.item(), norm.item(), finite, balancer.step(update=finite)       # which clears the counts in any case


@torch.no_grad()
def evaluate(step, config, model, loader, autocast, tokenizer, say):
    """Measure on the first batches of held-out data, and show what the model would write. Return a row of the log: the
    mean loss, and the RMS of the residual stream after each layer. tokenizer: None for no text."""
    n = min(config.eval_batches, max(1, loader.n_windows // loader.batch_size))            # not beyond the set's end
    losses, scored, squares = [], [], []                 # squares: layer 0, layer 1, ..., layer 0, ... over the batches
    hooks = [layer.register_forward_hook(lambda module, args, out: squares.append(out[0].float().square().mean()))
             for layer in model.layers]
    model.eval()
    # What was compiled for training would have to be compiled anew for evaluation and its other shapes.
    with torch.compiler.set_stance('force_eager') if config.compile else contextlib.nullcontext():
        for index in range(n):
            x, y, start = (None if t is None else t.to(model.device) for t in loader.batch(index))
            with autocast:
                scored.append((y >= 0).sum())
                losses.append(model(x, y, start)[1] * scored[-1])
        for hook in hooks:
            hook.remove()
        val_loss = (sum(losses) / sum(scored).clamp_min(1)).item()
        say(f'step {step}: val loss {val_loss:.4f}')
        if tokenizer and config.sample_tokens and math.isfinite(val_loss):      # the prompt: a document's beginning
            n_new = min(config.sample_tokens, model.config.context - 1)
            text = generate(model, [[tokenizer.eot_token]], n_new, seed=step)[0]
            say('    ' + tokenizer.decode(text).strip().replace('\n', '\n    '))
    model.train()
    rms = torch.stack(squares).view(n, -1).mean(0).sqrt().tolist()
    return {'val_loss': val_loss} | {f'residual_{layer}': value for layer, value in enumerate(rms)}


def train(config, model_config):
    """Run or continue the training of `config` (TrainConfig) and `model_config` (ZayaConfig). Return the losses that it
    logged as {step: loss}. Raises ValueError for settings, data or checkpoints that do not fit."""
    processes, data = start_processes(config), open_data(config, model_config)
    os.makedirs(config.out_dir, exist_ok=True)
    with exclusive_lock(os.path.join(config.out_dir, 'lock')) if processes[0] == 0 else contextlib.nullcontext():
        return run(config, *processes, *data)


def run(config, rank, world, device, loader, val_loader, tokenizer, model_config):
    """Train, alone in the run folder. See train."""
    say = tqdm.write if rank == 0 else lambda text: None        # tqdm's print keeps the progress bar in one piece
    model = build(config, model_config, device)
    for layer in model.layers if config.recompute else ():      # routers count each token twice then, in all alike
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    optimizers = make_optimizers(model, config.lr, config.weight_decay)
    if config.shard:
        optimizers[0].orthogonalize = functools.partial(orthogonalize_shards, orthogonalize)
    balancer = Balancer(model.routers, config.balancer, config.balancer_lr)
    step = resume(config, model, optimizers, balancer, tokenizer, say)
    dtype = pick_dtype(config.dtype, device, model_config.n_embd)         # the same in every process
    config.dtype, autocast = str(dtype)[6:], products_in(dtype, device)       # what a checkpoint remembers
    kernels.use(model, config.kernel, torch.float32 if device.type == 'cpu' else dtype)
    if rank == 0 and step == 0:                                 # sample.py finds it with the weights
        save_tokenizer(os.path.join(config.out_dir, 'bpe.json'), tokenizer)
    name, peak = name_and_peak(device, dtype)
    n, tokens_per_step = sizes(model_config), config.batch_size * model_config.context * config.grad_accum
    say(f'{n["total"]:,} parameters, {n["active"]:,} active a token (without the embedding), on {name} in '
        f'{config.dtype}{" x " + str(world) if world > 1 else ""}; data: {loader.n_tokens:,} tokens, '
        f'{tokens_per_step:,} a step, {config.max_steps * tokens_per_step / loader.n_tokens:.2f} epochs')
    columns = ['step', 'tokens', 'loss', 'val_loss', 'grad_norm', 'lr', 'tokens_per_s', 'mfu', 'entropy',
               *(f'{kind}_{layer}' for kind in ('entropy', 'residual') for layer in range(model_config.n_layer))]
    columns += (experts := [f'{kind}_{layer}_{e}' for kind in ('load', 'bias') for layer in range(model_config.n_layer)
                            for e in range(model_config.n_expert)])             # the bias: after the step of that load
    wandb = configurator.package('wandb') if config.wandb and rank == 0 else None
    if wandb:
        wandb.init(project='nanozaya', name=config.out_dir, config=asdict(config) | asdict(model_config))

    def log(row, keep_until=None):
        if rank == 0:
            write_log(config.out_dir, row, columns, keep_until)
        if wandb and row:
            wandb.log(row, step=step)

    def save():
        save_checkpoint(config.out_dir, {
            'model': model.state_dict(), 'optimizers': [o.state_dict() for o in optimizers],
            'balancer': balancer.adamw.state_dict(), 'step': step, 'config': asdict(config),
            'model_config': asdict(model_config), 'tokenizer': digest(tokenizer)})

    speaks = rank == 0 and not config.shard                     # of a sharded model, sample.py shows what it writes
    evaluation = lambda: evaluate(step, config, model, val_loader, autocast, tokenizer if speaks else None, say)
    log(None, keep_until=step or -1)                            # a new run begins with a new log
    if step == 0:                                               # before any learning: val loss is near ln(vocab_size)
        log({'step': 0, 'tokens': 0} | evaluation())
    model.train()
    for layer in model.layers if config.compile else ():        # layers that are alike share one program
        layer.compile()
    # With DDP, buffers are the balancer's business: it sums the loads over ranks and moves all biases alike.
    forward = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 and not config.shard else model

    history, bad_in_a_row, steps, seconds = {}, 0, 0, 0.0       # steps and seconds since the last line of the log
    with tqdm(total=config.max_steps, initial=step, disable=rank != 0, dynamic_ncols=True, mininterval=1,
              unit='step') as bar:                          # 'with': an error must not leave half a bar before its line
        while step < config.max_steps:
            began = time.perf_counter()
            loss, norm, finite, fractions = train_step(step, config, forward, optimizers, balancer, loader, autocast,
                                                       rank, world)
            step, steps, seconds = step + 1, steps + 1, seconds + time.perf_counter() - began
            bad_in_a_row = 0 if finite else bad_in_a_row + 1
            if not finite:
                say(f'step {step}: loss {loss}, gradient norm {norm}: not finite, step skipped')
            if bad_in_a_row in (10, config.max_steps):          # of fewer than ten steps, all of them
                raise ValueError(f'{bad_in_a_row} steps in a row had no finite loss or gradient; the last good '
                                 f'checkpoint, if any, is kept. Try a smaller lr (now {config.lr}) or dtype=float32')
            done = step == config.max_steps
            row = evaluation() if step % config.eval_every == 0 or done else {}
            if step % config.log_every == 0 or row:
                entropy = load_entropy(fractions)
                speed = steps * tokens_per_step / seconds       # of training alone, evaluations not counted
                row |= {'step': step, 'tokens': step * tokens_per_step, 'loss': loss, 'grad_norm': norm,
                        'lr': lr_at(step - 1, config), 'tokens_per_s': round(speed),
                        'mfu': peak and speed * n['train_flops'] / peak / world,
                        'entropy': entropy.mean().item()} | {f'entropy_{i}': e.item() for i, e in enumerate(entropy)}
                log(row | dict(zip(experts, torch.cat([fractions.flatten(), *balancer.biases]).tolist())))
                history[step], steps, seconds = loss, 0, 0.0
                bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tok/s, load entropy {row["entropy"]:.3f}')
            bar.update()
            # Not after a skipped step, unless it is the last: a run that goes on counts those in a row from 0.
            if (step % config.checkpoint_every == 0 and finite or done) and (rank == 0 or config.shard):
                save()
    say(f'python -m evidence.plot {config.out_dir}   draws its log')
    if dist.is_initialized():
        dist.destroy_process_group()
    return history


if __name__ == '__main__':
    with configurator.one_line_errors('train.py', 'try a smaller batch_size with a larger grad_accum',
                                      'run the same command again to go on from the last checkpoint'):
        train(*configurator.read(sys.argv[1:], TrainConfig, ZayaConfig))
