"""Reinforcement learning from verifiable rewards, as ZAYA1 does it: `python rl.py config/rl.py`.

The idea. Let the model try a problem G times; a verifier says which rollouts are right. Then make the tokens of those
likelier, and the tokens of the others less likely (ZAYA1-8B report, arXiv 2605.05365, IV-B to IV-F). For rollout i,

    r_i  = 1 if right, 0 if wrong or if it repeats itself       the reward; r is its mean over the G rollouts
    A_i  = (r_i - r) / r                                        MaxRL: what is seldom right counts for more
    m_it = 1 if |p_it - q_it| <= delta, else 0                  Binary-TV: who has moved too far gets no gradient
    L    = -1/R sum_i A_i sum_t m_it p_it / q_it                summed over tokens t, the mean over all R rollouts

q_it is the probability with which the generator drew token t, and p_it the learner's, which has the gradient. There is
no KL term and no clipping. Groups that are all right or all wrong have A = 0: others are drawn for them, within bounds.

Router replay. Generator and learner may differ by rounding, and where two experts are nearly tied that decides which
one works. So the learner takes the experts that the generator chose: the choice only. Their weights are its own, and
through these the router still learns.

Prompts are of two kinds. Some are problems, to be solved in one rollout: they become longer while most are solved. The
others are rounds of Markovian RSA (rsa.py): a group's rollouts are a population, and one step later G rollouts read
tails of it, right and wrong ones as they came. So errors in tails are the model's own, not made up as in its
data. Few rounds come to an answer; that of the others is the last value they write, which can be checked as well, since
the program says what the value must be after any step (task.verify).

Legend:  G rollouts of a prompt   R rollouts of a step   L layers   n tokens of an output   S of prompt and output
"""
import contextlib
import copy
import os
import random
import shutil
import sys
import time
import zlib
from collections import namedtuple
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

import configurator
import decode
from checkpoint import load_checkpoint, save_checkpoint, write_log
from data.loops import task
from data.loops.evaluate import TableConfig, measure
from optim import make_optimizers
from router import Balancer, choose, load_entropy
from rsa import load_speaker
from sample import generate
from train import lr_at


@dataclass
class RLConfig:
    out_dir: str = 'runs/rl'
    init_from: str = 'runs/loops'   # a run on the loops task, whose weights to begin with
    max_steps: int = 60
    # prompts and rollouts
    groups: int = 16                # prompts that a step is to learn from
    rollouts: int = 16              # G, of each
    draws: int = 2                  # at most so often are prompts drawn, to find groups both right and wrong
    aggregation: float = 0.5        # share of the prompts that are rounds of a population
    candidates: int = 4             # C, tails that a round reads; every fourth reads one, as lone chains do
    budget: int = 41                # beta, of a round: the value and 8 steps
    tail: int = 10                  # tau, the last 2 steps
    level: int = 24                 # most steps of the first problems; it moves
    # learning
    advantage: str = 'maxrl'        # 'grpo': divided by the standard deviation instead
    updates: int = 1                # from the same rollouts
    delta: float = 0.1              # the trust region
    replay: bool = True             # False: the learner chooses experts itself
    generator: str = 'float32'      # 'bfloat16': the rollouts, by rounded weights; the learner is float32 always
    balancer: str = 'none'          # its biases rest; 'pid' and 'sign': they move (router.py)
    balancer_lr: float = 3e-3
    # as in train.py
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 0
    decay_fraction: float = 0.5
    grad_clip: float = 1.0
    eval_every: int = 20
    eval_problems: int = 20         # held out, of 25 to 32 steps
    checkpoint_every: int = 20
    seed: int = 0
    device: str = 'auto'

    def __post_init__(self):
        low = lambda least, names: dict.fromkeys(names.split(), (least, None))
        configurator.check_ranges(
            self, **low(1, 'max_steps groups draws candidates budget tail updates eval_every checkpoint_every'),
            **low(0, 'delta balancer_lr lr min_lr warmup_steps eval_problems seed'), **low(2, 'rollouts'),
            **low(1e-9, 'grad_clip'), level=(3, 72), aggregation=(0, 1), decay_fraction=(0, 1),
            advantage=('maxrl', 'grpo'), generator=('float32', 'bfloat16'), balancer=('none', 'pid', 'sign'))
        for name, most in ('candidates', 'rollouts'), ('tail', 'budget'):
            if getattr(self, name) > getattr(self, most):
                raise ValueError(f'{name} is {getattr(self, name)}, more than {most}, {getattr(self, most)}')


