"""Reinforcement learning from verifiable rewards, as in ZAYA1: `python rl.py config/rl.py`.

The model generates G rollouts per prompt, and a verifier decides which are right. The tokens of right rollouts become
more likely, those of wrong ones less likely (ZAYA1-8B report, arXiv 2605.05365, IV-B to IV-F). For rollout i,

    r_i  = 1 if right, 0 if wrong or if it repeats itself       the reward; r is its mean over the G rollouts
    A_i  = (r_i - r) / r                                        MaxRL: upweights prompts with a low pass rate
    m_it = 1 if |p_it - q_it| <= delta, else 0                  Binary-TV: no gradient outside the trust region
    L    = -1/R sum_i A_i sum_t m_it p_it / q_it                summed over tokens t, mean over R rollouts

q_it is the probability with which the generator sampled token t; p_it is the learner's, through which the gradient
flows. There is no KL term and no clipping. Groups all right or all wrong have A = 0: other prompts replace them, up to
a limit.

Router replay. Generator and learner may differ by rounding, which changes the choice between two nearly tied experts.
So the learner uses the experts that the generator chose. Only the choice is replayed: the weights of the experts are
computed by the learner, and through them the router receives gradients.

Some prompts are problems, solved in one rollout; their length increases while most are solved. The others are rounds of
Markovian RSA (rsa.py): the G rollouts of a prompt are a population, and the next round has G new rollouts whose prompt
holds some of its tails. These are the model's own tails, some of them wrong, not the simulated ones of its training
data. Most rounds end before an answer; then the rollout must continue from a tail, and its last value must be right,
which the program determines (verify in tasks/loops/task.py).

Legend:  G rollouts per prompt   R rollouts in an update   B sequences   L layers   S tokens of prompt and output
         n tokens of an output
"""
import contextlib
import copy
import functools
import math
import os
import random
import shutil
import statistics
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, replace

import configurator                             # before torch: it sets how threads wait
import torch
from tqdm import tqdm

import decode
from evaluate import measure
from optim import make_optimizers
from router import Balancer, choose, load_entropy
from rsa import RSASettings
from runtime.checkpoint import load_checkpoint, restore, save_checkpoint, write_log
from runtime.device import pick_device
from sample import SamplingOptions, generate
from tasks.loops import task
from tasks.policy import load_policy
from tasks.problems import repeats


@dataclass
class RLConfig:
    out_dir: str = 'runs/rl'
    init_from: str = 'runs/loops'   # a run on the loops task, whose weights are the initial ones
    max_steps: int = 28
    groups: int = 24                # prompts per step, at most, whose rollouts are partly right
    rollouts: int = 16              # G
    draws: int = 2                  # attempts per step to find such prompts
    aggregation: float = 0.75       # fraction of prompts that are RSA rounds
    candidates: int = 4             # C, tails in the prompt of a round; with probability 1/4 only 1
    budget: int = 41                # most tokens of a round: a value and 8 steps
    tail: int = 10                  # tokens of a tail: 2 steps
    level: int = 24                 # initial maximum of steps of a problem; it is adapted to the rewards
    operations: int = task.MAX_OPERATIONS     # most operations of a program
    advantage: str = 'maxrl'        # 'grpo': divide by the standard deviation instead
    updates: int = 1                # optimizer steps on the same rollouts
    delta: float = 0.1              # the trust region
    replay: bool = True             # router replay
    generator: str = 'float32'      # 'bfloat16': precision of the generator; the learner's is float32
    lr: float = 4e-3                # for Muon, without momentum, and AdamW; a tenth for vectors (optim.py)
    decay_fraction: float = 0.5     # final fraction of the steps, in which lr decays to 0
    grad_clip: float = 1.0
    balancer_lr: float = 0.0        # 0: the balancing biases stay fixed
    eval_every: int = 20            # steps between evaluations; each saves a checkpoint
    eval_problems: int = 20         # held-out problems of 25 to 32 steps
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        low = lambda least, names: dict.fromkeys(names.split(), (least, None))
        configurator.check_ranges(
            self, **low(1, 'max_steps groups draws budget updates eval_every'), **low(0, 'delta lr balancer_lr seed'),
            eval_problems=(0, None), rollouts=(2, None), candidates=(1, self.rollouts), tail=(1, self.budget),
            level=(3, 72), operations=(3, 26), grad_clip=(1e-9, None), aggregation=(0, 1), decay_fraction=(1e-9, 1),
            advantage=('maxrl', 'grpo'), generator=('float32', 'bfloat16'))


