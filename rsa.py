"""Markovian RSA (recursive self-aggregation): a population reasons in rounds of bounded length.

An output has at most beta tokens, and only the last tau tokens of its reasoning, its tail, are kept. In the next round
each candidate reads the question and C tails, sampled uniformly without replacement, and should use the best of them:

    round 0      output_i = generate(question), at most beta tokens                 i = 1..N
    round 1..T   output_i = generate(question, C tails of the previous round)
    always       tail_i   = last tau tokens of the reasoning in output_i
    result       the N outputs of round T; their score is their mean accuracy, not that of the best one

T = 0 is parallel sampling. tau = beta is full-chain RSA. C = 1, where each candidate continues its own tail, is
Delethink. A prompt holds the question and C tails, whatever beta and T are: more rounds need no longer context.
The cost is the total number of generated tokens; prompts do not count.

Source: ZAYA1-8B report (arXiv 2605.05365), section VI; RSA: 2509.26626; Delethink, Markovian thinking: 2510.06557.
Legend: N population   C candidates read per prompt   T rounds after round 0   tau tail
        beta budget (in round T: final_budget)
Use: `python rsa.py --ckpt=FOLDER --question=...`; without one, a loops model gets the first held-out 'hard' problem.
"""
import random
import sys
from dataclasses import asdict, dataclass, replace

import configurator
from runtime.device import pick_device
from sample import SamplingOptions
from tasks import client, problems
from tasks.loops import task
from tasks.policy import load_policy


@dataclass
class RSASettings:
    population: int = 16            # N
    candidates: int = 4             # C
    rounds: int = -1                # T, without round 0; -1: 2, or what a problem of tasks/loops needs
    budget: int = 0                 # beta; 0: 16K, or 41 for loops (a value and 8 steps)
    tail: int = 0                   # tau; 0: 4K, or 10 for loops (the last 2 steps)
    final_budget: int = 0           # budget of round T; 0: the budget if given, else 40K
    compact: str = 'tail'           # 'answer': a finished candidate passes on its answer, not its reasoning
    seed: int = 0                   # of the sampled candidates

    def __post_init__(self):
        configurator.check_ranges(
            self, population=(1, None), candidates=(1, self.population), rounds=(-1, None), budget=(0, None),
            tail=(0, self.budget or None), final_budget=(0, None), compact=('tail', 'answer'))

    def resolved(self, rounds=2, budget=16_384, tail=4096, final_budget=40_960):
        """Fill in the settings that were not given; defaults: the report's."""
        return replace(self, rounds=self.rounds if self.rounds >= 0 else rounds, budget=self.budget or budget,
                       tail=self.tail or tail, final_budget=self.final_budget or self.budget or final_budget)


@dataclass
class Candidate:
    sampled: list                   # indices of the candidates of the previous round whose tails its prompt holds
    prompt: list                    # None: carried over, or read from a file
    output: list = None
    answer: list = None             # None: the output holds no complete answer
    tail: list = None


@dataclass
class Round:
    candidates: list                # N Candidates
    tokens: int = 0                 # generated in this round


def markovian_rsa(*args, **options):
    """Run rounds_of to the end (same arguments). Return a list of T + 1 Rounds per question."""
    return [list(rounds) for rounds in zip(*rounds_of(*args, **options))]


def rounds_of(questions, generate, policy, settings, done=()):
    """Run Markovian RSA on questions, lists of tokens. After each round, yield a list of one Round per question.

    generate(prompts, max_new_tokens) -> the new tokens of each prompt. It is called once per round, with the prompts of
    all questions, and must use new random numbers in every call.
    policy.build_prompt(question, tails) -> a prompt. tails: [] in round 0, then C lists of tokens, some may be empty.
    policy.answer_of(output) -> the answer in it, a list of tokens, or None. A candidate with an answer has finished: if
    C = 1 it is not generated again; if C > 1 it is, since its next prompt holds other tails.
    policy.thought_of(output) -> the part of an output that tails are cut from.
    done: rounds that were run before, each a list of one Round per question; only later rounds are run.
    Which candidates are sampled depends on the seed and the question, not on other questions or on T.
    """
    settings = settings.resolved()
    if not questions or not all(questions):
        raise ValueError('questions: give at least one, and each at least one token')
    rngs = [random.Random(f'{settings.seed} {list(question)}') for question in questions]
    previous = [Round([]) for _ in questions]
    for t in range(settings.rounds + 1):
        sampled = [sample_candidates(rng, t, settings) for rng in rngs]         # also for done rounds, to advance rngs
        if t < len(done):
            previous = done[t]
            continue
        current = [Round([new_candidate(question, before.candidates, reads, policy) for reads in of_question])
                   for question, before, of_question in zip(questions, previous, sampled)]
        batch = [c for now in current for c in now.candidates if c.prompt is not None]
        limit = settings.budget if t < settings.rounds else settings.final_budget
        outputs = list(generate([c.prompt for c in batch], limit)) if batch else []
        assert len(outputs) == len(batch), f'generate gave {len(outputs)} outputs for {len(batch)} prompts'
        assert all(len(output) <= limit for output in outputs), f'generate gave an output of more than {limit} tokens'
        for c, output in zip(batch, outputs):
            c.output, c.answer = output, policy.answer_of(output)
            source = c.answer if settings.compact == 'answer' and c.answer else policy.thought_of(output)
            c.tail = source[-settings.tail:]
        for now in current:
            now.tokens = sum(len(c.output) for c in now.candidates if c.prompt is not None)
        yield current
        previous = current