# prompt, output: tokens. q (n) float32: their probabilities. experts (S - 1, L): who worked on each but the last.
Rollout = namedtuple('Rollout', 'prompt output q experts')


# ---- rewards and advantages ----

def repeats(tokens, chunk=256, least=0.05):
    """The repetition gate: True if a chunk of the tokens, 4 bytes each, shrinks below a twentieth of its size under
    zlib with a window of 1,024 bytes. Honest traces of the loops task shrink to a fifth."""
    data = np.array(tokens, '<i4').tobytes()
    for piece in (data[i:i + 4 * chunk] for i in range(0, len(data), 4 * chunk)):
        deflate = zlib.compressobj(9, wbits=-10)                # 2^10 bytes; negative: nothing around the data
        if len(deflate.compress(piece) + deflate.flush()) < least * len(piece):
            return True
    return False


def advantages(rewards, rule='maxrl'):
    """A of a group's rewards (G): floats. Zeros if all are alike."""
    r = np.array(rewards, float)
    if r.std() == 0:
        return [0.0] * len(r)
    return ((r - r.mean()) / (r.mean() if rule == 'maxrl' else r.std())).tolist()


# ---- rollouts ----

@contextlib.contextmanager
def choosing(model, choices):
    """For a while, let each layer's router choose by the function given for it."""
    for router, function in zip(model.routers, choices):
        router.choose = function
    try:
        yield
    finally:
        for router in model.routers:
            router.choose = choose


def roll_out(model, prompts, max_new_tokens, seed):
    """Let a model continue prompts, at temperature 1. Return a Rollout for each."""
    L, B, t = model.config.n_layer, len(prompts), 0
    q = torch.zeros(B, max_new_tokens)
    experts = torch.zeros(B, max_new_tokens, L, dtype=torch.uint8)
    newest, of_prompts = [None] * L, None                       # newest: of each layer, from the last forward

    def keep(layer):
        def choose_and_keep(probs, bias):
            newest[layer], weight = choose(probs, bias)
            return newest[layer], weight
        return choose_and_keep

    def watch(rows, logits, drawn):
        nonlocal t, of_prompts
        q[rows, t] = logits.softmax(-1).gather(1, drawn[:, None])[:, 0].cpu()
        if t == 0:                                              # equal prompts were read once, in this order
            of_prompts = dict(zip(dict.fromkeys(map(tuple, prompts)), torch.stack(newest, -1).byte().cpu()))
        else:                                                   # the last forward was over the tokens drawn before
            experts[rows, t - 1] = torch.stack(newest, -1).byte().cpu()
        t += 1

    with choosing(model, map(keep, range(L))):
        outputs = generate(model, prompts, max_new_tokens, stop=(task.END,), seed=seed, step=decode.folded(model),
                           watch=watch)
    return [Rollout(prompt, output, q[row, :len(output)],
                    torch.cat([of_prompts[tuple(prompt)][:len(prompt)], experts[row, :len(output) - 1]]))
            for row, (prompt, output) in enumerate(zip(prompts, outputs))]


def generator_of(model, precision):
    """The model that makes the rollouts: the learner itself, or a copy of it in bf16, its balancing biases as exact."""
    if precision == 'float32':
        return model
    generator = copy.deepcopy(model).bfloat16()
    for router, exact in zip(generator.routers, model.routers):
        router.balancing_bias = exact.balancing_bias
    return generator


# ---- the learner ----

def probabilities(model, rollouts, replay=True):
    """p of all tokens of the outputs, one after the other, with gradient; the mean entropy (a number) of what they were
    drawn from; and the share of the tokens for which an expert was replayed that the router would not have chosen."""
    longest = max(len(x.experts) for x in rollouts)
    rows, device = torch.zeros(3, len(rollouts), longest, dtype=torch.int64), model.device
    experts = torch.zeros(len(rollouts), longest, model.config.n_layer, dtype=torch.int64)
    for row, x in enumerate(rollouts):
        S = len(x.experts)                                      # the last token is not read
        rows[0, row, :S] = torch.tensor([*x.prompt, *x.output[:-1]])
        rows[1, row, S - len(x.output):S] = torch.tensor(x.output)
        rows[2, row, S - len(x.output):S] = 1
        experts[row, :S] = x.experts
    tokens, targets, scored = rows.to(device)
    experts, moved = experts.to(device), torch.zeros(len(rollouts), longest, dtype=torch.bool, device=device)

    def replayed(layer):
        def take(probs, bias):
            own, weight = choose(probs, bias)
            moved.logical_or_(own != experts[..., layer])
            return (experts[..., layer], probs.gather(-1, experts[..., layer, None])[..., 0]) if replay else (own, weight)
        return take

    with choosing(model, map(replayed, range(model.config.n_layer))):
        logp = model(tokens)[0][scored.bool()].log_softmax(-1)                             # (tokens of outputs, V)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1).mean().item()
    share = (moved & scored.bool()).sum().item() / scored.sum().item()
    return logp.gather(-1, targets[scored.bool()][:, None])[:, 0].exp(), entropy, share


