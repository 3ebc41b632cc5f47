"""Train a ZAYA1 model: `python train.py config/NAME.py --key=value`.

One optimizer step: forward and backward passes of `grad_accum` micro-batches; clip the gradient; step Muon and AdamW
(optim.py); update every router's balancing bias from the expert load of the global batch (Balancer in router.py).
ZAYA1 needs nothing else: there is no auxiliary loss, no capacity limit, no dropped token.

The run folder `out_dir` holds the last two checkpoints (ckpt.pt, ckpt_previous.pt), the tokenizer, and log.csv, one row
every `log_every` steps. The same command resumes a run; on a CPU its losses equal an uninterrupted run's bit for bit.

On several GPUs: `torchrun --nproc_per_node=8 train.py config/NAME.py`. Every process runs this file on its share of the
micro-batches; only rank 0 logs and saves. --shard=True splits a model that does not fit on one GPU (FSDP2).
"""
import contextlib
import functools
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace

from configurator import check_ranges, one_line_errors, package, read      # before torch, see configurator.py
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kernels
from data.loader import open_dataset
from data.tokenizer import digest, save_tokenizer
from model import Zaya, ZayaConfig, initial_value, sizes
from optim import make_optimizers
from router import Balancer, load_entropy
from runtime.checkpoint import exclusive_lock, log, log_columns, read_values, resume, save_checkpoint, write_log
from runtime.device import expert_path, matmuls_in, name_and_peak, pick_dtype, to_device
from runtime.distributed import (copy_into, is_rank0, orthogonalize_shards, print0, shard, start_processes,
                                 stop_processes)
from sample import SamplingOptions, generate


@dataclass
class TrainConfig:
    """The settings of a run, except for the model's sizes (ZayaConfig in model.py)."""
    out_dir: str = 'runs/small'     # the run folder
    dataset: str = 'data/stdlib'    # a folder written by data/*/prepare.py, or several: 'data/stdlib:0.3 data/chat:0.7'
    init_from: str = ''             # a run folder whose weights to start from, for example to extend the context
    batch_size: int = 16            # sequences per micro-batch; a step has batch_size * context * grad_accum tokens
    grad_accum: int = 1             # micro-batches per step over all processes, a multiple of their number
    max_steps: int = 1000           # optimizer steps of the run, over all its starts
    lr: float = 6e-3                # peak, for Muon and AdamW; vectors use a tenth of it (see optim.py)
    min_lr: float = 6e-4            # at the end of the decay
    warmup_steps: int = 50          # of linear warm-up
    decay_fraction: float = 0.5     # last fraction of the steps: linear decay to min_lr
    weight_decay: float = 0.1       # of matrices, decoupled from the gradient
    grad_clip: float = 1.0          # maximum norm of the gradient of all parameters; 0: no clipping
    balancer: str = 'pid'           # 'pid' (ZAYA1), 'sign' (DeepSeek's), 'none': see router.py
    balancer_lr: float = 3e-2       # step size of the balancing biases; not used by 'none'
    eval_every: int = 100           # steps between evaluations, each with a sample of text
    eval_batches: int = 20          # micro-batches of held-out data per evaluation, always the same ones
    sample_tokens: int = 100        # length of that sample; 0 (or --shard=True): no sample
    checkpoint_every: int = 100     # steps
    log_every: int = 10             # steps between rows of log.csv
    seed: int = 0                   # of the initial weights and of the order of the data
    device: str = 'auto'            # 'auto': cuda (also AMD's ROCm), else mps, else cpu
    dtype: str = 'auto'             # of matrix products; 'auto': bfloat16 where it is faster, else float32
    compile: bool = False           # the layers, on GPUs also Muon: half a minute at the start, faster steps
    kernel: str = 'torch'           # 'hip' or 'auto': the compiled CCA kernel, see kernels/README.md
    shard: bool = False             # under torchrun: split every tensor over the processes
    recompute: bool = False         # activation checkpointing: keep each layer's input, recompute the rest in backward
    wandb: bool = False             # also log to Weights & Biases (pip install wandb)

    def __post_init__(self):
        if not self.out_dir:
            raise ValueError('out_dir is empty: name a folder')
        low = lambda least, names: dict.fromkeys(names.split(), (least, None))
        check_ranges(
            self, **low(1, 'batch_size grad_accum max_steps eval_every eval_batches checkpoint_every log_every'),
            **low(0, 'lr min_lr warmup_steps weight_decay grad_clip balancer_lr sample_tokens seed'),
            decay_fraction=(0, 1), balancer=('pid', 'sign', 'none'), dtype=('auto', 'float32', 'bfloat16'),
            kernel=('torch', 'hip', 'auto'))