# prompt, output: tokens. q (n) float32: probabilities of the output's tokens. experts (S - 1, L) uint8: the chosen
# experts of all tokens but the last.
Rollout = namedtuple('Rollout', 'prompt output q experts')


@contextlib.contextmanager
def choosing(model, function):
    """Replace the routers' choice of experts by function(layer, probs, bias) in a `with` block."""
    try:
        for layer, router in enumerate(model.routers):
            router.choose = functools.partial(function, layer)
        yield
    finally:
        for router in model.routers:
            router.choose = choose


def generator_of(model, precision):
    """Return the model that generates rollouts: the learner, or a bf16 copy with the float32 balancing biases."""
    if precision == 'float32':
        return model
    generator = copy.deepcopy(model).bfloat16()
    for router, exact in zip(generator.routers, model.routers):
        router.balancing_bias = exact.balancing_bias
    return generator


def roll_out(model, prompts, max_new_tokens, seed):
    """Continue prompts at temperature 1. Return a Rollout per prompt."""
    newest, steps = [None] * model.config.n_layer, []           # experts of the latest forward pass, per layer

    def choose_and_record(layer, probs, bias):
        newest[layer], weight = choose(probs, bias)
        return newest[layer], weight

    def watch(active, logits, tokens):
        q = logits.softmax(-1).gather(1, tokens[:, None])[:, 0]
        steps.append((active, q.cpu(), torch.stack(newest, -1).byte().cpu()))

    with choosing(model, choose_and_record):
        outputs = generate(model, prompts, max_new_tokens, SamplingOptions(seed=seed), stop=[task.END], watch=watch)
    q = torch.zeros(len(prompts), max_new_tokens)
    experts = torch.zeros(*q.shape, len(newest), dtype=torch.uint8)
    for t, (active, of_tokens, chosen) in enumerate(steps):
        q[active, t] = of_tokens
        if t:                                                   # this forward pass was over the previous token
            experts[active, t - 1] = chosen
    of_prompt = dict(zip(dict.fromkeys(map(tuple, prompts)), steps[0][2]))      # equal prompts are prefilled once
    return [Rollout(prompt, output, q[i, :len(output)],
                    torch.cat([of_prompt[tuple(prompt)][:len(prompt)], experts[i, :len(output) - 1]]))
            for i, (prompt, output) in enumerate(zip(prompts, outputs))]


def advantages(rewards, rule='maxrl'):
    """Return the advantages A of a group, one per reward; zeros if all rewards are equal."""
    r, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - r) / (r if rule == 'maxrl' else spread) if spread else 0.0 for reward in rewards]


def probabilities(model, rollouts, replay=True):
    """Return p of all output tokens, concatenated, with gradient; the mean entropy of their distributions; and the
    fraction of tokens for which the router of some layer would choose another expert than the recorded one."""
    pad = lambda tensors: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(model.device)
    tokens = pad([torch.tensor([*x.prompt, *x.output[:-1]]) for x in rollouts])            # (B, S - 1)
    scored = pad([torch.arange(len(x.experts)) >= len(x.prompt) - 1 for x in rollouts])    # after the prompt
    experts, other = pad([x.experts.long() for x in rollouts]), torch.zeros_like(scored)   # (B, S - 1, L)
    targets = torch.tensor([token for x in rollouts for token in x.output], device=model.device)

    def choose_again(layer, probs, bias):
        own, weight = choose(probs, bias)
        recorded = experts[..., layer]
        other.logical_or_(own != recorded)
        return (recorded, probs.gather(-1, recorded[..., None])[..., 0]) if replay else (own, weight)

    with choosing(model, choose_again):
        logp = model(tokens)[0][scored].log_softmax(-1)                                    # (all n, V)
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    return logp.gather(-1, targets[:, None])[:, 0].exp(), entropy, other[scored].float().mean().item()


