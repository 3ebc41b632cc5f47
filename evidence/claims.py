"""Shared code of the claim scripts: runs over seeds, a table of measurements that can be resumed, and verdicts.

Each script appends its measurements to results/NAME.csv as (setting, seed, values) and measures only what is missing.
Runs are those of train.py or rl.py; a baseline or an ablation replaces a step of the model from outside, with
`replaced`. Two settings are compared seed by seed: runs of one seed see the same data in the same order and start from
the same weights where their shapes agree. With n seeds and paired differences d_i,

    d ± t s / sqrt(n)           d, s: mean and standard deviation of d_i; t: 97.5 % point of Student's t, n - 1 degrees

is the 95 % confidence interval of the true difference. The verdict on a claim is one of

    reproduced                  the interval excludes 0, and the sign is the claimed one
    contradicted at this size   the interval excludes 0, and the sign is the opposite one
    no significant difference   the interval contains 0; "underpowered: n seeds would resolve it" tells how many seeds
                                would exclude 0 if mean and standard deviation stayed the same
"""
import csv
import itertools
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tqdm import tqdm

import configurator
import train
from evidence.plot import read_log

RESULTS = Path(__file__).with_name('results')
T = 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228        # for 1, 2, ... degrees of freedom


@dataclass
class ClaimConfig:
    seeds: int = 3                  # runs per setting, with seeds 0, 1, ...
    quick: bool = False             # a smoke test with almost no training; its table is not written to results/
    out: str = 'runs/evidence'      # folder of the runs

    def __post_init__(self):
        configurator.check_ranges(self, seeds=(1, 11))

    def folder(self, name):
        """Return the folder of the runs of that name, a separate one for --quick."""
        return f'{self.out}/{"quick_" * self.quick}{name}'


# ---- measuring ----

replaced = mock.patch.multiple      # with replaced('model', CCA=Other): ...    restores model.CCA at the end


def train_run(folder, sizes, **settings):
    """Train a model of these sizes (a ZayaConfig), or resume its run. settings: fields of TrainConfig. Return its log,
    {column: (steps, values)}."""
    steps = settings['max_steps']
    defaults = dict(dataset='data/stdlib', eval_every=steps, checkpoint_every=steps, sample_tokens=0)
    train.train(train.TrainConfig(out_dir=str(folder), **defaults | settings), sizes)
    return read_log(folder)


def fill_table(name, config, settings, measure, seeds=None):
    """Append measure(setting, seed) -> {column: value} to results/NAME.csv for each setting and seed that it lacks.
    Return the lines of these seeds, [{column: text}]."""
    path = Path(config.folder(name) + '.csv') if config.quick else RESULTS / f'{name}.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_table(path) if path.exists() else []
    done = {(row['setting'], row['seed']) for row in rows}
    seeds = seeds or range(config.seeds)
    for seed, setting in tqdm(list(itertools.product(seeds, settings)), unit='run', desc=name):
        if (setting, str(seed)) in done:
            continue
        row = {'setting': setting, 'seed': seed} | {
            key: f'{value:.6g}' if isinstance(value, float) else value for key, value in measure(setting, seed).items()}
        with open(path, 'a', newline='') as file:
            writer = csv.DictWriter(file, row, lineterminator='\n')
            if not rows:
                writer.writeheader()
            writer.writerow(row)
        rows.append({key: str(value) for key, value in row.items()})
    return [row for row in rows if int(row['seed']) in seeds]


