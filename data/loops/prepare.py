"""Two packed sets of the loops task (task.py): whole solutions, and continuations of what several candidates left.

    python data/loops/prepare.py [--out=DIR] [--context=N] [--rule=ap|truncate|drop] [--traces=N] [--votes=N]
                                 [--low=N] [--high=N] [--noise=P] [--budget=N] [--tail=N] [--seed=N]

DIR/traces holds problems of `low` to `high` steps with their solutions, trimmed to the context by the rule (at the default
settings all fit); DIR/votes aggregation examples, for problems of 3 to 72 steps and 0, 1, 2 or 4 candidates: of a problem
too deep for the context, the model sees one budget at a time. A training config mixes the two sets by weight.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for `data.reasoning`
from data.loops.task import ENC, NOISE, aggregation_sample, draw_problem, trace_sample
from data.reasoning import OUTCOMES, RULES, trim, write_packed


def prepare_loops(out, context=256, rule='ap', traces=30_000, votes=30_000, low=3, high=36, noise=NOISE, budget=41,
                  tail=10, seed=0):
    """Draws, trims, packs, writes out/traces and out/votes; val is a twentieth of train's size."""
    rng = random.Random(seed)

    def trace(split):
        return trace_sample(rng, draw_problem(rng, low, high, split), noise)

    def aggregation(split):
        problem = draw_problem(rng, 3, 72, split)
        return aggregation_sample(rng, problem, rng.choice([0, 1, 1, 2, 4, 4, 4, 4]), budget, tail, noise)

    for name, n, draw, fit in ('traces', traces, trace, rule), ('votes', votes, aggregation, 'drop'):
        packed = {}
        for split, size in ('train', n), ('val', max(1, n // 20)):
            packed[split], done = trim((draw(split) for _ in range(size)), context, fit)
            print(f'{name}, {split}, {fit} to {context:,} tokens:',
                  ', '.join(f'{done[what]:,} {what}' for what in OUTCOMES if done[what]))
        write_packed(packed, Path(out) / name, context, ENC)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Writes packed sets of the loops task.')
    parser.add_argument('--out', default=Path(__file__).parent, help='folder of the two sets (default: data/loops)')
    parser.add_argument('--context', type=int, default=256, help='tokens in a window (default: 256)')
    parser.add_argument('--rule', choices=RULES, default='ap', help='what is done to longer solutions (default: ap)')
    parser.add_argument('--traces', type=int, default=30_000, help='solutions (default: 30000)')
    parser.add_argument('--votes', type=int, default=30_000, help='aggregation examples (default: 30000)')
    parser.add_argument('--low', type=int, default=3, help='fewest steps of a solution (default: 3)')
    parser.add_argument('--high', type=int, default=36, help='most steps of a solution (default: 36)')
    parser.add_argument('--noise', type=float, default=NOISE, help=f'share of wrong values (default: {NOISE})')
    parser.add_argument('--budget', type=int, default=41, help='tokens of a continuation (default: 41, 1 + 8 steps)')
    parser.add_argument('--tail', type=int, default=10, help='tokens of a tail (default: 10, 2 steps)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    try:
        prepare_loops(**vars(args))
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
