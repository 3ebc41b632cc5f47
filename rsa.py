"""Markovian RSA: a population of rollouts that think in bounded rounds, and outvote each other's mistakes in between.

A long problem does not fit one bounded rollout. So a rollout is cut after `budget` tokens, and only its last `tail`
tokens live on: they say how far it came. In the next round each candidate reads the question and the tails of a few
others, drawn at random, and continues from what most of them agree on. With q a question:

    round 0:     output_i = generate(q)                                      i = 1..N, each at most beta tokens
    always:      tail_i   = the last tau tokens of output_i
    round 1..T:  output_i = generate(q, C tails of the round before)         drawn uniformly, without replacement
    result:      the N outputs of round T; its score is their mean correctness, not that of the best

A prompt is never longer than |q| + C tau and what the template adds, whatever beta and T are, while a line of thought
runs to (T + 1) beta tokens: the depth of reasoning comes apart from the context. The cost counts what is generated,
over all candidates and rounds; prompts, and the tails copied into them, do not count. Three special cases:

    T = 0          N independent samples, the usual parallel sampling
    tau = beta     full-chain RSA: nothing is cut away
    C = 1          Markovian thinking (Delethink): each candidate continues from its own tail, nobody is outvoted

Source: ZAYA1-8B report (arXiv 2605.05365), section VI. The C = 1 of Delethink: Aghajohari et al., arXiv 2510.06557.

Legend: N population, C candidates, T rounds (of aggregation, so there are T + 1 in all), beta budget, tau tail.
"""
import random
import statistics


def draw(rng, population, candidates):
    """Which candidates of the round before each new one reads -> N lists of C numbers, in the order they are read."""
    if candidates == 1:                                         # a chain stays with itself
        return [[i] for i in range(population)]
    return [rng.sample(range(population), candidates) for _ in range(population)]


def markovian_rsa(questions, generate, build_prompt, *, population=16, candidates=4, rounds=2, budget, tail,
                  final_budget=None, compact='tail', answer_of=None, seed=0):
    """questions: lists of token ids -> for each a dict with what happened, round by round.

    generate(prompts, max_new_tokens) -> the new tokens of each prompt. It is called once a round, with the prompts of
    all questions, so that its batch is full; it must draw new random numbers at every call.
    build_prompt(question, tails) -> a prompt. `tails` has C lists, some of them empty perhaps; in round 0 it is [].
    answer_of(output) -> the answer in it, as a list of tokens, or None if there is none yet. It alone decides whether a
    candidate is finished, so it should say None to an answer that the budget has cut short. Without answer_of nobody
    finishes. With C = 1 a finished chain stays as it is and is not generated again; one that ended without an answer
    gets another try. With C > 1 a candidate has always others to read, so all are generated.
    compact='answer': the finished pass on their answer (its last tau tokens) instead of their tail, which leaves the
    thoughts out. final_budget: the budget of the last round, if it is another.
    Draws come from (seed, question): they do not depend on the other questions, nor on how many rounds will follow.

    A result: {'rounds': [{'prompts': N lists, None where nothing was generated; 'draws': N lists of C numbers, [] in
    round 0; 'outputs': N lists; 'answers': N lists or None; 'tails': N lists, what is passed on; 'tokens': generated in
    this round}, ...], 'outputs' and 'answers': those of the last round, 'tokens': generated in all rounds}.
    Raises ValueError for settings that make no sense.
    """
    for name, value, low in (('population', population, 1), ('candidates', candidates, 1), ('rounds', rounds, 0),
                             ('budget', budget, 1), ('tail', tail, 1), ('final_budget', final_budget, 1)):
        if value is not None and value < low:
            raise ValueError(f'{name} is {value}, it must be at least {low}')
    if candidates > population:
        raise ValueError(f'candidates is {candidates}: that many cannot be drawn from a population of {population}')
    if tail > budget:
        raise ValueError(f'tail is {tail}, more than the budget of {budget} that it is the end of')
    if compact not in ('tail', 'answer'):
        raise ValueError(f"compact is {compact!r}, it must be 'tail' or 'answer'")
    if compact == 'answer' and answer_of is None:
        raise ValueError("compact is 'answer', which needs answer_of to find one")
    if not questions:
        raise ValueError('questions is empty: give at least one')
    for i, question in enumerate(questions):
        if not question:
            raise ValueError(f'question {i} is empty: give at least one token')

    results = [{'rounds': []} for _ in questions]
    rngs = [random.Random(f'{seed} {list(question)}') for question in questions]
    for t in range(rounds + 1):
        # Everybody's prompt. A chain that has reached its answer has nothing left to do, and gets none.
        for question, result, rng in zip(questions, results, rngs):
            before = result['rounds'][-1] if t else None
            draws = draw(rng, population, candidates) if t else [[] for _ in range(population)]
            prompts = [None if len(drawn) == 1 and before['answers'][drawn[0]] is not None else
                       build_prompt(question, [before['tails'][j] for j in drawn]) for drawn in draws]
            result['rounds'].append({'prompts': prompts, 'draws': draws})

        # One batch for all questions.
        limit = final_budget if t == rounds and final_budget is not None else budget
        batch = [prompt for result in results for prompt in result['rounds'][-1]['prompts'] if prompt is not None]
        new = generate(batch, limit) if batch else []
        assert len(new) == len(batch), f'generate gave {len(new)} outputs for {len(batch)} prompts'
        assert all(len(output) <= limit for output in new), f'generate gave an output of more than {limit} tokens'
        new = iter(new)

        # What each passes on.
        for result in results:
            now = result['rounds'][-1]
            now['outputs'] = [result['rounds'][-2]['outputs'][i] if prompt is None else next(new)
                              for i, prompt in enumerate(now['prompts'])]
            now['answers'] = [answer_of(output) if answer_of else None for output in now['outputs']]
            now['tails'] = [(answer if compact == 'answer' and answer else output)[-tail:]
                            for output, answer in zip(now['outputs'], now['answers'])]
            now['tokens'] = sum(len(output) for output, prompt in zip(now['outputs'], now['prompts'])
                                if prompt is not None)          # what is carried over has been counted
    for result in results:
        last = result['rounds'][-1]
        result |= {'outputs': last['outputs'], 'answers': last['answers'],
                   'tokens': sum(now['tokens'] for now in result['rounds'])}
    return results


def majority_vote(answers):
    """The most frequent answer. None does not vote; of equally frequent ones the first to appear wins. None if nobody
    votes."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=votes.count, default=None)            # max returns the first of the greatest


def score(answers, verify):
    """The answers to one problem, None where there is none; verify(answer) -> right or wrong. Three numbers, 0 to 1:

    mean:      the share that is right, which is what the report's tables show
    majority:  1 if the most frequent answer is right: a method too, for it needs no verifier to choose
    best_of_n: 1 if any is right, with the verifier itself choosing: an upper bound, no method
    """
    right = [answer is not None and bool(verify(answer)) for answer in answers]
    vote = majority_vote(answers)
    return {'mean': sum(right) / len(right), 'majority': float(vote is not None and bool(verify(vote))),
            'best_of_n': float(any(right))}


def mean_ci95(values):
    """One value a problem -> their mean, and half the width of its 95 % confidence interval, 1.96 std / sqrt(n).

    The problems are the independent draws. The N outputs to one problem share its difficulty and each other's tails:
    to count them one by one would make the interval far too narrow.
    """
    if not values:
        raise ValueError('no values to average: give those of at least one problem')
    std = statistics.stdev(values) if len(values) > 1 else float('nan')         # one problem says nothing of the spread
    return statistics.fmean(values), 1.96 * std / len(values) ** 0.5