def token_loss(p, q, A, delta):
    """Return the sum of -A m p / q over tokens, and the number of masked tokens. p, q, A: one value per token."""
    m = (p.detach() - q).abs() <= delta
    return -(A * m * p / q).sum(), (~m).sum().item()


def learn(model, optimizers, pairs, config, lr):
    """Update the model from pairs of rollout and advantage. Return values for the log."""
    pairs, n_tokens = sorted(pairs, key=lambda pair: len(pair[0].experts)), sum(len(x.output) for x, _ in pairs)
    for _ in range(config.updates):
        row = {'entropy': 0.0, 'replayed': 0.0, 'masked': 0.0}
        for start in range(0, len(pairs), 64):                  # similar lengths share a batch
            batch, A = zip(*pairs[start:start + 64])
            p, entropy, share = probabilities(model, batch, config.replay)
            per_token = p.new_tensor([a for x, a in zip(batch, A) for _ in x.output])
            loss, masked = token_loss(p, torch.cat([x.q for x in batch]).to(p), per_token, config.delta)
            (loss / len(pairs)).backward()
            for key, value in zip(row, (entropy * len(p), share * len(p), masked)):
                row[key] += value / n_tokens
        row['grad_norm'] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr * group['lr_scale']
            optimizer.step()
            optimizer.zero_grad()
    return row


# ---- prompts and rewards ----

def draw_prompts(rng, n, level, populations, config):
    """Sample n prompts: [(question, tails, is_round)]. A round is the next one of a population, which is removed from
    `populations`, or the first one of a problem of 3 to 72 steps: the budget bounds it, however long the problem is."""
    question_of = lambda low, high: task.draw_problem(rng, low, high, 'train', config.operations).question
    drawn = [(question_of(max(3, level - 8), level), [], False) for _ in range(n - round(config.aggregation * n))]
    while len(drawn) < n:
        question, tails = populations.pop(0) if populations else (question_of(3, 72), [])
        drawn.append((question, tails and rng.sample(tails, rng.choice((1, *[config.candidates] * 3))), True))
    return drawn