def read_table(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def by_seed(rows, setting, column):
    """Return the values of a setting, ordered by seed; empty if it was not measured."""
    found = {int(row['seed']): row[column] for row in rows if row['setting'] == setting}
    return [float(found[seed]) for seed in sorted(found) if found[seed] != '']


# ---- reporting ----

def print_table(columns, rows):
    """Print a Markdown table."""
    for row in columns, ['---'] * len(columns), *rows:
        print('|', ' | '.join(map(str, row)), '|')
    print()


def spread(values, form):
    """Format the mean over the seeds, with the standard deviation unless that rounds to 0."""
    deviation = format(statistics.stdev(values) if len(values) > 1 else 0, form)
    return f'{statistics.fmean(values):{form}}' + f' ± {deviation}' * (deviation != format(0, form))


def print_settings(rows, settings, **columns):
    """Print a line per setting. columns: {column of rows: (its title, format)}; a function of the values may take the
    place of the format."""
    def cell(setting, column, form):
        values = by_seed(rows, setting, column)
        return (form(values) if callable(form) else spread(values, form)) if values else ''
    print_table(['setting', *(title for title, _ in columns.values())],
                [[setting, *(cell(setting, column, form) for column, (_, form) in columns.items())]
                 for setting in settings])


def paired(a, b):
    """Return the mean and half the width of the 95 % interval of a - b over the seeds, which is infinite for one."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    return statistics.fmean(differences), T[n - 2] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf


def verdict(a, b):
    """Judge the claim that a lies below b. Return one of the verdicts above."""
    mean, half = paired(a, b)
    if abs(mean) > half:
        return 'reproduced' if mean < 0 else 'contradicted at this size'
    n = len(a)
    s = half * math.sqrt(n) / T[n - 2] if n > 1 else math.inf
    enough = [n for n in range(2, 10_000) if (*T, 2.0)[min(n - 2, len(T))] * s < abs(mean) * math.sqrt(n)]
    return 'no significant difference' + (f'; underpowered: {enough[0]:,} seeds would resolve it' if enough else '')


def below(claim, a, b, unit):
    """Return (claim, difference, verdict): a line of print_verdicts for the claim that a lies below b. One value of a
    is compared with every b."""
    a = a * len(b) if len(a) == 1 else a
    mean, half = paired(a, b)
    digits = max(0, 1 - math.floor(math.log10(half))) if 0 < half < math.inf else 2    # two significant ones of `half`
    return claim, f'{mean:+,.{digits}f} ± {half:,.{digits}f} {unit}'.rstrip(), verdict(a, b)


def compare(rows, column, unit, *pairs):
    """Return a line of print_verdicts per pair of settings: the column of the first below that of the second."""
    return [below(f'{column} of {a} below {b}', by_seed(rows, a, column), by_seed(rows, b, column), unit)
            for a, b in pairs]


def print_verdicts(verdicts):
    print_table(['claim', 'difference, 95 % CI', 'verdict'], verdicts)


def picture(name, draw):
    """Write results/NAME.svg: draw(figure, rows) plots results/NAME.csv, and a legend of all labels is added. The file
    depends on the table only."""
    configurator.package('matplotlib').rcParams.update({'svg.hashsalt': 'nanozaya', 'svg.fonttype': 'none'})
    figure = configurator.package('matplotlib.figure').Figure(figsize=(7, 3.2), layout='constrained')
    path = RESULTS / f'{name}.svg'
    draw(figure, read_table(RESULTS / f'{name}.csv'))
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if n := len(handles):                                       # more than 4 entries take two lines
        figure.legend(handles.values(), handles, loc='outside upper center', frameon=False,
                      ncols=n if n <= 4 else -(-n // 2))
    figure.savefig(path, metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
    text = re.sub(r'\d+\.\d{4,}', lambda number: f'{float(number[0]):.4g}', path.read_text())  # short coordinates
    path.write_text(re.sub(r' \n(?=[MLQCz"])', ' ', text))                                      # one line per path
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# ---- command lines ----

def one_line_errors(name):
    return configurator.one_line_errors(f'evidence.{name}', '', 'the same command resumes')


def run_experiments(name, experiments):
    """Run the experiment that the first argument names. experiments: {name: function of the ClaimConfig}."""
    with one_line_errors(name):
        names, config = configurator.read_with_files(sys.argv[1:], ClaimConfig)
        if len(names) != 1 or names[0] not in experiments:
            raise ValueError(f'name an experiment: {", ".join(experiments)}')
        experiments[names[0]](config)


def run_claim(name, main, draw):
    """Run main(config), then draw its picture unless it was a smoke test."""
    with one_line_errors(name):
        config, = configurator.read(sys.argv[1:], ClaimConfig)
        main(config)
        config.quick or picture(name, draw)
