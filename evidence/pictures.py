"""The pictures of README.md, from small tables that are committed beside them: `python -m evidence.pictures`.

    results/training.csv        columns step, loss, val_loss, entropy of runs/demo/log.csv, after `make demo`
    results/rsa_lengths.csv     `python -m data.loops.evaluate main`: a row for each length, method and training seed
    results/rl.csv              `python -m evidence.rl main`: a row for each length and method, before RL and after

and, of each script in CLAIMS, results/NAME.csv, by its function draw. Each picture says one thing.

Needs matplotlib (extra `plot`).
"""
import importlib
import statistics

from evidence.claims import picture

CLAIMS = 'kv_cache', 'attention', 'cca_parts', 'residual'


def training(plt, rows):
    """While the loss falls, the balancer brings the load of the experts to almost perfect evenness."""
    figure, left = plt.subplots(figsize=(7, 3.2), layout='constrained')
    right = left.twinx()
    for axis, column, label, color, style in ((left, 'loss', 'loss', 'tab:blue', '-'),
                                              (left, 'val_loss', 'loss on held-out files', 'black', 'o'),
                                              (right, 'entropy', 'load entropy', 'tab:orange', '-')):
        points = [(int(row['step']), float(row[column])) for row in rows if row[column]]
        axis.plot(*zip(*points), style, color=color, label=label)
    left.set(xlabel='step', ylabel='nats a token')
    right.set(ylabel='load entropy, 1: even', ylim=(0, 1.02))
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


def rsa_lengths(plt, rows):
    """Reading four tails instead of one keeps a population right, however long the problem is."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    steps = list(dict.fromkeys(row['steps'] for row in rows))
    for method, style in ('C=4', 'o-'), ('C=1', 's-'), ('one unbounded rollout', '^--'), ('one bounded rollout', 'v:'):
        per_length = {s: [float(row['mean']) for row in rows if (row['steps'], row['method']) == (s, method)]
                      for s in steps}
        points = [(i, statistics.fmean(per_length[s]), min(per_length[s]), max(per_length[s]))
                  for i, s in enumerate(steps) if per_length[s]]
        x, y, low, high = zip(*points)
        spread = [[a - b for a, b in zip(y, low)], [a - b for a, b in zip(high, y)]]
        axis.errorbar(x, y, spread, fmt=style, capsize=3, label=method)
    axis.set(xticks=range(len(steps)), xticklabels=steps, xlabel='steps of the problem', ylim=(-3, 103),
             ylabel='right answers, %')
    figure.legend(loc='outside upper center', ncols=4, frameon=False)
    return figure


def rl(plt, rows):
    """Rewards for answers unlearn the errors of the data, at every length and in every way to think."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    lengths = list(dict.fromkeys(row['steps'] for row in rows))
    for method, color, mark in ('one rollout', 'tab:green', '^'), ('C=1', 'tab:orange', 's'), ('C=4', 'tab:blue', 'o'):
        for run, style, fill in ('before', '--', 'none'), ('after', '-', 'full'):
            wrong = {i: [max(0.02, 100 - float(row['mean'])) for row in rows
                         if (row['run'], row['steps'], row['method']) == (run, length, method)]
                     for i, length in enumerate(lengths)}
            points = [(i, statistics.fmean(values)) for i, values in wrong.items() if values]
            axis.plot(*zip(*points), mark + style, color=color, fillstyle=fill, label=f'{method}, {run} RL')
            axis.plot(*zip(*[(i, value) for i in wrong for value in wrong[i]]), mark, color=color, markersize=2)
    axis.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel='steps of the problem', yscale='log',
             ylim=(0.015, 100), ylabel='wrong answers, % (0.02: none)')
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


def main():
    for draw in training, rsa_lengths, rl:
        picture(draw.__name__, draw)
    for name in CLAIMS:
        picture(name, importlib.import_module(f'evidence.{name}').draw)


if __name__ == '__main__':
    main()
