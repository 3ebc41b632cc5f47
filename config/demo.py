# `make demo`: a small ZAYA1 that writes Python-like text after about 70 seconds of training on two CPU cores.
out_dir = 'runs/demo'
n_layer = 2             # in so short a run 2 layers of 4 experts reach the loss of 4 layers of 8, in half the time
n_expert = 4
batch_size = 8          # 8 * 256 = 2,048 tokens per step
max_steps = 220         # 450,000 tokens, 0.19 epochs of the standard library
warmup_steps = 20
lr = 1e-2               # higher than in config/small.py, for a short run
min_lr = 1e-3
eval_every = 110
eval_batches = 10
checkpoint_every = 110
sample_tokens = 60