def token_loss(p, q, A, delta):
    """The sum of -A m p / q over tokens, and how many of them m masks. p, q, A: a number for each token."""
    m = (p.detach() - q).abs() <= delta
    return -(A * m * p / q).sum(), (~m).sum().item()


def learn(model, optimizers, rollouts, A, config, lr):
    """Update the model from rollouts and their advantages. Return a row of the log."""
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].experts))           # like lengths together
    n_tokens, row = sum(len(x.output) for x in rollouts), {}
    for _ in range(config.updates):
        row = dict.fromkeys(('entropy', 'replayed', 'masked'), 0.0)
        for i in range(0, len(order), 64):
            batch = [rollouts[j] for j in order[i:i + 64]]
            p, entropy, share = probabilities(model, batch, config.replay)
            lengths = torch.tensor([len(x.output) for x in batch])
            a = torch.tensor([A[j] for j in order[i:i + 64]], dtype=p.dtype).repeat_interleave(lengths)
            q = torch.cat([x.q for x in batch])
            loss, masked = token_loss(p, q.to(p), a.to(p), config.delta)
            (loss / len(rollouts)).backward()
            for key, value in ('entropy', entropy * len(p)), ('replayed', share * len(p)), ('masked', masked):
                row[key] += value / n_tokens
        row['grad_norm'] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr * group['lr_scale']
            optimizer.step()
            optimizer.zero_grad()
    return row


# ---- prompts ----

def draw_prompts(rng, n, level, populations, config):
    """Draw n prompts, of which a share are rounds. Return [question, tails, population or None] for each. Rounds are
    the next ones of populations, which are taken out, or the first one of a problem of any length: they all have the
    same number of steps to write."""
    drawn = []
    for i in range(n):
        if i >= round(config.aggregation * n):
            drawn.append((task.draw_problem(rng, max(3, level - 8), level, 'train').question, [], False))
        elif populations:
            question, tails = populations.pop(0)
            drawn.append((question, rng.sample(tails, rng.choice((1, *[config.candidates] * 3))), True))
        else:
            drawn.append((task.draw_problem(rng, 3, 72, 'train').question, [], True))
    return drawn


def collect(step, model, level, populations, config):
    """Make the rollouts of a step -> the groups to learn from, [(rollouts, rewards)]; and a row of the log."""
    groups, solved, rounds, n_tokens, n_rollouts, G = [], [], [], 0, 0, config.rollouts
    encode = task.ENC.encode_ordinary
    for draw in range(config.draws):
        rng = random.Random(f'{config.seed} {step} {draw}')
        drawn = draw_prompts(rng, config.groups - len(groups), level, populations, config)
        for kind in False, True:                                # problems, then rounds
            prompts = [(question, tails) for question, tails, is_round in drawn if is_round == kind]
            if not prompts:
                continue
            budget = config.budget if kind else 8 + task.STEP * level            # longer than any right one
            rollouts = roll_out(model, [task.build_prompt(encode(question), tails) for question, tails in prompts
                                        for _ in range(G)], budget, hash((config.seed, step, draw, kind)))
            for i, (question, tails) in enumerate(prompts):
                group = rollouts[G * i:G * i + G]
                rewards = [float(not repeats(x.output) and task.verify(question, tails, x.output, budget))
                           for x in group]
                (rounds if kind else solved).append(np.mean(rewards))
                if 0 < sum(rewards) < G:
                    groups.append((group, rewards))
                if kind and sum(rewards) and sum(task.answer_of(x.output) is not None for x in group) < G / 2:
                    populations.append((question, [x.output[-config.tail:] for x in group]))
            n_tokens, n_rollouts = n_tokens + sum(len(x.output) for x in rollouts), n_rollouts + len(rollouts)
        if len(groups) >= config.groups:
            break
    mean = lambda values: float(np.mean(values)) if values else None
    return groups, {'reward': mean(solved), 'round_reward': mean(rounds), 'groups': len(groups),
                    'length': n_tokens / n_rollouts, 'generated': n_tokens}


# ---- running ----

