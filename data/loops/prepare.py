"""Two packed sets of the loops task (task.py): whole solutions, and continuations of what several candidates left.

    python data/loops/prepare.py --key=value ...            keys: those of LoopsConfig

out/traces holds problems of `low` to `high` steps with their solutions, trimmed to the context by the rule (at the default
settings all fit); out/votes aggregation examples, for problems of 3 to 72 steps and 0, 1, 2 or 4 candidates: of a problem
too deep for the context, the model sees one budget at a time. A training config mixes the two sets by weight.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
import configurator
from data.loops.task import ENC, NOISE, aggregation_sample, draw_problem, trace_sample
from data.reasoning import OUTCOMES, RULES, trim, write_packed


@dataclass
class LoopsConfig:
    out: str = str(Path(__file__).parent)   # folder of the two sets
    context: int = 256              # tokens in a window
    rule: str = 'ap'                # what is done to longer solutions: 'ap', 'truncate' or 'drop'
    traces: int = 30_000            # solutions
    votes: int = 30_000             # aggregation examples
    low: int = 3                    # fewest and most steps of a solution
    high: int = 36
    noise: float = NOISE            # share of wrong values
    budget: int = 41                # tokens of a continuation: the value and 8 steps
    tail: int = 10                  # tokens of a tail: 2 steps
    seed: int = 0

    def __post_init__(self):
        for key in ('context', 'traces', 'votes', 'budget', 'tail'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key} is {getattr(self, key)}, it must be at least 1')
        if self.rule not in RULES:
            raise ValueError(f'rule is {self.rule!r}, choose from {", ".join(RULES)}')
        if not 0 <= self.noise <= 1:
            raise ValueError(f'noise is {self.noise}, it must lie between 0 and 1')


def prepare_loops(config):
    """Draws, trims, packs, writes out/traces and out/votes; val is a twentieth of train's size."""
    rng = random.Random(config.seed)

    def trace(split):
        return trace_sample(rng, draw_problem(rng, config.low, config.high, split), config.noise)

    def aggregation(split):
        problem = draw_problem(rng, 3, 72, split)
        return aggregation_sample(rng, problem, rng.choice([0, 1, 1, 2, 4, 4, 4, 4]), config.budget,
                                  config.tail, config.noise)

    for name, n, draw, fit in ('traces', config.traces, trace, config.rule), ('votes', config.votes, aggregation, 'drop'):
        packed = {}
        for split, size in ('train', n), ('val', max(1, n // 20)):
            packed[split], done = trim((draw(split) for _ in range(size)), config.context, fit)
            print(f'{name}, {split}, {fit} to {config.context:,} tokens:',
                  ', '.join(f'{done[what]:,} {what}' for what in OUTCOMES if done[what]))
        write_packed(packed, Path(config.out) / name, config.context, ENC)


if __name__ == '__main__':
    with configurator.one_line_errors('prepare.py: error'):
        prepare_loops(*configurator.read(sys.argv[1:], LoopsConfig))
