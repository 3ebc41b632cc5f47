"""The pictures of README.md, from small tables that are committed beside them: `python -m evidence.pictures`.

    results/training.csv        columns step, loss, val_loss, entropy of runs/demo/log.csv, after `make demo`
    results/rsa_lengths.csv     `python -m evidence.rsa main`: a row for each length, method and training seed
    results/rsa_aggregation.csv `python -m evidence.rsa aggregation`; those below are named like their scripts, too
    results/rsa_cost.csv, trimming.csv, router.csv, balancer.csv
    results/rl.csv, rl_long.csv `python -m evidence.rl main` and `long`: before RL and after, at every length

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
    steps = list(dict.fromkeys(row['setting'].split(': ')[0] for row in rows))
    for method, style in ('C=4', 'o-'), ('C=1', 's-'), ('one unbounded rollout', '^--'), ('one bounded rollout', 'v:'):
        per_length = {s: [float(row['mean']) for row in rows if row['setting'].startswith(f'{s}: {method}')]
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
    lengths = list(dict.fromkeys(row['setting'].split(': ')[0] for row in rows))
    for method, color, mark in (('one unbounded rollout', 'tab:green', '^'), ('C=1', 'tab:orange', 's'),
                                ('C=4', 'tab:blue', 'o')):
        for run, style, fill in ('before', '--', 'none'), ('RL', '-', 'full'):
            wrong = {i: [max(0.02, 100 - float(row['mean'])) for row in rows
                         if row['setting'].startswith(f'{length}: {run}: {method}')]
                     for i, length in enumerate(lengths)}
            points = [(i, statistics.fmean(values)) for i, values in wrong.items() if values]
            axis.plot(*zip(*points), mark + style, color=color, fillstyle=fill,
                      label=f'{method}, {run.replace("RL", "after")} RL')
            axis.plot(*zip(*[(i, value) for i in wrong for value in wrong[i]]), mark, color=color, markersize=2)
    axis.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel='steps of the problem', yscale='log',
             ylim=(0.015, 110), ylabel='wrong answers, % (0.02: none)')
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


def rl_long(plt, rows):
    """Thinking in rounds on problems three times as long as any in training."""
    return rl(plt, rows)


def bars(plt, rows, groups, kinds, label):
    """A bar for the mean over the seeds of each setting 'group: kind', and a dot for each seed."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for k, kind in enumerate(kinds):
        x = [g + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for g in range(len(groups))]
        values = [[float(row['mean']) for row in rows if row['setting'] == f'{group}: {kind}']
                  for group in groups]
        axis.bar(x, list(map(statistics.fmean, values)), 0.75 / len(kinds), label=kind)
        axis.plot(*zip(*[(at, value) for at, found in zip(x, values) for value in found]), 'k.', markersize=3)
    axis.set(xticks=range(len(groups)), xticklabels=groups, xlabel=label, ylim=(0, 103), ylabel='right answers, %')
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


def rsa_aggregation(plt, rows):
    """Without aggregation examples a model reasons as well, but does not know what to do with tails."""
    rows = [row | {'setting': ': '.join(row['setting'].split(', T=')[0].split(': ')[:0:-1])}
            for row in rows]
    return bars(plt, rows, ['one unbounded rollout each', 'C=1', 'C=4'], ['with', 'without'],
                'aggregation examples in the training: with them, without them')


def trimming(plt, rows):
    """In one rollout, only who has learned from answers that were kept answers what does not fit into the context."""
    rows = [row | {'setting': f'{steps}: {rule}, {way.split(", ")[0]}'} for row in rows
            for steps, rule, way in [row['setting'].split(': ')]]
    ways = [f'{rule}, {way}' for way in ('one rollout', 'C=4') for rule in ('ap', 'truncate', 'drop')]
    return bars(plt, rows, ['3-7', '14-20', '25-32'], ways, 'steps of the problem')


def rsa_cost(plt, rows):
    """Enough rounds, more than two tails to outvote errors, tails as long as those trained on."""
    base = dict(N=16, C=4, T=4, tau=10)
    figure, axes = plt.subplots(1, 4, figsize=(7, 2.6), sharey=True, layout='constrained')
    long = statistics.fmean(float(row['mean']) for row in rows if row['setting'] == 'one long rollout')
    changed = dict(C=(1, 2, 4, 8), N=(4, 8, 16), T=(2, 3, 4, 6), tau=(5, 10, 20, 41))
    for axis, (key, values) in zip(axes, changed.items()):
        means = []
        for value in values:
            setting = ' '.join(f'{name}={number}' for name, number in (base | {key: value}).items())
            found = [float(row['mean']) for row in rows if row['setting'] == setting]
            axis.plot([value] * len(found), found, 'k.', markersize=3)
            means.append(statistics.fmean(found))
        axis.plot(values, means, 'o-', color='tab:blue', markersize=4)
        axis.axhline(long, color='tab:orange', linestyle='--', linewidth=1)
        axis.set(xlabel=key, xticks=values, ylim=(-3, 103))
    axes[0].set(ylabel='right answers, %')
    return figure


def entropies(axis, rows, setting, **style):
    """The load entropy over the steps: the mean over the seeds, and all that lies between them."""
    rows = [row for row in rows if row['setting'] == setting]
    steps = [key for key in rows[0] if key.startswith('entropy_') and rows[0][key]]
    x, y = [int(key[8:]) for key in steps], [[float(row[key]) for row in rows] for key in steps]
    axis.plot(x, list(map(statistics.fmean, y)), **style)
    axis.fill_between(x, list(map(min, y)), list(map(max, y)), color=style['color'], alpha=0.15, linewidth=0)


def router(plt, rows):
    """By itself every router collapses; with the balancer none does."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for form, color in ('linear', 'tab:orange'), ('mlp', 'tab:green'), ('mlp + eda', 'tab:blue'):
        for rule, style in ('pid', '-'), ('none', '--'):
            entropies(axis, rows, f'{form}, {rule}', color=color, linestyle=style,
                      label=f'{form}, {"balancer" if rule == "pid" else "none"}')
    axis.set(xlabel='step', ylabel='load entropy, 1: even', ylim=(0, 1.02))
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


def balancer(plt, rows):
    """From no balancing to a steady one; at the dotted line the text changes from code to prose."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for setting, color in zip(dict.fromkeys(row['setting'] for row in rows), plt.cm.tab10.colors):
        entropies(axis, rows, setting, color=color, label=setting)
    axis.axvline(110, color='black', linestyle=':', linewidth=1)
    axis.set(xlabel='step', ylabel='load entropy, 1: even', ylim=(0, 1.02))
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure


def draw(*names):
    """Draw results/NAME.svg of results/NAME.csv, each by the function of that name, here or in its script."""
    for name in names:
        picture(name, importlib.import_module(f'evidence.{name}').draw if name in CLAIMS else globals()[name])


def main():
    draw(*'training rsa_lengths rsa_aggregation rsa_cost trimming rl rl_long router balancer'.split(), *CLAIMS)


if __name__ == '__main__':
    main()
