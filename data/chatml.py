"""How to ask a released model, in the chat format that it was trained on, and where its answer is.

Assumed are ChatML, that is <|im_start|> and <|im_end|> around each turn, a bare <think> to begin the reply with, and
that the answer is what follows the last </think>. For a round of Markovian RSA (rsa.py) the model is told in words what
the tails are; into the prompt they go as the tokens they are:

    <|im_start|>user
    QUESTION

    Below is what is left of 2 attempts, each cut off and shown from near its end. It may hold mistakes. Check it, ...

    --- attempt 1 ---
    TAIL
    --- attempt 2 ---
    TAIL<|im_end|>
    <|im_start|>assistant
    <think>
"""


def chat_format(encode, stop):
    """Return the three functions that speak with a released model: middle(text) -> the tokens of a text in the middle
    of a prompt; build_prompt(question, tails) -> tokens; answer_of(output) -> the tokens of its answer, or None.

    encode: its tokenizer, from text to tokens, which may put a token before every text. stop: tokens that end a reply.
    """
    begin = encode('')                                          # [], or the token before every text

    def middle(text):
        return encode(text)[len(begin):]

    def build_prompt(question, tails):
        prompt = begin + middle('<|im_start|>user\n') + question
        if tails:
            attempts = f'{len(tails)} attempts, each' if len(tails) > 1 else 'an attempt,'
            prompt += middle(f'\n\nBelow is what is left of {attempts} cut off and shown from near its end. It may '
                             'hold mistakes. Check it, keep what is right, and write one solution that is better.\n')
        for i, tail in enumerate(tails, 1):
            prompt += middle(f'\n--- attempt {i} ---\n') + [token for token in tail if token not in stop]
        return prompt + middle('<|im_end|>\n<|im_start|>assistant\n<think>\n')

    def answer_of(output):
        close_think = middle('</think>')
        n = len(close_think)
        ends = [i + n for i in range(len(output) - n + 1) if output[i:i + n] == close_think]
        return output[ends[-1]:-1] or None if ends and output[-1] in stop else None
    return middle, build_prompt, answer_of
