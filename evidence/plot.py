"""Plot the log.csv of one or several training runs: `python -m evidence.plot RUN_FOLDER [RUN_FOLDER ...]`.

The upper axes show loss, learning rate, gradient norm and speed over the steps, with one line per run. Below, for each
run, are the load entropy of each layer as a heat map and the RMS of each layer's residual stream. --out=FILE.svg or
.png names the figure; the default is log.svg in the (first) run folder.

Needs matplotlib (extra `plot`).
"""
import contextlib
import csv
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator

CURVES = (('loss', 'nats per token'), ('lr', 'learning rate'), ('grad_norm', 'gradient norm'),
          ('tokens_per_s', 'tokens/s'))
NEEDED = {'step', 'val_loss', 'entropy_0', 'residual_0', *(column for column, _ in CURVES)}


@dataclass
class PlotConfig:
    out: str = ''                   # the figure, .svg or .png

    def __post_init__(self):
        if self.out and Path(self.out).suffix not in ('.svg', '.png'):
            raise ValueError(f'out is {self.out!r}: name a file that ends in .svg or .png')


def read_log(folder):
    """Return a run's log as {column: (steps, values)}, without the steps at which a column was not measured.
    Raise ValueError if the folder has no log.csv of train.py."""
    path = Path(folder, 'log.csv')
    if not path.is_file():
        raise ValueError(f'{folder} has no log.csv: name a run folder of train.py')
    with open(path, newline='', encoding='utf-8', errors='replace') as file:
        rows = csv.DictReader(file)
        if missing := sorted(NEEDED - set(rows.fieldnames or ())):
            raise ValueError(f'{path} was not written by train.py: it has no column {missing[0]}')
        columns = {name: ([], []) for name in rows.fieldnames}
        for row in rows:
            with contextlib.suppress(TypeError, ValueError):    # the last line may be incomplete after a kill
                found = {name: float(row[name]) for name in columns if row[name] != ''}
                for name, value in found.items():
                    columns[name][0].append(found['step'])
                    columns[name][1].append(value if math.isfinite(value) else math.nan)
    if not columns['loss'][0]:
        raise ValueError(f'{path} holds no step yet: plot it later')
    return columns


def by_layer(log, kind):
    """Return [(steps, values)] of the columns kind_0, kind_1, ..."""
    return [log[f'{kind}_{layer}'] for layer in itertools.takewhile(lambda n: f'{kind}_{n}' in log, itertools.count())]


def draw(logs):
    """Return the figure of {folder: log}."""
    size, colormaps = (10, 5.5 + 2.6 * len(logs)), configurator.package('matplotlib').colormaps
    figure = configurator.package('matplotlib.figure').Figure(figsize=size, layout='constrained')
    axes = figure.subplots(2 + len(logs), 2)
    for axis, (column, label) in zip(axes[:2].flat, CURVES):
        for folder, log in logs.items():
            line, = axis.plot(*log[column], label=folder)
            if column == 'loss':
                axis.plot(*log['val_loss'], 'o', color=line.get_color(), markersize=4, label=f'{folder}, validation')
        axis.set(xlabel='step', ylabel=label, yscale='log' if column == 'grad_norm' else 'linear')
    axes[0, 0].legend(frameon=False, fontsize='small')
    for (left, right), (folder, log) in zip(axes[2:], logs.items()):
        layers = by_layer(log, 'entropy')
        heat = left.pcolormesh(layers[0][0], range(len(layers)), [values for _, values in layers], vmin=0, vmax=1)
        figure.colorbar(heat, ax=left, label='load entropy (1: even)')
        left.set(xlabel='step', ylabel='layer', title=folder, yticks=range(0, len(layers), 1 + len(layers) // 10))
        layers = by_layer(log, 'residual')
        for layer, (steps, values) in enumerate(layers):
            right.plot(steps, values, color=colormaps['viridis'](layer / len(layers)),
                       label=f'layer {layer}' if layer in (0, len(layers) - 1) else None)
        right.set(xlabel='step', ylabel='RMS of the residual stream', title=folder)
        right.legend(frameon=False, fontsize='small')
    return figure


def main(arguments):
    folders, config = configurator.read_with_files(arguments, PlotConfig)
    if not folders:
        raise ValueError('name a run folder of train.py, or several')
    try:
        logs = {folder: read_log(folder) for folder in folders}
    except csv.Error as error:
        raise ValueError(f'a log.csv was not written by train.py: {error}') from None
    out = Path(config.out or Path(folders[0], 'log.svg'))
    draw(logs).savefig(out)                                     # the suffix decides the format
    print(out)


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.plot'):
        main(sys.argv[1:])
