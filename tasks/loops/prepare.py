"""Write two packed datasets of the loops task (task.py): whole solutions, and aggregation samples.
From the project's root:

    python -m tasks.loops.prepare --key=value ...            keys: those of LoopsConfig

out/traces has problems of `low` to `high` steps with their solutions, trimmed to the context by the rule (with the
default settings all fit). out/votes has aggregation samples for problems of 3 to 72 steps: when a problem has too many
for the context, the model sees one budget at a time. A training config mixes the two datasets by weight.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from tasks.loops.task import ENC, MAX_OPERATIONS, NOISE_RATE, aggregation_sample, draw_problem, trace_sample
from data.prepare import replacing
from data.reasoning import RULES, trim_and_report, write_packed

# Number of candidates in an aggregation sample, each equally likely: half of the samples have 4, RSA's default;
# 1 is Markovian continuation from the candidate's own tail; 0 is the first round, which has no tails.
CANDIDATES = 0, 1, 1, 2, 4, 4, 4, 4


@dataclass
class LoopsConfig:
    out: str = str(Path(__file__).parent)          # folder of the two datasets: tasks/loops
    context: int = 256                             # tokens per window
    rule: str = 'ap'                               # how longer solutions are shortened: 'ap', 'truncate' or 'drop'
    traces: int = 30_000                           # whole solutions
    votes: int = 30_000                            # aggregation samples
    low: int = 3                                   # fewest and most steps of a solution
    high: int = 36
    operations: int = MAX_OPERATIONS               # most per program; the test split 'deeper' has 14, 'deepest' 26
    noise: float = NOISE_RATE                      # fraction of wrong values
    budget: int = 41                               # tokens of a continuation: the first value and 8 steps
    tail: int = 10                                 # tokens of a tail: 2 steps
    seed: int = 0

    def __post_init__(self):
        configurator.check_ranges(self, context=(1, 10**7), rule=tuple(RULES), traces=(1, None), votes=(1, None),
                                  operations=(3, 26), noise=(0, 1), budget=(1, None), tail=(1, None))


def prepare_loops(config):
    """Draw, trim and pack the samples, and write out/traces and out/votes; val has a twentieth of train's samples."""
    rng = random.Random(config.seed)

    def trace(split):
        problem = draw_problem(rng, config.low, config.high, split, config.operations)
        return trace_sample(rng, problem, config.noise)

    def aggregation(split):
        problem, candidates = draw_problem(rng, 3, 72, split, config.operations), rng.choice(CANDIDATES)
        return aggregation_sample(rng, problem, candidates, config.budget, config.tail, config.noise)

    out = Path(config.out)
    with replacing(out / 'traces') as traces, replacing(out / 'votes') as votes:        # both or neither
        for folder, name, n, draw, rule in ((traces, 'traces', config.traces, trace, config.rule),
                                            (votes, 'votes', config.votes, aggregation, 'drop')):
            packed = {split: trim_and_report(f'{name}, {split}', (draw(split) for _ in range(size)), config.context,
                                             rule)
                      for split, size in (('train', n), ('val', max(1, n // 20)))}
            write_packed(packed, folder, config.context, ENC)


if __name__ == '__main__':
    with configurator.one_line_errors('tasks.loops.prepare'):
        prepare_loops(*configurator.read(sys.argv[1:], LoopsConfig))
