"""The table of Markovian RSA on the loops task (evaluate.py), with tiny random models."""
import itertools
import re
from collections import Counter
from dataclasses import asdict

import pytest
import torch

import sample
from runtime.checkpoint import save_checkpoint
from common import run_script, tiny_model
from tasks.loops import task
from evaluate import measure
from tasks.loops.task import ENC, test_problems as problems_of
from data.tokenizer import save_tokenizer
from rsa import RSASettings
from sample import SamplingOptions
from tasks.policy import load_policy

PROGRAM = 'evaluate.py'
FLAGS = ['--problems=3', '--population=4', '--candidates=2', '--device=cpu']


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A tiny model with random weights, as a run on the loops task leaves it."""
    folder = tmp_path_factory.mktemp('run')
    model = tiny_model(vocab_size=ENC.n_vocab, context=256)
    save_checkpoint(folder, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(folder / 'bpe.json', ENC)
    return folder


def cells(out):
    """The table in what was printed: [[cell, ...], ...] without its head."""
    lines = [line for line in out.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines][2:]


def test_the_table_is_what_the_algorithm_gives(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(sample, 'generate', lambda model, prompts, n, *args, **kwargs: [[48] * n for _ in prompts])
    out, message = run_script(monkeypatch, capsys, PROGRAM, f'--ckpt={run_folder}', '--split=easy hard', *FLAGS)
    assert message is None
    table = cells(out)
    methods = ['one bounded rollout each, T=0', 'one unbounded rollout each', 'C=1, T={}', 'C=2, T={}']
    assert [row[:2] for row in table] == [[steps, method.format(T)] for steps, T in (('3-7', 1), ('25-32', 4))
                                          for method in methods]
    lengths = [len(ENC.encode_ordinary(p.question)) + 4 for p in problems_of('hard', 3)]
    longest, rest = max(lengths), round(4 * sum(256 - n for n in lengths) / 3)
    assert [int(row[5].replace(',', '')) for row in table[4:]] == [4 * 41, rest, 4 * 5 * 41, 4 * 5 * 41]
    assert [int(row[6]) for row in table[4:]] == [longest + n for n in (0, 0, 12, 24)]          # whatever T is
    assert {row[2] for row in table} == {'0.0 +-0.0'}


def test_the_table_counts_right_answers(run_folder, monkeypatch, capsys):
    """A model that gives every second candidate the right answer, at once."""
    said = itertools.cycle([True, False])

    def generate(model, prompts, n, *args, **kwargs):
        questions = [re.search(r'<.user.>(.*?=\d)', ENC.decode(prompt))[1] for prompt in prompts]
        answers = [task.solve(question) + next(said) - 1 for question in questions]
        return [[task.CLOSE, *ENC.encode_ordinary(str(answer % 10)), task.END] for answer in answers]
    monkeypatch.setattr(sample, 'generate', generate)
    out, _ = run_script(monkeypatch, capsys, PROGRAM, f'--ckpt={run_folder}', '--split=hard', *FLAGS)
    shares = ['50.0 +-0.0', '100.0', '100.0']
    assert [row[2:6] for row in cells(out)] == [[*shares, '12']] * 3 + [[*shares, '60']]


def test_a_split_too_deep_for_the_context_has_no_unbounded_row(run_folder, monkeypatch, capsys):
    out, _ = run_script(monkeypatch, capsys, PROGRAM, f'--ckpt={run_folder}', '--split=deep', '--rounds=1', *FLAGS)
    assert [row[1] for row in cells(out)] == ['one bounded rollout each, T=0', 'C=1, T=1', 'C=2, T=1']


def test_the_batch_size_changes_neither_problems_nor_sampled_candidates(run_folder):
    """One problem at a time, or all at once: the same prompts, if the model gives the same outputs."""
    def prompts(rows):
        policy, seen = load_policy(run_folder, torch.device('cpu')), []
        settings = RSASettings(population=3, candidates=2, rounds=3, budget=11, tail=5)
        with pytest.MonkeyPatch.context() as patch:
            def fake(model, batch, n, *args, **kwargs):
                seen.extend(map(tuple, batch))
                return [prompt[-7:-3] for prompt in batch]
            patch.setattr(sample, 'generate', fake)
            measure(policy, problems_of('easy', 5), settings, SamplingOptions(temperature=0), rows=rows)
        return Counter(seen)
    assert prompts(1) == prompts(6) == prompts(512)


BAD_ARGUMENTS = {
    '--ckpt=nowhere': 'nowhere: no such folder',
    '--split=harder': "split is 'harder', choose from easy, medium, hard, deep, deeper, deepest",
    '--split=': "split is ''",
    '--candidates=5': 'candidates is 5, it must lie between 1 and 4',
    '--population=0': 'population is 0',
    '--problems=0': 'problems is 0',
    '--problems=1_000_000_000_000': 'problems is 1000000000000, it must lie between 1 and 10000',
    '--final_budget=500': 'more than the context of 256',
    '--tail=50': 'tail is 50, it must lie between 0 and 41',
    '--compact=head': "compact is 'head'",
    '--budget=500': 'more than the context of 256',
    '--question=4x:a-2=1': "unknown key 'question'",
    '--splt=hard': "unknown key 'splt'; did you mean 'split'?",
}


@pytest.mark.parametrize('argument', BAD_ARGUMENTS)
def test_bad_arguments_get_one_line(run_folder, monkeypatch, capsys, argument):
    out, message = run_script(monkeypatch, capsys, PROGRAM, f'--ckpt={run_folder}', *FLAGS, argument)
    assert BAD_ARGUMENTS[argument] in message and out == ''    # not after the table's head