def collect(step, model, level, populations, config):
    """Generate the rollouts of a step. Return the groups to learn from, [(rollouts, rewards)], and values for the log.
    A population with some right outputs and answers in less than half is added to `populations` with its new tails."""
    groups, right, made, G = [], ([], []), [], config.rollouts           # right[is_round]: pass rate per group
    for draw in range(config.draws):
        rng = random.Random(f'{config.seed} {step} {draw}')
        drawn = draw_prompts(rng, config.groups - len(groups), level, populations, config)
        for is_round in False, True:
            asked = [(question, tails) for question, tails, kind in drawn if kind == is_round]
            prompts = [task.build_prompt(task.ENC.encode_ordinary(question), tails)
                       for question, tails in asked for _ in range(G)]
            room = config.budget if is_round else task.STEP * level + 8       # slightly more than any right output has
            made += roll_out(model, prompts, room, hash((config.seed, step, draw, is_round))) if prompts else []
            for i, (question, tails) in enumerate(asked, start=len(made) // G - len(asked)):
                group = made[i * G:(i + 1) * G]
                rewards = [float(task.verify(question, tails, x.output, room) and not repeats(x.output)) for x in group]
                right[is_round].append(statistics.fmean(rewards))
                if 0 < sum(rewards) < G:
                    groups.append((group, rewards))
                if is_round and any(rewards) and sum(task.answer_of(x.output) is not None for x in group) < G / 2:
                    populations.append((question, [x.output[-config.tail:] for x in group]))
    (problems, rounds), n = (statistics.fmean(x or [math.nan]) for x in right), sum(len(x.output) for x in made)
    return groups, dict(reward=problems, round_reward=rounds, groups=len(groups), length=n / len(made), generated=n)


# ---- running ----
SHOWN = 'reward round_reward level length entropy masked replayed tokens_per_s'.split()         # in the progress bar
COLUMNS = ['step', *SHOWN, *'groups generated grad_norm load_entropy lr seconds held_out'.split()]      # log.csv


def set_up(config):
    """Resume the run in out_dir, or start from the weights of init_from. Return the policy, optimizers, balancer, step,
    level and populations. Raise ValueError for a run of another kind."""
    saved = load_checkpoint(config.out_dir)
    if saved and 'populations' not in saved:
        raise ValueError(f'out_dir: {config.out_dir} holds another kind of run, choose another folder')
    policy = load_policy(config.out_dir if saved else config.init_from, pick_device(config.device))
    if policy.build_prompt is not task.build_prompt:
        raise ValueError(f'init_from: {config.init_from} was not trained on the loops task (config/loops.py)')
    optimizers = make_optimizers(policy.model, config.lr, weight_decay=0)
    optimizers[0].param_groups[0]['momentum'] = 0
    balancer = Balancer(policy.model.routers, lr=config.balancer_lr)
    if not saved:
        os.makedirs(config.out_dir, exist_ok=True)
        shutil.copy(os.path.join(config.init_from, 'bpe.json'), config.out_dir)       # loaded by load_policy
        return policy, optimizers, balancer, 0, config.level, []
    restore([*optimizers, balancer.adamw], saved['states'], config.out_dir)
    return policy, optimizers, balancer, saved['step'], saved['level'], saved['populations']


def train(config):
    """Start or resume the run of `config`."""
    policy, optimizers, balancer, step, level, populations = set_up(config)
    model, held_out = policy.model, task.test_problems('hard', config.eval_problems)
    # A prompt has 2 tokens per operation and 9 more, an output 5 tokens per step and 8 more.
    longest = min(9 * config.operations, (model.config.context - (2 * config.operations + 9) - 8) // task.STEP)
    level = min(level, longest)
    write_log(config.out_dir, None, COLUMNS, keep_until=step or -1)
    with tqdm(total=config.max_steps, initial=step, dynamic_ncols=True, mininterval=1, unit='step') as bar:
        while step < config.max_steps:
            began, lr = time.perf_counter(), config.lr * min(1, (1 - step / config.max_steps) / config.decay_fraction)
            groups, row = collect(step, generator_of(model, config.generator), level, populations, config)
            if groups:
                pairs = [pair for group, r in groups for pair in zip(group, advantages(r, config.advantage))]
                chosen = torch.cat([x.experts for x, _ in pairs]).long()        # the expert load of the rollouts
                for layer, router in enumerate(model.routers):
                    router.load += chosen[:, layer].bincount(minlength=len(router.load)).to(model.device)
                row |= learn(model, optimizers, pairs, config, lr)
                row['load_entropy'] = load_entropy(balancer.step()).mean().item()
            level = min(longest, level + 1) if row['reward'] > 0.7 else max(3, level - (row['reward'] == 0))
            step, seconds = step + 1, time.perf_counter() - began
            row |= dict(step=step, level=level, lr=lr, seconds=seconds, tokens_per_s=row['generated'] / seconds)
            if save := (step % config.eval_every == 0 or step == config.max_steps):
                if held_out:
                    row['held_out'] = measure(replace(policy, step=decode.folded(model)), held_out,
                                              RSASettings(candidates=1, rounds=0, tail=1), unbounded=True).mean
                    tqdm.write(f'step {step}: {100 * row["held_out"]:.1f} % of held-out problems')
            write_log(config.out_dir, row, COLUMNS)
            bar.set_postfix_str(', '.join(f'{key} {row[key]:.3g}' for key in SHOWN if key in row))
            bar.update()
            if save:
                save_checkpoint(config.out_dir, {
                    'model': model.state_dict(), 'states': [o.state_dict() for o in (*optimizers, balancer.adamw)],
                    'step': step, 'level': level, 'populations': populations, 'model_config': asdict(model.config)})


if __name__ == '__main__':
    with configurator.one_line_errors('rl.py', 'try fewer --groups',
                                      'run the same command again to resume from the last checkpoint'):
        train(*configurator.read(sys.argv[1:], RLConfig))