def lr_at(step, config):
    """Return the learning rate of optimizer step `step` (from 0): linear warm-up, constant, linear decay to min_lr."""
    left = (config.max_steps - step) / max(1, config.decay_fraction * config.max_steps)    # 1 at the start of the decay
    decayed = config.min_lr + (config.lr - config.min_lr) * min(1, left)
    return min(decayed, config.lr * (step + 1) / max(1, config.warmup_steps))   # decay and warm-up may overlap


# ---- setup ----

@dataclass
class Run:
    """What the steps of a run share, in one process."""
    config: TrainConfig
    model: Zaya
    forward: nn.Module              # the model, or DistributedDataParallel around it
    optimizers: list                # Muon, AdamW
    balancer: Balancer
    loader: object                  # training data (data/loader.py)
    val_loader: object = None       # held-out data
    tokenizer: object = None
    autocast: object = contextlib.nullcontext()                 # around forward passes of training and evaluation
    rank: int = 0
    world: int = 1                  # number of processes
    peak: float | None = None       # tokens/s at the devices' peak FLOP/s, if known
    tokens_per_step: int = 0
    step: int = 0                   # optimizer steps taken


def open_data(config, model_config):
    """Return the loaders of training and held-out data, the tokenizer, and model_config with the data's vocab_size."""
    (loader, tokenizer), (val_loader, _) = (
        open_dataset(config.dataset, split, config.batch_size, model_config.context, config.seed)
        for split in ('train', 'val'))
    V = loader.vocab_size
    if model_config.vocab_size not in (ZayaConfig.vocab_size, V):
        raise ValueError(f'vocab_size is {model_config.vocab_size}, but {config.dataset} has {V}: leave it out')
    return loader, val_loader, tokenizer, replace(model_config, vocab_size=V)


def build(config, model_config, device):
    """Return a new Zaya on device; with --shard, this process's part of it, with the same initial weights."""
    torch.manual_seed(config.seed)
    if not config.shard:
        return Zaya(model_config).to(device)
    with torch.device('meta'):                                  # allocates no memory
        model = Zaya(model_config)
    shard(model, device, pick_dtype(config.dtype, device) if device.type == 'cuda' else torch.float32)
    for name, tensor in model.state_dict().items():
        copy_into(tensor, initial_value(name, tensor.shape, model_config, config.seed))
    return model


