"""What the scripts of this folder share: runs over seeds, a table that goes on where it was stopped, and a verdict.

A claim is tested by a table whose rows are runs, `setting, seed, figures`. Each run is train.py's own, or rl.py's; a
baseline or an ablated part takes the place of a step from outside, by `replaced`. Two settings are compared seed by
seed: runs of one seed see the same data in the same order, and begin alike where their shapes are. A script ends in
its `program`, which prints the table, the verdicts, and draws the picture. For n seeds and the differences d_i,

    d +- t s / sqrt(n)           d, s: their mean and standard deviation; t: 97.5 % point of Student's t, n - 1 degrees

is the interval that holds the true difference with 95 % confidence. If it does not hold 0, the sign is told.
"""
import csv
import math
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
    seeds: int = 3                  # runs of each setting, with seeds 0, 1, ...
    quick: bool = False             # a first look at next to no training, whose table is not kept in results/
    out: str = 'runs/evidence'      # folder of the runs

    def __post_init__(self):
        configurator.check_ranges(self, seeds=(1, 11))

    def folder(self, name):
        """Where a script keeps its runs of that name: those of first looks apart."""
        return f'{self.out}/{"quick_" * self.quick}{name}'


replaced = mock.patch.multiple      # with replaced(model, CCA=Other): ...    gives model.CCA back at the end


def trained(folder, sizes, **settings):
    """Train a ZayaConfig into a run folder, or go on with it where it was stopped. settings: of TrainConfig. Return its
    log, {column: (steps, values)}."""
    steps = settings['max_steps']
    defaults = dict(dataset='data/stdlib', eval_every=steps, checkpoint_every=steps, sample_tokens=0)
    train.train(train.TrainConfig(out_dir=str(folder), **defaults | settings), sizes)
    return read_log(folder)


def table(name, config, settings, measure, seeds=None):
    """Fill results/NAME.csv: a row for each (setting, seed). measure(setting, seed) -> {column: figure}. Rows that are
    there already are not measured again. Return all rows of these seeds as [{column: text}]."""
    path = Path(config.folder(name) + '.csv') if config.quick else RESULTS / f'{name}.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_table(path) if path.exists() else []
    done = {(row['setting'], row['seed']) for row in rows}
    seeds = seeds or range(config.seeds)
    wanted = [(setting, seed) for seed in seeds for setting in settings]
    for setting, seed in tqdm(wanted, unit='run', desc=name):
        if (str(setting), str(seed)) in done:
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
    """The figures of a setting, in the order of the seeds."""
    found = {int(row['seed']): float(row[column]) for row in rows if row['setting'] == str(setting)}
    return [found[seed] for seed in sorted(found)]


def with_seeds(values, form, shown=True):
    """The mean and, in brackets, the figures of the seeds one by one."""
    one_by_one = ', '.join(f'{value:{form}}' for value in values)
    return f'{statistics.fmean(values):{form}}' + (f' ({one_by_one})' if shown else '')


def paired(a, b):
    """(mean, half of the 95 % interval) of a - b, seed by seed. With one seed the half is infinite."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    return statistics.fmean(differences), T[n - 2] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf


def verdict(claim, a, b):
    """Judge the claim that a lies below b, seed by seed. Print and return the verdict."""
    mean, half = paired(a, b)
    word = 'not to be told apart at this size' if abs(mean) <= half else 'reproduced' if mean < 0 else 'contradicted'
    enough = '' if abs(mean) > half or len(a) < 2 else \
        f'; it takes {seeds_needed(a, b)} seeds to tell a difference of that size'
    print(f'{claim}: {mean:+.4g} +-{half:.2g} over {len(a)} seeds: {word}{enough}')
    return word


def seeds_needed(a, b):
    """How many seeds it takes until the interval holds 0 no longer, if mean and deviation stay as they are."""
    mean, s = statistics.fmean(x - y for x, y in zip(a, b)), statistics.stdev(x - y for x, y in zip(a, b))
    return next((n for n in range(2, 10_000) if (*T, 2.0)[min(n - 2, len(T))] * s < abs(mean) * math.sqrt(n)),
                'over 10,000')


def one_line_errors(name):
    return configurator.one_line_errors(f'evidence.{name}', '', 'the same command goes on where it was')


def run_experiments(name, experiments):
    """What a script of several experiments does when it is run. experiments: {first argument: function of config}."""
    with one_line_errors(name):
        if len(sys.argv) < 2 or sys.argv[1] not in experiments:
            raise ValueError(f'name an experiment: {", ".join(experiments)}')
        experiments[sys.argv[1]](*configurator.read(sys.argv[2:], ClaimConfig))


def picture(name, draw):
    """Write results/NAME.svg, the figure draw(plt, rows) of results/NAME.csv. The same table gives the same file."""
    configurator.package('matplotlib').use('svg')
    plt, path = configurator.package('matplotlib.pyplot'), RESULTS / f'{name}.svg'
    plt.rcParams['svg.hashsalt'] = 'nanozaya'
    draw(plt, read_table(RESULTS / f'{name}.csv')).savefig(path, metadata={'Date': None})
    plt.close()
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run_claim(name, main, draw):
    """What a script does when it is run: main(config), then its picture, unless it was a first look."""
    with one_line_errors(name):
        config, = configurator.read(sys.argv[1:], ClaimConfig)
        main(config)
        config.quick or picture(name, draw)
