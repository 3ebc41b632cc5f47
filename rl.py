"""Reinforcement learning from verifiable rewards, as ZAYA1 does it: `python rl.py config/rl.py`.

The idea. Let the model try a problem G times; a verifier says which rollouts are right. Then make the tokens of those
likelier, and the tokens of the others less likely (ZAYA1-8B report, arXiv 2605.05365, IV-B to IV-F). For rollout i,

    r_i  = 1 if right, 0 if wrong or if it repeats itself       the reward; r is its mean over the G rollouts
    A_i  = (r_i - r) / r                                        MaxRL: what is seldom right counts for more
    m_it = 1 if |p_it - q_it| <= delta, else 0                  Binary-TV: who has moved too far gets no gradient
    L    = -1/R sum_i A_i sum_t m_it p_it / q_it                summed over tokens t, mean over R rollouts

q_it is the probability with which the generator drew token t, and p_it the learner's, which has the gradient. There is
no KL term and no clipping. Groups all right or all wrong have A = 0: others are drawn for them, within bounds.

Router replay. Generator and learner may differ by rounding; where two experts are nearly tied, that can pick another
one. So the learner takes the experts that the generator chose: the choice only. Their weights are its own, and through
these the router still learns.

Prompts are of two kinds. Some are problems, solved in one rollout; they become longer while most are solved. The others
are rounds of Markovian RSA (rsa.py): the G rollouts of a prompt are a population, and in its next round G new rollouts
read some of its tails, errors too: the model's own, not made up as in its data. Most rounds end before an answer. Then
the last value written must be right, which is as sure a sign: the program says what it is after any step. A rollout
that does not go on from a tail has no reward (tasks/loops/task.py: verify).

Legend:  G rollouts of a prompt   R rollouts learned from   B rows   L layers   S tokens of prompt and output   n output
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
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import configurator
import decode
from runtime.checkpoint import load_checkpoint, restore, save_checkpoint, write_log
from tasks.loops import task
from evaluate import TableConfig, measure
from tasks.problems import repeats
from optim import make_optimizers
from router import Balancer, choose, load_entropy
from rsa import load_policy
from sample import generate
from runtime.device import pick_device


@dataclass
class RLConfig:
    out_dir: str = 'runs/rl'
    init_from: str = 'runs/loops'   # a run on the loops task, whose weights to begin with
    max_steps: int = 28
    groups: int = 24                # prompts that a step is to learn from; it may find fewer
    rollouts: int = 16              # G, of each
    draws: int = 2                  # times that a step draws prompts, to find groups both right and wrong
    aggregation: float = 0.75       # share of the prompts that are rounds of a population
    candidates: int = 4             # C, tails that a round reads; one round in four, by chance, reads 1
    budget: int = 41                # of a round: the value and 8 steps
    tail: int = 10                  # the last 2 steps
    level: int = 24                 # most steps of a problem, at first: it follows the rewards
    operations: int = task.MAX_OPERATIONS     # most that a program has
    advantage: str = 'maxrl'        # 'grpo': divided by the standard deviation instead
    updates: int = 1                # from the same rollouts
    delta: float = 0.1              # the trust region
    replay: bool = True             # False: the learner chooses experts itself
    generator: str = 'float32'      # 'bfloat16': of the rollouts; the learner is float32 always
    lr: float = 4e-3                # for Muon, without momentum, and AdamW; vectors a tenth (optim.py)
    decay_fraction: float = 0.5     # of the steps, the last ones, in which it falls to 0
    grad_clip: float = 1.0
    balancer_lr: float = 0.0        # 0: the balancing biases rest
    eval_every: int = 20            # steps between evaluations, each with a checkpoint
    eval_problems: int = 20         # held out, of 25 to 32 steps
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        low = lambda least, names: dict.fromkeys(names.split(), (least, None))
        configurator.check_ranges(
            self, **low(1, 'max_steps groups draws budget updates eval_every'), **low(0, 'delta lr balancer_lr seed'),
            eval_problems=(0, None), rollouts=(2, None), candidates=(1, self.rollouts), tail=(1, self.budget),
            level=(3, 72), operations=(3, 26), grad_clip=(1e-9, None), aggregation=(0, 1), decay_fraction=(1e-9, 1),
            advantage=('maxrl', 'grpo'), generator=('float32', 'bfloat16'))


# prompt, output: tokens. q (n) float32: probabilities of output. experts (S - 1, L) uint8: of all tokens but the last.
Rollout = namedtuple('Rollout', 'prompt output q experts')


@contextlib.contextmanager
def choosing(model, function):
    """Let the routers choose by function(layer, probs, bias) until the `with` ends."""
    try:
        for layer, router in enumerate(model.routers):
            router.choose = functools.partial(function, layer)
        yield
    finally:
        for router in model.routers:
            router.choose = choose


def generator_of(model, precision):
    """The model that makes the rollouts: the learner, or a copy in bf16 whose balancing biases are exact."""
    if precision == 'float32':
        return model
    generator = copy.deepcopy(model).bfloat16()
    for router, exact in zip(generator.routers, model.routers):
        router.balancing_bias = exact.balancing_bias
    return generator


def roll_out(model, prompts, max_new_tokens, seed):
    """Let a model continue prompts, at temperature 1. Return a Rollout for each."""
    newest, steps, step = [None] * model.config.n_layer, [], decode.folded(model)

    def choose_and_keep(layer, probs, bias):
        newest[layer], weight = choose(probs, bias)             # of the latest forward
        return newest[layer], weight

    def watch(rows, logits, drawn):
        q = logits.softmax(-1).gather(1, drawn[:, None])[:, 0]
        steps.append((rows, q.cpu(), torch.stack(newest, -1).byte().cpu()))

    with choosing(model, choose_and_keep):
        outputs = generate(model, prompts, max_new_tokens, stop=[task.END], seed=seed, step=step, watch=watch)
    q = torch.zeros(len(prompts), max_new_tokens)
    experts = torch.zeros(*q.shape, len(newest), dtype=torch.uint8)
    for t, (rows, of_drawn, chosen) in enumerate(steps):
        q[rows, t] = of_drawn
        if t:                                                   # this forward read the token of the step before
            experts[rows, t - 1] = chosen
    read = dict(zip(dict.fromkeys(map(tuple, prompts)), steps[0][2]))           # equal prompts were read once
    return [Rollout(prompt, output, q[row, :len(output)],
                    torch.cat([read[tuple(prompt)][:len(prompt)], experts[row, :len(output) - 1]]))
            for row, (prompt, output) in enumerate(zip(prompts, outputs))]


def advantages(rewards, rule='maxrl'):
    """A of a group, a list like its rewards; zeros if those are all alike."""
    r, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - r) / (r if rule == 'maxrl' else spread) if spread else 0.0 for reward in rewards]


def probabilities(model, rollouts, replay=True):
    """p of all tokens of the outputs, one after the other, with gradient; the mean entropy of their distributions; and
    the share of them for which, in some layer, the router would choose another expert than the given one."""
    pad = lambda tensors: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(model.device)
    tokens = pad([torch.tensor([*x.prompt, *x.output[:-1]]) for x in rollouts])            # (B, S - 1)
    scored = pad([torch.arange(len(x.experts)) >= len(x.prompt) - 1 for x in rollouts])    # from the prompt's last on
    experts, other = pad([x.experts.long() for x in rollouts]), torch.zeros_like(scored)   # (B, S - 1, L)
    targets = torch.tensor([token for x in rollouts for token in x.output], device=model.device)

    def choose_again(layer, probs, bias):
        own, weight = choose(probs, bias)
        given = experts[..., layer]
        other.logical_or_(own != given)
        return (given, probs.gather(-1, given[..., None])[..., 0]) if replay else (own, weight)

    with choosing(model, choose_again):
        logp = model(tokens)[0][scored].log_softmax(-1)                                    # (all n, V)
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    return logp.gather(-1, targets[:, None])[:, 0].exp(), entropy, other[scored].float().mean().item()


def token_loss(p, q, A, delta):
    """The sum of -A m p / q over tokens, and how many of them are masked. p, q, A: a number for each token."""
    m = (p.detach() - q).abs() <= delta
    return -(A * m * p / q).sum(), (~m).sum().item()


def learn(model, optimizers, pairs, config, lr):
    """Update the model from R rollouts with their advantages, pairs. Return a row of the log."""
    pairs, n_tokens = sorted(pairs, key=lambda pair: len(pair[0].experts)), sum(len(x.output) for x, _ in pairs)
    for _ in range(config.updates):
        row = {'entropy': 0.0, 'replayed': 0.0, 'masked': 0.0}
        for start in range(0, len(pairs), 64):                  # those of like lengths together
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
    """Draw n prompts: [(question, tails, is it a round?)]. Rounds are the next of populations, which are taken out, or
    the first of a problem of 3 to 72 steps: a round writes one budget, however long its problem."""
    question_of = lambda low, high: task.draw_problem(rng, low, high, 'train', config.operations).question
    drawn = [(question_of(max(3, level - 8), level), [], False) for _ in range(n - round(config.aggregation * n))]
    while len(drawn) < n:
        question, tails = populations.pop(0) if populations else (question_of(3, 72), [])
        drawn.append((question, tails and rng.sample(tails, rng.choice((1, *[config.candidates] * 3))), True))
    return drawn


def collect(step, model, level, populations, config):
    """Make the rollouts of a step. Return the groups to learn from, [(rollouts, rewards)], and a row of the log. A
    population of which some are right, but less than half have an answer, is put back with its new tails."""
    groups, right, made, G = [], ([], []), [], config.rollouts           # right[is round]: the share of each group
    for draw in range(config.draws):
        rng = random.Random(f'{config.seed} {step} {draw}')
        drawn = draw_prompts(rng, config.groups - len(groups), level, populations, config)
        for is_round in False, True:
            asked = [(question, tails) for question, tails, kind in drawn if kind == is_round]
            prompts = [task.build_prompt(task.ENC.encode_ordinary(question), tails)
                       for question, tails in asked for _ in range(G)]
            room = config.budget if is_round else task.STEP * level + 8       # a little more than any right one has
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
SHOWN = 'reward round_reward level length entropy masked replayed tokens_per_s'.split()                 # beside the bar
COLUMNS = ['step', *SHOWN, *'groups generated grad_norm load_entropy lr seconds held_out'.split()]      # log.csv


def set_up(config):
    """Continue the run in out_dir, or begin with the weights of init_from. Return the policy (rsa.py), optimizers,
    balancer, and what else moves: step, level, populations. Raise ValueError for a run of another kind."""
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
        shutil.copy(os.path.join(config.init_from, 'bpe.json'), config.out_dir)       # load_policy has just read it
        return policy, optimizers, balancer, 0, config.level, []
    restore([*optimizers, balancer.adamw], saved['states'], config.out_dir)
    return policy, optimizers, balancer, saved['step'], saved['level'], saved['populations']


def train(config):
    """Run or continue the run of `config`."""
    policy, optimizers, balancer, step, level, populations = set_up(config)
    model, held_out = policy.model, task.test_problems('hard', config.eval_problems)
    # A prompt has 2 tokens an operation and 9 more, an output 5 a step and 8 more.
    longest = min(9 * config.operations, (model.config.context - (2 * config.operations + 9) - 8) // task.STEP)
    level = min(level, longest)
    write_log(config.out_dir, None, COLUMNS, keep_until=step or -1)
    with tqdm(total=config.max_steps, initial=step, dynamic_ncols=True, mininterval=1, unit='step') as bar:
        while step < config.max_steps:
            began, lr = time.perf_counter(), config.lr * min(1, (1 - step / config.max_steps) / config.decay_fraction)
            groups, row = collect(step, generator_of(model, config.generator), level, populations, config)
            if groups:
                pairs = [pair for group, r in groups for pair in zip(group, advantages(r, config.advantage))]
                chosen = torch.cat([x.experts for x, _ in pairs]).long()        # the load is that of the rollouts
                for layer, router in enumerate(model.routers):
                    router.load += chosen[:, layer].bincount(minlength=len(router.load)).to(model.device)
                row |= learn(model, optimizers, pairs, config, lr)
                row['load_entropy'] = load_entropy(balancer.step()).mean().item()
            level = min(longest, level + 1) if row['reward'] > 0.7 else max(3, level - (row['reward'] == 0))
            step, seconds = step + 1, time.perf_counter() - began
            row |= dict(step=step, level=level, lr=lr, seconds=seconds, tokens_per_s=row['generated'] / seconds)
            if save := (step % config.eval_every == 0 or step == config.max_steps):
                if held_out:
                    row['held_out'] = measure(policy._replace(step=decode.folded(model)), held_out, TableConfig(),
                                              'held out', candidates=1, rounds=0, tail=1).mean
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
                                      'run the same command again to go on from the last checkpoint'):
        train(*configurator.read(sys.argv[1:], RLConfig))
