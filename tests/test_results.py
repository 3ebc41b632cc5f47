"""The figures of RESULTS.md and README.md are those of evidence/results/*.csv, as the claim scripts print them."""
import re
import statistics
from functools import partial

import pytest

from common import ROOT
from evidence import attention, balancer, cca_parts, kv_cache, residual, rl, router, rsa, rsa_cost, trimming
from evidence.claims import RESULTS, ClaimConfig, by_seed, read_table, spread

TEXTS = {name: (ROOT / name).read_text().replace('**', '') for name in ('RESULTS.md', 'README.md')}
SECTIONS = {part.splitlines()[0]: part for part in re.split(r'^#+ ', TEXTS['RESULTS.md'], flags=re.M)[1:]}


def of(name):
    return read_table(RESULTS / f'{name}.csv')


def from_csv(report, *names):
    return lambda: report(*map(of, names))


# {heading in RESULTS.md: what prints its tables and verdicts}. A main measures nothing: its table is complete.
REPORTS = {
    'The compressed KV cache': [lambda: kv_cache.main(ClaimConfig())],
    'CCA compared with other attention': [lambda: attention.main(ClaimConfig())],
    'The parts of CCA': [lambda: cca_parts.main(ClaimConfig())],
    'Residual scaling over 40 layers': [lambda: residual.main(ClaimConfig())],
    'Router': [lambda: router.main(ClaimConfig())],
    'Balancer': [lambda: balancer.main(ClaimConfig())],
    'Markovian RSA': [from_csv(rsa.report_main, 'rsa_lengths')],
    'The cost of RSA': [lambda: rsa_cost.main(ClaimConfig())],
    'Aggregation examples and prompts': [from_csv(rsa.report_aggregation, 'rsa_aggregation'),
                                         *(from_csv(partial(rl.report, name), name)
                                           for name in ('rl_aggregation', 'rl_without'))],
    'Trimming': [lambda: trimming.main(ClaimConfig())],
    'Reinforcement learning': [from_csv(partial(rl.report, name), name) for name in ('rl', 'rl_models')],
    'RSA compared with a majority vote': [from_csv(partial(rl.report, 'rl'), 'rl'),
                                          from_csv(rl.report_errors, 'rl_errors')],
    'Router replay': [from_csv(rl.report_replay, 'rl_replay')],
    'One RL setting changed at a time': [from_csv(partial(rl.report, 'rl_compare'), 'rl_compare')],
    'Programs longer than any in training': [from_csv(partial(rl.report, 'rl_long'), 'rl_long')]}


def rows_of(text):
    """Return the rows of the Markdown tables in a text, without the headings."""
    lines = text.splitlines()
    return [line for line, after in zip(lines, [*lines[1:], '']) if re.match(r'\| [^-]', line) and '| ---' not in after]


def printed_by(heading, capsys):
    for report in REPORTS[heading]:
        report()
    return capsys.readouterr().out


@pytest.mark.parametrize('heading', REPORTS)
def test_a_section_has_only_rows_and_intervals_that_its_script_prints(heading, capsys):
    printed, section = printed_by(heading, capsys), SECTIONS[heading]
    rows, printed_rows = rows_of(section), set(rows_of(printed))
    assert set(rows) <= printed_rows and len(rows) <= 10, set(rows) - printed_rows
    for interval in re.findall(r'[\d.,]+\s±\s[\d.]*\d', section):
        found = re.escape(' '.join(interval.split()))
        assert re.search(rf'(?<![\d.]){found}(?!\d)', printed), interval


def test_only_a_section_without_room_for_its_table_has_none():
    assert [heading for heading in REPORTS if not rows_of(SECTIONS[heading])] == ['One RL setting changed at a time']
    assert len(TEXTS['RESULTS.md'].splitlines()) <= 450


def test_the_table_of_all_claims_has_the_differences_and_verdicts_that_the_scripts_print(capsys):
    printed = ''.join(printed_by(heading, capsys) for heading in REPORTS)
    rows = rows_of(SECTIONS['All claims'])
    assert len(rows) > 20
    for row in rows:
        claim, published, difference, verdict, command = (cell.strip() for cell in row.strip('|').split('|'))
        assert f'| {difference} | {verdict} |' in printed, row


def test_every_picture_has_a_table_is_small_and_is_linked():
    for path in RESULTS.glob('*.svg'):
        assert any(f'evidence/results/{path.name}' in text for text in TEXTS.values()), path.name
        assert path.with_suffix('.csv').exists() and path.stat().st_size < 40_000, path.name


def test_readme_s_table_of_rsa_is_that_of_25_to_32_steps():
    rows = of('rsa_lengths')
    for setting in 'one unbounded rollout each', 'C=1, T=4', 'C=4, T=4':
        mean, majority, tokens, longest = (
            by_seed(rows, f'25-32: {setting}', column) for column in ('mean', 'majority', 'tokens', 'longest'))
        per_seed = f'{statistics.fmean(mean):.1f} ({", ".join(f"{value:.1f}" for value in mean)})'
        end = f' | {statistics.fmean(majority):.1f} | {tokens[0]:,.0f} | {longest[0]:.0f} |'
        ends = f'| {per_seed}{end}', f'| {spread(mean, ".1f")}{end}'
        assert any(line.startswith(f'| {setting}') and line.endswith(ends) for line in TEXTS['README.md'].splitlines())


def test_readme_tells_the_losses_of_the_demo():
    first, last = ([row for row in of('training') if row['val_loss']][i] for i in (0, -1))
    text = ' '.join(TEXTS['README.md'].split())
    assert f'falls from {float(first["val_loss"]):.2f}' in text
    assert f'to {float(last["val_loss"]):.2f} after {last["step"]} steps' in text


def test_readme_tells_what_rl_gains_at_25_to_32_steps():
    rollout, four = (statistics.fmean(by_seed(of('rl'), f'25-32: RL: {way}', 'mean'))
                     for way in ('one unbounded rollout each', 'C=4, T=4'))
    text = ' '.join(TEXTS['README.md'].split())
    assert f'one unbounded rollout is right in {rollout:.1f} %, C=4 in {four:.1f} %' in text
