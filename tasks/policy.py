"""A policy: a model with its prompt format and answer extraction, as Markovian RSA (rsa.py) and rl.py use it."""
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import decode
import sample
from runtime import pretrained
from tasks import problems
from tasks.loops import task


@dataclass
class Policy:
    """A local model. ServerPolicy (tasks/client.py) has the same interface for a model on a server.

    encode(text) -> tokens; decode(tokens) -> text. build_prompt(question, tails), answer_of(output) and
    thought_of(output): see rsa.rounds_of. step: the decode step (decode.py). stop: the tokens that end an output.
    """
    model: object
    step: Callable
    stop: list
    encode: Callable
    decode: Callable
    build_prompt: Callable
    answer_of: Callable
    thought_of: Callable

    def sampler(self, options, stream=lambda *_: None, first=0):
        """Return a `generate` for rsa.rounds_of, with a new seed per call. first: number of earlier calls, in a run
        that is resumed. stream(i, token) is called with every new token of prompt i."""
        seeds = itertools.count(options.seed * 1_000_003 + first)
        return lambda prompts, max_new_tokens: sample.generate(
            self.model, prompts, max_new_tokens, replace(options, seed=next(seeds)), stop=self.stop, stream=stream,
            step=self.step)


def load_policy(folder, device, words=None, compact='tail'):
    """Return the Policy of a run folder or a released folder: with the format of the loops task if the model was
    trained on it, else with the chat template. words, compact: see problems.message. Raise ValueError if the folder
    holds no model."""
    model, language = pretrained.load(folder, device)
    if language.digest == task.DIGEST:
        if words:
            raise ValueError('aggregation_prompt has no effect on a model trained on the loops task: leave it out')
        prompt_format = task.build_prompt, task.answer_of, list
    else:
        prompt = lambda question, tails: language.prompt(
            [{'role': 'user', 'content': problems.message(question, tails, words, compact)}])
        prompt_format = prompt, language.answer, language.thought
    return Policy(model, decode.folded(model), language.stop, language.encode, language.decode, *prompt_format)