def begin(config, device):
    """Continue the run in out_dir, or begin with the weights of init_from. Return the speaker (rsa.py), optimizers,
    balancer, and what else moves: the step, the level, the populations."""
    saved = load_checkpoint(config.out_dir)
    if saved and 'populations' not in saved:
        raise ValueError(f'{config.out_dir} holds another kind of run: choose another out_dir')
    speaker = load_speaker(config.out_dir if saved else config.init_from, device)
    if speaker.build_prompt is not task.build_prompt:
        raise ValueError(f'init_from: {config.init_from} was not trained on the loops task (config/loops.py)')
    optimizers = make_optimizers(speaker.model, config.lr, weight_decay=0)
    optimizers[0].param_groups[0]['momentum'] = 0               # Muon: this step's gradient alone
    balancer = Balancer(speaker.model.routers, config.balancer, config.balancer_lr)
    if not saved:
        os.makedirs(config.out_dir, exist_ok=True)
        shutil.copy(os.path.join(config.init_from, 'bpe.json'), config.out_dir)
        return speaker, optimizers, balancer, 0, config.level, []
    for thing, state in zip([*optimizers, balancer], [*saved['optimizers'], saved['balancer']]):
        thing.load_state_dict(thing.state_dict() | {'state': state['state']})
    return speaker, optimizers, balancer, saved['step'], saved['level'], saved['populations']


def train(config):
    """Run or continue. Return the last row of the log. Raise ValueError for what does not fit."""
    speaker, optimizers, balancer, step, level, populations = begin(config, configurator.pick_device(config.device))
    model, held_out = speaker.model, task.test_problems('hard', max(1, config.eval_problems))
    highest = (model.config.context - 33) // task.STEP          # a question of up to 25 tokens, and 8 around the steps
    columns = ['step', 'reward', 'round_reward', 'level', 'groups', 'length', 'generated', 'entropy', 'masked', 'replayed',
               'grad_norm', 'load_entropy', 'lr', 'tokens_per_s', 'seconds', 'held_out']
    write_log(config.out_dir, None, columns, keep_until=step or -1)
    row = {}
    with tqdm(total=config.max_steps, initial=step, dynamic_ncols=True, mininterval=1, unit='step') as bar:
        while step < config.max_steps:
            began, lr = time.perf_counter(), lr_at(step, config)
            groups, row = collect(step, generator_of(model, config.generator), level, populations, config)
            rollouts = [x for group, _ in groups for x in group]
            if rollouts:
                A = [a for _, rewards in groups for a in advantages(rewards, config.advantage)]
                for layer, router in enumerate(model.routers):
                    router.load += torch.cat([x.experts[:, layer] for x in rollouts]).long().bincount(
                        minlength=len(router.load)).to(model.device)
                row |= learn(model, optimizers, rollouts, A, config, lr)
                row['load_entropy'] = load_entropy(balancer.step()).mean().item()
            if row['reward'] is not None:
                level = min(highest, level + 1) if row['reward'] > 0.7 else max(3, level - (row['reward'] == 0))
            step, seconds = step + 1, time.perf_counter() - began
            row |= {'step': step, 'level': level, 'lr': lr, 'seconds': seconds,
                    'tokens_per_s': round(row['generated'] / seconds)}
            done = step == config.max_steps
            if config.eval_problems and (step % config.eval_every == 0 or done):
                speaker = speaker._replace(step=decode.folded(model))
                row['held_out'] = measure(speaker, held_out, TableConfig(), 'held out', candidates=1, rounds=0,
                                          tail=1).mean
                tqdm.write(f'step {step}: {100 * row["held_out"]:.1f} % of held-out problems')
            write_log(config.out_dir, row, columns)
            bar.set_postfix_str(', '.join(f'{name} {row[key]:.3g}' for name, key in (
                ('reward', 'reward'), ('rounds', 'round_reward'), ('level', 'level'), ('entropy', 'entropy'),
                ('length', 'length'), ('masked', 'masked'), ('replayed', 'replayed'), ('tok/s', 'tokens_per_s'))
                if row.get(key) is not None))
            bar.update()
            if step % config.checkpoint_every == 0 or done:
                save_checkpoint(config.out_dir, {
                    'model': model.state_dict(), 'optimizers': [o.state_dict() for o in optimizers],
                    'balancer': balancer.state_dict(), 'step': step, 'level': level, 'populations': populations,
                    'config': asdict(config), 'model_config': asdict(model.config)})
    return row


if __name__ == '__main__':
    with configurator.one_line_errors('rl.py', 'try fewer --groups',
                                      'run the same command again to go on from the last checkpoint'):
        train(*configurator.read(sys.argv[1:], RLConfig))