def set_up(config, model_config, device, loader, val_loader, tokenizer):
    """Build the model and its optimizers, load the checkpoint if there is one, and return the Run."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = build(config, model_config, device)
    for layer in model.layers if config.recompute else ():      # routers count tokens twice: same fractions
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    optimizers = make_optimizers(model, config.lr, config.weight_decay, config.compile and device.type == 'cuda')
    if config.shard:
        optimizers[0].orthogonalize = functools.partial(orthogonalize_shards, optimizers[0].orthogonalize)
    balancer = Balancer(model.routers, config.balancer, config.balancer_lr)
    step = resume(config, model, optimizers, balancer, tokenizer)
    dtype = pick_dtype(config.dtype, device, model_config.n_embd)
    config.dtype, autocast = str(dtype)[6:], matmuls_in(dtype, device)         # 'auto' is resolved once for the run
    kernels.use(model, config.kernel, torch.float32 if device.type == 'cpu' else dtype)
    for layer in model.layers if config.compile else ():        # all layers share the graph compiled for the first
        layer.compile()
    # Buffers are not broadcast: the Balancer sums the loads over ranks, so that the biases are the same on each.
    forward = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 and not config.shard else model
    name, peak = name_and_peak(device, dtype)
    n, tokens = sizes(model_config), config.batch_size * model_config.context * config.grad_accum     # per step
    print0(f'{n["total"]:,} parameters, {n["active"]:,} active per token (without the embedding), on {name} in '
           f'{config.dtype}{f" x {world}" if world > 1 else ""}; data: {loader.n_tokens:,} tokens, '
           f'{tokens:,} per step, {config.max_steps * tokens / loader.n_tokens:.2f} epochs{expert_path(device, dtype)}')
    if rank == 0 and step == 0:                                 # sample.py reads it with the weights
        save_tokenizer(os.path.join(config.out_dir, 'bpe.json'), tokenizer)
    if rank == 0:                                               # a new run starts a new log
        write_log(config.out_dir, None, log_columns(model_config), keep_until=step or -1)
    if rank == 0 and config.wandb:
        package('wandb').init(project='nanozaya', name=config.out_dir, config=asdict(config) | asdict(model_config))
    return Run(config, model, forward, optimizers, balancer, loader, val_loader, tokenizer, autocast, rank, world,
               peak and peak * world / n['train_flops'], tokens, step)


# ---- steps ----

def save(run):
    """Save a checkpoint. All ranks call this for a sharded model."""
    save_checkpoint(run.config.out_dir, {
        'model': run.model.state_dict(), 'optimizers': [o.state_dict() for o in run.optimizers],
        'balancer': run.balancer.adamw.state_dict(), 'step': run.step, 'config': asdict(run.config),
        'model_config': asdict(run.model.config), 'tokenizer': digest(run.tokenizer), 'packed': run.loader.packed > 0})


def train_step(run):
    """Take one optimizer step. Return [loss, gradient norm before clipping], (2) float32, and the load fractions,
    (layers, N). If the loss or the norm is not finite, the step is skipped: no weight, bias or optimizer state changes.
    On CUDA the host reads none of these values, which would synchronize, and queues the next step."""
    config, device, world = run.config, run.model.device, run.world
    # The data is a function of the step: there is no loader state to save, and ranks read different batches.
    first = run.step * config.grad_accum
    batches = [to_device(run.loader.batch(first + i), device) for i in range(run.rank, config.grad_accum, world)]
    scored = torch.stack([(y >= 0).sum() for _, y, _ in batches])               # targets per micro-batch
    n, loss = scored.sum(), 0
    if world > 1:
        dist.all_reduce(n)
    for micro, (x, y, start) in enumerate(batches):
        last = micro == len(batches) - 1        # DDP averages over ranks in the last backward only, FSDP in each
        with contextlib.nullcontext() if last or world == 1 or config.shard else run.forward.no_sync():
            with run.autocast:
                _, micro_loss = run.forward(x, y, start)
            weight = scored[micro] / n.clamp_min(1)             # the loss is the mean over all targets of the step
            (micro_loss * weight * world).backward()            # * world: DDP and FSDP average over ranks
        loss += micro_loss.detach() * weight
    if world > 1:
        dist.all_reduce(loss)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    norm = norm.full_tensor() if config.shard else norm         # over the shards of all ranks
    values = torch.stack([loss, norm])
    found_inf = 1 - values.isfinite().all().float()             # 1: the optimizers change nothing
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr_at(run.step, config) * group['lr_scale']
        optimizer.found_inf = found_inf if found_inf.is_cuda else None      # read by the kernels, else in the next line
        if found_inf.is_cuda or not found_inf:
            optimizer.step()
        optimizer.zero_grad()
    return values, run.balancer.step(found_inf)


@torch.no_grad()
def evaluate(run):
    """Return log columns: mean held-out loss, residual RMS after each layer. Print a sample; of a prompt if packed."""
    config, model, loader = run.config, run.model, run.val_loader
    n = min(config.eval_batches, max(1, loader.n_windows // loader.batch_size))            # no sequence twice
    losses, scored, squares = [], [], []                        # squares: mean squares of layer 0, 1, ... per batch
    hooks = [layer.register_forward_hook(lambda module, args, out: squares.append(out[0].float().square().mean()))
             for layer in model.layers]
    model.eval()
    with torch.compiler.set_stance('force_eager') if config.compile else contextlib.nullcontext():  # no extra graphs
        for index in range(n):
            x, y, start = to_device(loader.batch(index), model.device)
            with run.autocast:
                scored.append((y >= 0).sum())
                losses.append(model(x, y, start)[1] * scored[-1])
        for hook in hooks:
            hook.remove()
        val_loss = (sum(losses) / sum(scored).clamp_min(1)).item()
        print0(f'step {run.step}: val loss {val_loss:.4f}')
        if config.sample_tokens and run.rank == 0 and not config.shard and math.isfinite(val_loss):
            prompt = x[0, :(y[0] >= 0).int().argmax() + 1].tolist() if loader.packed else [run.tokenizer.eot_token]
            n_new, options = min(config.sample_tokens, loader.context - len(prompt)), SamplingOptions(seed=run.step)
            text = run.tokenizer.decode(prompt[:-1] + generate(model, [prompt], n_new, options)[0])
            print0('    ' + text.strip().replace('\n', '\n    '))
    model.train()
    rms = torch.stack(squares).view(n, -1).mean(0).sqrt().tolist()
    return {'val_loss': val_loss} | {f'residual_{layer}': value for layer, value in enumerate(rms)}


def take_steps(run):
    """Train until max_steps. Return the logged losses, {step: loss}."""
    config, columns, history, values, skipped = run.config, log_columns(run.model.config), {}, [], 0
    steps, seconds = 0, 0.0                                     # since the last row of the log
    if run.step == 0:                                           # before any training: val loss is near ln(vocab_size)
        log(run, evaluate(run))
    with tqdm(total=config.max_steps, initial=run.step, disable=run.rank != 0, dynamic_ncols=True, mininterval=1,
              unit='step') as bar:                              # an error closes the bar before its message is printed
        while run.step < config.max_steps:
            began = time.perf_counter()
            value, load = train_step(run)
            run.step, steps, values = run.step + 1, steps + 1, [*values, value]
            evaluates, logs, saves = (run.step % every == 0 or run.step == config.max_steps for every in (
                config.eval_every, config.log_every, config.checkpoint_every))
            if evaluates or logs or saves:
                (loss, norm, skipped), values = read_values(values, run.step, skipped, config), []
            seconds += time.perf_counter() - began
            row = evaluate(run) if evaluates else {}
            if logs or evaluates:
                entropy, speed = load_entropy(load), steps * run.tokens_per_step / seconds     # evaluations excluded
                by_expert = torch.cat([load.flatten(), *run.balancer.biases]).tolist()
                log(run, row | {
                    'loss': loss, 'grad_norm': norm, 'lr': lr_at(run.step - 1, config), 'tokens_per_s': round(speed),
                    'mfu': run.peak and speed / run.peak, 'entropy': entropy.mean().item(),
                    **{f'entropy_{layer}': e.item() for layer, e in enumerate(entropy)},
                    **dict(zip(columns[-len(by_expert):], by_expert))})
                bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tok/s, load entropy {entropy.mean():.3f}')
                history[run.step], steps, seconds = loss, 0, 0.0
            bar.update()
            # No checkpoint after a skipped step (resuming resets the count of skipped steps), except at the end.
            if saves and (not skipped or run.step == config.max_steps) and (run.rank == 0 or config.shard):
                save(run)
    return history


def train(config, model_config):
    """Train `model_config` (ZayaConfig) as `config` (TrainConfig) says, or resume that run. Return the logged losses,
    {step: loss}. Raise ValueError for settings, data or checkpoints that do not fit."""
    device = start_processes(config)
    loader, val_loader, tokenizer, model_config = open_data(config, model_config)
    os.makedirs(config.out_dir, exist_ok=True)
    with exclusive_lock(os.path.join(config.out_dir, 'lock')) if is_rank0() else contextlib.nullcontext():
        history = take_steps(set_up(config, model_config, device, loader, val_loader, tokenizer))
    print0(f'python -m evidence.plot {config.out_dir}   plots its log')
    stop_processes()
    return history


if __name__ == '__main__':
    with one_line_errors('train.py', 'try a smaller batch_size with a larger grad_accum',
                                      'run the same command again to resume from the last checkpoint'):
        train(*read(sys.argv[1:], TrainConfig, ZayaConfig))
