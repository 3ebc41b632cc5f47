"""The scripts of evidence/ run; no figure that they print is a test. Pictures come from committed tables alone."""
import pytest
import torch

import bench
from common import run_script
from evidence import pictures, scaling

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


def test_the_attention_table_has_a_row_for_a_prompt_and_one_for_a_token(capsys):
    scaling.attention_layer(CPU, torch.float32, scaling.ScalingConfig(quick=True, repeats=1))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert [row.split(',')[0][2:] for row in rows[-2:]] == ['prefill', 'decode']


@torch.no_grad()
def test_the_multi_head_layer_s_cached_token_equals_the_whole():
    mha, x, table = scaling.MHA(bench.TINY), torch.randn(2, 6, 32), scaling.rope_table(torch.arange(6)[None], 4, 1e4)
    whole = mha(x, *table)
    q, k, v = mha.qkv(x).unflatten(-1, (3, -1, 8)).permute(2, 3, 0, 1, 4)       # (H, B, S, d)
    cache = [scaling.rope(k, *table).transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()]
    for t in cache:
        t[:, :, -1] = float('nan')                              # the last token must fill this in itself
    last = mha(x[:, -1:], *(t[:, -1:] for t in table), cache)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('argument', ['--repeats=0', '--dtype=int8', '--device=nowhere', '--scale=True'])
def test_bad_arguments_get_one_line(monkeypatch, capsys, argument):
    _, message = run_script(monkeypatch, capsys, 'evidence.scaling', argument)
    assert message


def test_the_committed_pictures_are_those_of_the_committed_tables(tmp_path, monkeypatch):
    """Drawn anew, from the tables alone. (Their bytes may differ with the version of matplotlib.)"""
    pytest.importorskip('matplotlib')
    committed = {path.name for path in pictures.RESULTS.glob('*.svg')}
    for name in pictures.RESULTS.glob('*.csv'):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    monkeypatch.setattr(pictures, 'RESULTS', tmp_path)
    pictures.main()
    assert {path.name for path in tmp_path.glob('*.svg')} == committed