def sample_candidates(rng, t, settings):
    """Return, for each of N prompts of round t, the indices of the candidates that it reads."""
    population = range(settings.population)
    if t == 0:
        return [[] for _ in population]
    if settings.candidates == 1:
        return [[i] for i in population]
    return [rng.sample(population, settings.candidates) for _ in population]


def new_candidate(question, previous, sampled, policy):
    """Return a Candidate without output, or a copy of a finished one. previous: candidates, [] in round 0."""
    if len(sampled) == 1 and previous[sampled[0]].answer is not None:
        return replace(previous[sampled[0]], sampled=sampled, prompt=None)
    return Candidate(sampled, policy.build_prompt(question, [previous[j].tail for j in sampled]))


@dataclass
class RSAConfig:                    # more flags: RSASettings, SamplingOptions, client.ServerConfig, problems.FileConfig
    ckpt: str = ''                  # a run folder of train.py, or a released folder; '': runs/loops
    question: str = '-'             # '-': the first held-out 'hard' problem, for a model trained on the loops task
    show: bool = False              # print the outputs of every round
    device: str = 'auto'


def answer_question(policy, config, settings, options):
    """Run RSA on one question, and print the answers."""
    question, extras = config.question, ()
    if policy.build_prompt is task.build_prompt:                # a model of the loops task
        question = question if question != '-' else task.test_problems('hard', 1)[0].question
        steps, extras = task.parse(question).steps, (task.judge, task.spaced)
        print(f'{question}   {steps} steps, the answer is {task.solve(question)}')
        settings = settings.resolved(task.rounds_needed(steps, settings.budget or 41), 41, 10, 41)      # as trained
    elif question == '-':
        raise ValueError('this model needs a --question or a file of --problems')
    settings = settings.resolved()
    problems.check_room(policy, [question], settings)
    rounds, = markovian_rsa([policy.encode(question)], policy.sampler(options), policy, settings)
    problems.print_result(rounds, question, policy.decode, config.show, *extras)


def solve_file(policy, listed, path, settings, options, digests, model=''):
    """Run RSA on problems, a list of (problem, answer), and print their scores. Each round is written to the results
    file `path` when it ends, so that a resumed run repeats no completed round. Its settings, problems and digests
    (problems.digests_of) must be those of that file."""
    header = {'settings': {'model': model} | asdict(options) | asdict(settings), 'digests': digests}
    with problems.open_results(path, header, listed, len(listed) * (settings.rounds + 1)) as results:
        for k, (problem, _) in enumerate(listed):
            done = [[Round([Candidate([], None, *fields) for fields in problems.outputs_of(row)])]
                    for row in results.rows[k]]
            generate = policy.sampler(options, results.stream, 1000 * k + len(done))        # a seed per round
            question = policy.encode(problem + problems.INSTRUCTION)
            for now, in rounds_of([question], generate, policy, settings, done):
                results.add(k, now, policy.decode)
    print(problems.table(listed, results.rows))


def main(config, settings, options, server, file):
    configurator.refuse_unused(config, 'question show' if file.problems else '', 'with --problems')
    configurator.refuse_unused(config, 'device' if server.server else '', 'with --server')
    words = problems.read_words(file.aggregation_prompt) if file.aggregation_prompt else None
    listed = problems.read_problems(file.problems) if file.problems else []
    folder = config.ckpt or ('' if server.server else 'runs/loops')
    if server.server:
        policy = client.load_policy(server, folder, words, settings.compact, file.out)
    else:
        policy = load_policy(folder, pick_device(config.device), words, settings.compact)
    if not listed:
        return answer_question(policy, config, settings, options)
    if policy.build_prompt is task.build_prompt:
        raise ValueError('this model was trained on the loops task: use evaluate.py')
    settings = settings.resolved()
    problems.check_room(policy, [problem + problems.INSTRUCTION for problem, _ in listed], settings)
    if file.dry_run:
        return print(problems.forecast(policy, listed, settings))
    solve_file(policy, listed, file.out, settings, options, problems.digests_of(folder, words), server.model)


if __name__ == '__main__':
    with configurator.one_line_errors('rsa.py', 'try a smaller --population or --budget',
                                      'run the same command again to resume the problems'):
        main(*configurator.read(sys.argv[1:], RSAConfig, RSASettings, SamplingOptions, client.ServerConfig,
                                problems.FileConfig))
