"""The scripts of evidence/ run (their figures are not tested), and pictures depend only on committed tables."""
import math

import pytest
import torch

import bench
from common import run_script, tiny_config
from evidence import claims, pictures, plot, scaling, speedrun
from evidence.baselines import GPT
from train import TrainConfig

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """As in test_bench.py."""
    monkeypatch.setattr(scaling, 'memory', bench.peak_memory)


def test_quick_scaling_has_a_row_for_every_size(capsys, tmp_path):
    results = scaling.scaling(CPU, scaling.ScalingConfig(quick=True, repeats=1))
    out = capsys.readouterr().out
    for name in 'context', 'experts', 'layers', 'batch':
        assert out.count(f'| {name} | ') == 2
    pytest.importorskip('matplotlib')
    scaling.plot(results, tmp_path / 'scaling.png')
    assert (tmp_path / 'scaling.png').stat().st_size > 1000


@pytest.mark.parametrize('name', speedrun.DEFAULTS)
def test_the_models_of_others_learn_in_the_speedrun(dataset, name):
    sizes = tiny_config(vocab_size=300, context=32, n_layer=2)
    config = TrainConfig(dataset=str(dataset), batch_size=4, max_steps=40, warmup_steps=2, lr=1e-2, eval_batches=1)
    assert speedrun.run(config, speedrun.SpeedrunConfig(name), sizes) < 5.2 < math.log(300)


def test_the_plain_gpt_is_causal_and_starts_at_the_uniform_loss():
    torch.manual_seed(0)
    model, x = GPT(tiny_config()), torch.randint(50, (2, 16))
    early = torch.where(torch.arange(16) < 7, x.roll(-1, 1), -1)                # targets of the first 7 tokens only
    other = torch.cat([x[:, :8], 49 - x[:, 8:]], 1)
    torch.testing.assert_close(model(x, early), model(other, early))
    assert abs(model(x, early).item() - math.log(50)) < 0.3


@pytest.mark.parametrize('argument', ['--repeats=0', '--dtype=int8', '--device=nowhere', '--scale=True'])
def test_bad_arguments_get_one_line(monkeypatch, capsys, argument):
    _, message = run_script(monkeypatch, capsys, 'evidence.scaling', argument)
    assert message


def test_the_committed_pictures_are_those_of_the_committed_tables(tmp_path, monkeypatch):
    """Names are compared: the bytes depend on the version of matplotlib."""
    pytest.importorskip('matplotlib')
    committed = {path.name for path in claims.RESULTS.glob('*.svg')}
    for name in claims.RESULTS.glob('*.csv'):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    monkeypatch.setattr(claims, 'RESULTS', tmp_path)
    pictures.main()
    assert {path.name for path in tmp_path.glob('*.svg')} == committed


HEAD = 'step,tokens,loss,val_loss,grad_norm,lr,tokens_per_s,mfu,entropy,entropy_0,entropy_1,residual_0,residual_1\n'
EVALUATION, STEP = '0,0,,8.3,,,,,,,,0.1,0.2\n', '10,640,{},,2.4,0.005,1805,,0.8,0.9,0.7,,\n'


def test_a_run_s_log_is_drawn_even_if_its_last_line_was_cut_short(tmp_path, monkeypatch, capsys):
    log = EVALUATION + STEP.format(7.5) + STEP.format('nan') + STEP.format(7.2).replace('10', '30', 1)
    (tmp_path / 'log.csv').write_text(HEAD + log + '40,2560,7.1,,2')
    read = plot.read_log(tmp_path)
    assert read['val_loss'] == ([0], [8.3]) and read['loss'][0] == [10, 10, 30] and read['loss'][1][::2] == [7.5, 7.2]
    assert plot.by_layer(read, 'residual') == [([0], [0.1]), ([0], [0.2])] and len(plot.by_layer(read, 'entropy')) == 2
    pytest.importorskip('matplotlib')
    for folders, out in ([tmp_path], 'log.png'), ([tmp_path] * 2, 'log.svg'):
        _, message = run_script(monkeypatch, capsys, 'evidence.plot', *folders, f'--out={tmp_path / out}')
        assert message is None and (tmp_path / out).stat().st_size > 10_000


@pytest.mark.parametrize('log, message', [
    (None, 'has no log.csv'), ('', 'no column'), ('step,accuracy\n1,2\n', 'no column'), (HEAD, 'holds no step yet'),
    (HEAD + EVALUATION, 'holds no step yet'), (HEAD + 'step\n' + '1' * 200_000, 'field larger')])
def test_a_folder_without_a_log_of_train_py_gets_one_line(log, message, tmp_path, monkeypatch, capsys):
    if log is not None:
        (tmp_path / 'log.csv').write_text(log)
    assert message in run_script(monkeypatch, capsys, 'evidence.plot', tmp_path)[1]
    assert 'ends in .svg or .png' in run_script(monkeypatch, capsys, 'evidence.plot', tmp_path, '--out=log.jpg')[1]
    assert 'name a run folder' in run_script(monkeypatch, capsys, 'evidence.plot')[1]
