"""Draw the pictures of README.md and RESULTS.md from the tables in results/: `python -m evidence.pictures`.

results/NAME.svg is drawn from results/NAME.csv by the script that measures it. One table comes from a training run:

    results/training.csv        columns step, loss, val_loss, entropy of runs/demo/log.csv, after `make demo`

Needs matplotlib (extra `plot`).
"""
import sys

import configurator
from evidence import attention, balancer, cca_parts, kv_cache, residual, rl, router, rsa, rsa_cost, trimming
from evidence.claims import one_line_errors, picture


def training(figure, rows):
    """Plot loss and load entropy over the steps of the demo."""
    left = figure.subplots()
    right = left.twinx()
    for axis, column, label, color, style in ((left, 'loss', 'training loss', 'tab:blue', '-'),
                                              (left, 'val_loss', 'validation loss', 'black', 'o'),
                                              (right, 'entropy', 'load entropy', 'tab:orange', '-')):
        points = [(int(row['step']), float(row[column])) for row in rows if row[column]]
        axis.plot(*zip(*points), style, color=color, label=label)
    left.set(xlabel='step', ylabel='nats per token')
    right.set(ylabel='load entropy (1: even)', ylim=(0, 1.02))


PICTURES = {'training': training, 'rsa_lengths': rsa.draw_lengths, 'rsa_aggregation': rsa.draw_aggregation,
            'rl': rl.draw, 'rl_long': rl.draw_long, 'rl_rewards': rl.draw_rewards, 'rl_replay': rl.draw_replay,
            'attention': attention.draw, 'balancer': balancer.draw, 'cca_parts': cca_parts.draw,
            'kv_cache': kv_cache.draw, 'residual': residual.draw, 'router': router.draw, 'rsa_cost': rsa_cost.draw,
            'trimming': trimming.draw}


def main():
    for name, draw in PICTURES.items():
        picture(name, draw)


if __name__ == '__main__':
    with one_line_errors('pictures'):
        configurator.read(sys.argv[1:])                         # it has no settings
        main()
