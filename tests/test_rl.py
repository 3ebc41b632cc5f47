"""Reinforcement learning (rl.py): shortcuts get no reward, the gradient is that of the formula, replayed experts are
used, a stopped run resumes exactly."""
import csv
import random
from dataclasses import asdict

import pytest
import torch

import model as model_module
import rl
import sample
from runtime.checkpoint import load_checkpoint, save_checkpoint
from common import randomize, run_script, tiny_model, tokens
from tasks.loops import task
from tasks.problems import repeats
from data.tokenizer import save_tokenizer, train_bpe
from evidence import rl as evidence


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A tiny model with random weights, as a run on the loops task leaves it."""
    folder = tmp_path_factory.mktemp('run')
    model = tiny_model(vocab_size=task.ENC.n_vocab, context=64)
    save_checkpoint(folder, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(folder / 'bpe.json', task.ENC)
    return folder


def encode(text):
    return task.ENC.encode(text, allowed_special='all')


def rollouts_of(model, n=5, budget=9, seed=0):
    """n rollouts of three prompts of different lengths, two of which are equal; some end early."""
    prompts = [tokens(length, seed=length, vocab_size=model.config.vocab_size).tolist() for length in (4, 7, 4)]
    return rl.roll_out(model, prompts * n, budget, seed)


# ---- rewards ----

def correct_trace(rng, problem, begin, end):
    """The right trace from value `begin` on, of the steps up to `end`, with the answer if that is the last."""
    whole = task.continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0)
    text = task.ENC.decode(task.encode_chain(problem, whole[begin:end + 1]))
    return text + (f'</think>{whole[-1][1]}<|end|>' if end == problem.steps else ''), whole


def test_right_solutions_and_right_rounds_have_the_reward_and_wrong_values_do_not():
    rng = random.Random(0)
    for _ in range(60):
        problem = task.draw_problem(rng, 3, 40, 'train', most=26)
        text, whole = correct_trace(rng, problem, 0, problem.steps)
        assert task.verify(problem.question, [], encode(text), 999)
        assert not task.verify(problem.question, [], encode(text[:-8] + str((int(text[-8]) + 1) % 10) + text[-7:]), 999)
        place = rng.randrange(0, problem.steps)                 # after so many steps begins a round of at most 8
        end = min(problem.steps, place + 8)
        tails = [encode(correct_trace(rng, problem, max(0, place - 3), place)[0])[-10:]] if place else []
        output = encode(correct_trace(rng, problem, place, end)[0])[:41]
        assert task.verify(problem.question, tails, output, min(41, len(output)))
        wrong = encode(task.ENC.decode(output).replace('=', '=x', 1))
        assert not task.verify(problem.question, tails, wrong, len(wrong))
        other = [(done, (value + 1) % 10) for done, value in whole[place:end + 1]]          # all values one off
        output = task.encode_chain(problem, other)[:41]
        assert not task.verify(problem.question, tails, output, len(output))


def test_no_reward_without_a_solution():
    question = '4x:a-2b*7c+3=5'                                 # 12 steps: 5 4a-2=3 4b*7=1 4c+3=4 3a-2=2 ...
    answer, tail = task.solve(question), encode('4b*7=14c+3=4')
    for cheat in (f'5</think>{answer}<|end|>', f'</think>{answer}<|end|>', f'{answer}', '5', '', f'5<|end|>{answer}',
                  '54a-2=3<|end|>', f'54a-2=3</think>{answer}<|end|>',          # it stops early
                  f'51c+3={answer}</think>{answer}<|end|>',                     # it leaves out all but the last step
                  '54a-2=34c+3=4', '54a-2=34a-2=3'):                            # one left out; the same one again
        for n in len(encode(cheat)), 99:                        # whether or not the budget ended there
            assert not task.verify(question, [], encode(cheat), n), cheat
    assert task.verify(question, [], encode('54a-2=34b*7='), 10)               # the budget ended there
    assert not task.verify(question, [], encode('54a-2=34b*7='), 11)
    assert task.verify(question, [tail], encode('43a-2=2'), 6)
    assert not task.verify(question, [tail], encode('54a-2=3'), 6)              # it starts again
    for still in '4', '43a':                                    # it makes no progress
        assert not task.verify(question, [tail], encode(still), len(encode(still)))
    assert not task.verify(question, [tail], encode('22b*7=4'), 6)              # it continues from no tail
    for end, output in ('9a-2=5', '59b*7=5'), ('4z-2=5', '54z-2=5'), ('what?', '59b*7=5'):  # no such steps
        assert not task.verify(question, [encode(end)], encode(output), 6)
    assert not task.verify(question, [tail], encode(f'{answer}</think>{answer}<|end|>'), 41)
    for end in f'1c+3={answer}', f'1b*7=11c+3={answer}</think>{answer}':        # all steps were done before
        assert task.verify(question, [encode(end)], encode(f'{answer}</think>{answer}<|end|>'), 41)
        assert not task.verify(question, [encode(end)], encode(f'{answer}</think>{(answer + 1) % 10}<|end|>'), 41)


def test_repetition_is_detected_and_correct_traces_pass():
    rng = random.Random(1)
    for _ in range(200):
        problem = task.draw_problem(rng, 3, 72, 'train')
        chain = task.continue_chain(problem, [(0, problem.start)], problem.steps, rng, 0.02)
        assert not repeats(task.encode_chain(problem, chain))
    for period, n in ((1, 100), (2, 160), (5, 200), (10, 500)):
        loop = rng.sample(range(300), period) * n
        assert repeats(loop[:n]) and repeats(rng.choices(range(300), k=256) + loop[:256])
    assert not repeats([]) and not repeats([7] * 20)            # too short to tell


# ---- the formula ----

def test_advantages_of_hand_made_groups():
    assert rl.advantages([1, 0, 0, 0]) == [3, -1, -1, -1]
    assert rl.advantages([1, 1, 1, 0]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1])
    assert rl.advantages([1, 0, 0, 0], 'grpo') == pytest.approx([3 ** 0.5, *[-(3 ** -0.5)] * 3])
    for alike in ([0, 0, 0], [1, 1, 1]):
        assert rl.advantages(alike) == rl.advantages(alike, 'grpo') == [0, 0, 0]


def test_tokens_that_moved_too_far_are_masked():
    q = torch.tensor([0.5, 0.5, 0.5, 0.5])
    p = torch.tensor([0.59, 0.61, 0.41, 0.39], requires_grad=True)
    loss, masked = rl.token_loss(p, q, torch.tensor([1.0, 1.0, -2.0, -2.0]), 0.1)
    loss.backward()
    assert masked == 2 and p.grad.tolist() == [-2, 0, 4, 0]
    assert loss.item() == pytest.approx(-0.59 / 0.5 + 2 * 0.41 / 0.5)


def test_the_gradient_is_that_of_the_plain_formula(monkeypatch):
    """Rollout by rollout, token by token, in float64, no padding and no replay."""
    def grouped_mm(x, w, offs):                                 # torch has it for float32 and bf16
        return torch.cat([rows @ w[e] for e, rows in enumerate(x.tensor_split(offs[:-1].tolist()))])
    monkeypatch.setattr(model_module, 'grouped_mm', grouped_mm)
    model = tiny_model()
    rollouts, delta = rollouts_of(model, 30), 1e-3              # 90: more than one batch
    model.double()
    rng = random.Random(0)
    A = [rng.uniform(-1, 2) for _ in rollouts]
    randomize(model.layers[1].moe.router.out_proj, seed=5)      # the learner has changed
    loss, masked, parameters = 0, 0, list(model.parameters())
    for x, a in zip(rollouts, A):
        probs = model(torch.tensor([x.prompt + x.output]))[0][0].softmax(-1)
        for t, token in enumerate(x.output):
            p = probs[len(x.prompt) + t - 1, token]
            if abs(p.item() - x.q[t].item()) <= delta:
                loss = loss - a * p / x.q[t].double() / len(rollouts)
            else:
                masked += 1
    expected = torch.autograd.grad(loss, parameters)
    before = [p.detach().clone() for p in parameters]
    config = rl.RLConfig(delta=delta, replay=False, grad_clip=1e9)
    descent = torch.optim.SGD([{'params': parameters, 'lr_scale': 1.0}], lr=0)
    row = rl.learn(model, [descent], list(zip(rollouts, A)), config, lr=1.0)
    n_tokens = sum(len(x.output) for x in rollouts)
    assert 0 < masked < n_tokens and row['masked'] == pytest.approx(masked / n_tokens)
    for was, now, gradient in zip(before, parameters, expected):
        torch.testing.assert_close(was - now.detach(), gradient, atol=1e-9, rtol=1e-6)


# ---- rollouts and replay ----

def test_a_rollout_has_the_sampler_s_own_probabilities_bit_for_bit(monkeypatch):
    model, drawn, plain = tiny_model(), [], sample.sample_from_logits

    def spy(logits, u, *args):
        token = plain(logits, u, *args)
        drawn.append((logits.softmax(-1), token))
        return token
    monkeypatch.setattr(sample, 'sample_from_logits', spy)
    monkeypatch.setattr(task, 'END', 3)                         # some rollouts end with it
    rollouts = rollouts_of(model, n=8, budget=50)
    assert len({len(x.output) for x in rollouts}) > 2
    rows = list(range(len(rollouts)))
    for t, (probs, token) in enumerate(drawn):
        rows = [row for row in rows if len(rollouts[row].output) > t]
        for i, row in enumerate(rows):
            assert rollouts[row].output[t] == token[i] and rollouts[row].q[t] == probs[i, token[i]]


def test_a_rollout_has_the_experts_and_probabilities_of_one_forward_over_all_of_it():
    model = tiny_model()
    rollouts = rollouts_of(model)
    p, entropy, share = rl.probabilities(model, rollouts, replay=False)
    assert share == 0 and entropy > 0
    torch.testing.assert_close(p.detach(), torch.cat([x.q for x in rollouts]), atol=1e-5, rtol=1e-4)
    for x in rollouts:
        assert x.experts.shape == (len(x.prompt) + len(x.output) - 1, model.config.n_layer)
        assert len(x.experts.unique()) > 1


def test_replaying_what_the_router_chooses_changes_no_bit():
    """Of one length, or the routers would have sent the padding elsewhere: other sums, equal up to rounding."""
    model, gradients = tiny_model(), []
    rollouts = [x for x in rollouts_of(model) if len(x.prompt) == 4]
    for replay in False, True:
        p, _, share = rl.probabilities(model, rollouts, replay)
        assert share == 0
        gradients.append((p, *torch.autograd.grad(p.log().sum(), model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert all(router.choose is rl.choose for router in model.routers)


def test_replaying_other_experts_changes_the_output_and_trains_the_router():
    model = tiny_model()
    rollouts = rollouts_of(model)
    others = [x._replace(experts=(x.experts + 1) % model.config.n_expert) for x in rollouts]
    p, _, share = rl.probabilities(model, others)
    assert share == 1 and not torch.allclose(p, rl.probabilities(model, rollouts)[0], atol=1e-3)
    p.sum().backward()
    assert all(router.out_proj.weight.grad.abs().sum() > 0 for router in model.routers)
    with torch.no_grad():                                       # and a forward after it is as before
        assert rl.probabilities(model, rollouts, replay=False)[2] == 0


def test_a_generator_in_bf16_chooses_by_exact_biases():
    model = tiny_model()
    generator = rl.generator_of(model, 'bfloat16')
    assert generator.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert all(a.balancing_bias is b.balancing_bias for a, b in zip(generator.routers, model.routers))
    p = rl.probabilities(model, rollouts := rollouts_of(generator))[0].detach()
    assert 0 < (p - torch.cat([x.q for x in rollouts])).abs().mean() < 0.01
    assert rl.generator_of(model, 'float32') is model


# ---- a run ----

def run(run_folder, out, **settings):
    rl.train(rl.RLConfig(**dict(init_from=str(run_folder), out_dir=str(out), max_steps=4, groups=4, rollouts=4,
                                candidates=2, budget=6, tail=4, level=3, eval_every=2, eval_problems=1, seed=1,
                                device='cpu', balancer_lr=1e-2) | settings))


@pytest.fixture
def easy(monkeypatch):
    """A random model is never right. Let a rollout be so if its first token is even."""
    monkeypatch.setattr(task, 'verify', lambda question, tails, output, budget: output[0] % 2 == 0)


def test_a_resumed_run_equals_an_uninterrupted_one(run_folder, tmp_path, easy, monkeypatch):
    run(run_folder, tmp_path / 'whole')

    def save_and_stop(folder, state):
        save_checkpoint(folder, state)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl, 'save_checkpoint', save_and_stop)
        run(run_folder, tmp_path / 'stopped')
    run(run_folder, tmp_path / 'stopped')
    whole, stopped = (load_checkpoint(tmp_path / name) for name in ('whole', 'stopped'))
    assert whole['step'] == stopped['step'] == 4 and whole['populations']
    for key in 'level', 'populations':
        assert whole[key] == stopped[key]
    assert all(torch.equal(t, stopped['model'][name]) for name, t in whole['model'].items())
    logs = [[{key: row[key] for key in row if key not in ('seconds', 'tokens_per_s')}
             for row in csv.DictReader(open(tmp_path / name / 'log.csv'))] for name in ('whole', 'stopped')]
    assert logs[0] == logs[1] and [row['step'] for row in logs[0]] == list('1234')


def test_what_is_rewarded_becomes_likelier(run_folder, tmp_path, easy):
    run(run_folder, tmp_path, max_steps=12, rollouts=16, lr=3e-2, eval_every=100, eval_problems=0, aggregation=1)
    rewards = [float(row['round_reward']) for row in csv.DictReader(open(tmp_path / 'log.csv'))]
    assert sum(rewards[:2]) / 2 < 0.75 and sum(rewards[-2:]) / 2 > 0.9


def test_problems_become_longer_while_they_are_solved_and_shorter_when_none_is(run_folder, tmp_path, monkeypatch):
    for right, levels in ((True, ['6', '6']), (False, ['4', '3'])):            # 6: what the context has room for
        monkeypatch.setattr(task, 'verify', lambda *args: right)
        run(run_folder, tmp_path / str(right), max_steps=2, level=5, eval_problems=0, aggregation=0.5)
        assert [row['level'] for row in csv.DictReader(open(tmp_path / str(right) / 'log.csv'))] == levels


def test_problems_become_no_longer_than_their_operations_allow(tmp_path, monkeypatch):
    model = tiny_model(vocab_size=task.ENC.n_vocab, context=256)
    save_checkpoint(tmp_path, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(tmp_path / 'bpe.json', task.ENC)
    monkeypatch.setattr(task, 'verify', lambda *args: True)
    run(tmp_path, tmp_path / 'rl', max_steps=2, level=26, operations=3, eval_problems=0, aggregation=0.5)
    assert [row['level'] for row in csv.DictReader(open(tmp_path / 'rl' / 'log.csv'))] == ['27', '27']  # 3, 9 times


def test_populations_continue_from_their_own_tails():
    populations = [('4x:a-2b*7c+3=5', [[1], [2], [3], [4], [5]])]
    config = rl.RLConfig(aggregation=0.5, candidates=4)
    drawn = rl.draw_prompts(random.Random(0), 4, 12, populations, config)
    assert [kind for *_, kind in drawn] == [False, False, True, True] and not populations
    assert drawn[2][0] == '4x:a-2b*7c+3=5' and len(drawn[2][1]) in (1, 4) and drawn[3][1] == []
    assert all(4 <= task.parse(question).steps <= 12 for question, *_ in drawn[:2])


def test_programs_have_at_most_as_many_operations_as_asked_for():
    for least, operations in (4, 5), (16, 26):
        drawn = rl.draw_prompts(random.Random(0), 60, 40, [], rl.RLConfig(aggregation=0.5, operations=operations))
        sizes = [len(task.parse(question).operations) for question, *_ in drawn]
        assert least <= max(sizes) <= operations


@pytest.mark.parametrize('argument, said', [
    ('--init_from=nowhere', 'no such folder'), ('--candidates=17', 'candidates'), ('--tail=99', 'tail'),
    ('--rollouts=1', 'rollouts'), ('--advantage=ppo', 'advantage'), ('--grups=3', 'groups'), ('--lr=fast', 'lr')])
def test_bad_settings_get_one_line(monkeypatch, capsys, tmp_path, argument, said):
    _, message = run_script(monkeypatch, capsys, 'rl.py', f'--out_dir={tmp_path / "new"}', argument)
    assert said in message and not (tmp_path / 'new').exists()


def test_a_folder_of_another_kind_gets_one_line_and_stays(monkeypatch, capsys, tmp_path, run_folder):
    before = (run_folder / 'ckpt.pt').read_bytes()
    _, message = run_script(monkeypatch, capsys, 'rl.py', f'--out_dir={run_folder}', f'--init_from={run_folder}')
    assert 'another kind of run' in message and (run_folder / 'ckpt.pt').read_bytes() == before
    enc = train_bpe(['so good'], 262)                           # not as many tokens as the task has
    model = tiny_model(vocab_size=enc.n_vocab)
    save_checkpoint(tmp_path, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(tmp_path / 'bpe.json', enc)
    _, message = run_script(monkeypatch, capsys, 'rl.py', f'--out_dir={tmp_path / "new"}', f'--init_from={tmp_path}')
    assert 'was not trained on the loops task' in message


def test_what_went_wrong_in_an_output_is_found():
    question = '4x:a-2b*7c+3=5'                                 # 5 4a-2=3 4b*7=1 4c+3=4 3a-2=2 3b*7=4
    problem, right, wrong = task.parse(question), encode('4b*7=14c+3=4'), encode('4b*7=14c+3=5')
    def found(tails, text):
        return evidence.what_went_wrong(problem, tails, encode(text), len(encode(text)))
    for tails in [right], [right, right, wrong, right]:
        assert found(tails, '43a-2=23b*7=4') is None
        assert found(tails, '43a-2=23b*7=5') == 'computed'
        assert found(tails, '53a-2=33b*7=1') == 'misread'
        assert found(tails, '43b*7=8') == 'place'
    for tails in [wrong], [right, wrong], [wrong, right, wrong]:
        assert found(tails, '53a-2=33b*7=1') == 'outvoted'
    assert found([], '54a-2=34b*7=1') is None and found([], '54a-2=44b*7=8') == 'computed'
